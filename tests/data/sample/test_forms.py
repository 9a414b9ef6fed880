"""Conversations in the forms of other trainers: what each is in the reference's form, and what is refused."""

import pickle

import pytest

from internvl_jax.data.sample import forms
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.where import DataError
from internvl_jax.tasks.preference.lines import PairLines
from tests.support.data_toys import WHERE, turns

TEXT = turns("<image>\nWhat?", "A cat.")
LONG = [{"from": "system", "value": "S"}, *turns("<image>\nWhat?", "A cat.", "Sure?", "Yes.")]


def said(role, content, **rest):
  return {"role": role, "content": content, **rest}


def part(kind, **values):
  return {"type": kind, **values}


# name -> (form, record, what it is in the reference's form)
READ = {
  "native": ("conversations", {"conversations": TEXT}, {"conversations": TEXT}),
  "messages": (
    "messages",
    {"messages": [said("user", "<image>\nWhat?"), said("assistant", "A cat.")], "images": ["a.png"]},
    {"image": ["a.png"], "conversations": TEXT},
  ),
  "messages_system": (
    "messages",
    {
      "messages": [
        said("system", "S"),
        said("user", "<image>\nWhat?"),
        said("assistant", "A cat.", tool_calls=None),
        said("user", "Sure?"),
        said("assistant", "Yes."),
      ],
      "image": "a.png",
    },
    {"image": "a.png", "conversations": LONG},
  ),
  "trl_vision": (
    "messages",
    {
      "messages": [
        said("user", [part("image"), part("text", text="What?")]),
        said("assistant", [part("text", text="A cat.")]),
      ],
      "images": [{"bytes": None, "path": "a.png"}],
    },
    {"image": ["a.png"], "conversations": TEXT},
  ),
  "qwen": (
    "messages",
    {
      "messages": [
        said("user", [part("image", image="file:///a.png", max_pixels=9), part("text", text="What?")]),
        said("assistant", "A cat."),
      ]
    },
    {"image": ["/a.png"], "conversations": TEXT},
  ),
  "openai_url": (
    "messages",
    {
      "messages": [
        said("user", [part("image_url", image_url={"url": "http://h/a.png", "detail": "low"}), "What?"]),
        said("assistant", "A cat."),
      ]
    },
    {"image": ["http://h/a.png"], "conversations": TEXT},
  ),
  "table_parts": (  # every field in every part, as tables have them
    "messages",
    {
      "messages": [
        said("user", [part("image", text="", image="a.png"), part("text", text="What?", image=None)]),
        said("assistant", [part("text", text="A cat.", image=None)]),
      ]
    },
    {"image": ["a.png"], "conversations": TEXT},
  ),
  "two_images": (
    "messages",
    {
      "messages": [
        said("user", ["A:", part("image", path="a.png"), part("image", path="b.png"), "Which?"]),
        said("assistant", "b"),
      ]
    },
    {"image": ["a.png", "b.png"], "conversations": turns("A:<image>\n<image>\nWhich?", "b")},
  ),
  "video_part": (
    "messages",
    {
      "messages": [
        said("user", [part("video", video="a.mp4"), part("text", text="Who?")]),
        said("assistant", "I"),
      ]
    },
    {"video": ["a.mp4"], "conversations": turns("<video>\nWho?", "I")},
  ),
  "unlearned": (
    "messages",
    {
      "messages": [
        said("user", "a"),
        said("assistant", "b", loss=0),
        said("user", "c"),
        said("assistant", "d"),
      ]
    },
    {"conversations": [*turns("a"), {"from": "gpt", "value": "b", "loss": False}, *turns("c", "d")]},
  ),
  "sharegpt": (
    "sharegpt",
    {"conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "chatgpt", "value": "A cat."}]},
    {"conversations": TEXT},
  ),
  "sharegpt_roles": (
    "sharegpt",
    {
      "system": "S",
      "conversations": [
        said("user", "<image>\nWhat?"),
        said("assistant", "A cat."),
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
      ],
    },
    {"conversations": LONG},
  ),
  "swift": (
    "query",
    {"query": "What?", "response": "A cat.", "images": ["a.png"]},
    {"image": ["a.png"], "conversations": turns("What?", "A cat.")},
  ),
  "swift_history": (
    "query",
    {"query": "Sure?", "response": "Yes.", "history": [["<image>\nWhat?", "A cat."]], "system": "S"},
    {"conversations": LONG},
  ),
  "question": (
    "question",
    {"question": "What?", "answer": "A cat.", "image": "a.png", "id": 1},
    {"image": "a.png", "id": 1, "conversations": turns("What?", "A cat.")},
  ),
  "prompt": ("prompt", {"prompt": "a", "completion": "b"}, {"conversations": turns("a", "b")}),
  "prompt_messages": (
    "prompt",
    {
      "prompt": [said("user", "a"), said("assistant", "b"), said("user", "c")],
      "completion": [said("assistant", "d")],
    },
    {"conversations": [*turns("a"), {"from": "gpt", "value": "b", "loss": False}, *turns("c", "d")]},
  ),
  "tool": (
    "messages",
    {"messages": [said("user", "a"), said("tool", "b"), said("assistant", "c")]},
    "turn 2 is from 'tool': turns are from human, user, ",
  ),
  "tool_calls": (
    "messages",
    {"messages": [said("user", "a"), said("assistant", None, tool_calls=[{"name": "f"}])]},
    "turn 2: key 'tool_calls'",
  ),
  "audio": (
    "messages",
    {"messages": [said("user", [part("audio", audio="a.wav")]), said("assistant", "b")]},
    "turn 1 has a part that is not read",
  ),
  "both_places": (
    "messages",
    {"messages": [said("user", [part("image", image="a.png")]), said("assistant", "b")], "images": ["a.png"]},
    "parts of type 'image' say which image they are, and 'images' of the line does, too",
  ),
  "some_parts": (
    "messages",
    {"messages": [said("user", [part("image", image="a.png"), part("image")]), said("assistant", "b")]},
    "1 of 2 parts of type 'image' say which image they are",
  ),
  "no_content": ("messages", {"messages": [{"role": "user"}]}, "turn 1 has no 'content'"),
  "no_list": ("messages", {"messages": "hi"}, "'messages' must be a list of at least one message, got 'hi'"),
  "no_object": ("messages", {"messages": ["hi"]}, "turn 1 must be an object"),
  "history": (
    "query",
    {"query": "a", "response": "b", "history": ["c"]},
    "'history' must be a list of [query,",
  ),
  "other_text": (
    "query",
    {"query": "a", "response": "b", "rejected_response": "c"},
    "key 'rejected_response'",
  ),
}


def check(lines, record, expected):
  copy = pickle.loads(pickle.dumps(record))
  if isinstance(expected, str):
    with pytest.raises(DataError) as caught:
      lines.plain(record, WHERE)
    assert str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)
  else:
    assert lines.plain(record, WHERE) == expected
  assert record == copy


@pytest.mark.parametrize("name", READ)
def test_a_form_is_recognized_and_becomes_the_references(name):
  form, record, expected = READ[name]
  lines = pickle.loads(pickle.dumps(CONVERSATION_LINES.recognized(iter([None, 3, {"id": 1}, record]))))
  assert lines.form == form and lines.form_name == forms.CONVERSATION_FORMS[form].name
  check(lines, record, expected)


@pytest.mark.parametrize("name", ["messages", "swift", "question", "prompt"])
def test_a_line_of_another_form_is_refused(name):
  record = READ[name][1]
  lines = CONVERSATION_LINES.recognized([record])
  native, cause = {"conversations": TEXT}, "it is not of the form of the dataset's first line, "
  check(lines, native, f"{cause}{lines.form_name}: it has 'conversations'; write all lines")
  check(CONVERSATION_LINES, record, "and the dataset's first lines have no such form; write all lines")


def test_keys_that_nobody_reads_are_told_in_every_form():
  record = {"messages": [said("user", "a"), said("assistant", "b", name="n")], "id": 1, "note": 2}
  lines = CONVERSATION_LINES.recognized([record])
  found = list(lines.unread(record, lines.plain(record, WHERE), get_template("internvl2_5")))
  assert found == ["'id'", "'note'", "'name' of a turn"]


PAIR = {"question": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog."}
USER = said("user", [part("image"), part("text", text="What?")])

PAIRS = {
  "native": ("conversations", PAIR, PAIR),
  "prompt": (
    "prompt",
    {"prompt": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
    {**PAIR, "image": ["a.png"]},
  ),
  "messages": (
    "messages",
    {
      "prompt": [USER],
      "chosen": [said("assistant", "A cat.")],
      "rejected": [said("assistant", [part("text", text="A dog.")])],
      "images": ["a.png"],
    },
    {**PAIR, "image": ["a.png"]},
  ),
  "whole": (
    "messages",
    {
      "chosen": [said("system", "S"), said("user", "<image>\nWhat?"), said("assistant", "A cat.")],
      "rejected": [said("system", "S"), said("user", "<image>\nWhat?"), said("assistant", "A dog.")],
    },
    {**PAIR, "system": "S"},
  ),
  "text_prompt": (
    "messages",
    {
      "prompt": "<image>\nWhat?",
      "chosen": [said("assistant", "A cat.")],
      "rejected": [said("assistant", "A dog.")],
    },
    PAIR,
  ),
  "own_images": (
    "messages",
    {
      "prompt": [said("user", [part("image", image="a.png"), part("text", text="What?")])],
      "chosen": [said("assistant", "A cat.")],
      "rejected": [said("assistant", "A dog.")],
    },
    {**PAIR, "image": ["a.png"]},
  ),
  "prompts_differ": (
    "messages",
    {
      "chosen": [said("user", "a"), said("assistant", "b")],
      "rejected": [said("user", "c"), said("assistant", "d")],
    },
    "'chosen' and 'rejected' answer different prompts",
  ),
  "turns": (
    "messages",
    {
      "prompt": [said("user", "a"), said("assistant", "b"), said("user", "c")],
      "chosen": [said("assistant", "d")],
      "rejected": [said("assistant", "e")],
    },
    "a pair has one question and one answer, after an optional system message; got turns from human, gpt, human, gpt",
  ),
  "key": (
    "messages",
    {
      "prompt": [said("user", "a")],
      "chosen": [said("assistant", "d", weight=0)],
      "rejected": [said("assistant", "e")],
    },
    "key 'weight' of a message is not read",
  ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_in_other_forms(name):
  form, record, expected = PAIRS[name]
  lines = PairLines().recognized([record])
  assert lines.form == form
  check(lines, record, expected)
