"""Lines as the world has them: read as the reference reads them, or named and counted."""

import json
import time

import pytest

from tests.support.bad_lines import (
  GOOD,
  NOTHING_LOST,
  TOKENS_PER_TILE,
  animation,
  assert_named,
  assert_read_as,
  batches_of,
  hard_time_limit,  # noqa: F401 - a fixture
  loading,
  noise,
  tiles_by_pillow,
  with_image,
  write_data,
)
from tests.support.data_toys import WHERE, turns

GOOD_TEXT = json.dumps(GOOD["conversations"]).encode()


UNREADABLE_LINES = {
  "not_utf8": (b'{"conversations": "\xff\xfe"}', "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
  "utf16": ('{"conversations": []}'.encode("utf-16-le"), "broken JSON at column 2"),
  "nul": (b"\0" * 50, "broken JSON at column 1: Expecting value"),
  "nul_in_text": (b'{"conversations": "a\0b"}', "broken JSON at column 21: Invalid control character"),
  "nested": (b"[" * 100_000, "JSON that cannot be read: "),
  "nested_key": (b'{"a":' * 100_000, "JSON that cannot be read: "),
  "digits": (b'{"id": ' + b"9" * 5000 + b"}", "JSON that cannot be read: Exceeds the limit"),
  "list": (b"[1, 2]", "expected a JSON object, got list"),
  "text": (b'"hello"', "expected a JSON object, got str"),
  "number": (b"NaN", "expected a JSON object, got float"),
  "null": (b"null", "expected a JSON object, got NoneType"),
  "two_records": (b'{"a": 1}{"b": 2}', "broken JSON at column 9: Extra data"),
  "mid_bom": (b"\xef\xbb\xbf", "broken JSON at column 1: Expecting value"),
  "no_turns": (b'{"id": 1}', "key 'conversations' is missing; the line has 'id'"),
  # The reference's parser takes the last one.
  "twice": (
    b'{"image": "gone.png", "image": "", "conversations": ' + GOOD_TEXT + b"}",
    "key 'image' stands twice",
  ),
  "value_twice": (
    b'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a", "value": "b"}]}',
    "key 'value' stands twice",
  ),
  "20_megabytes": (b'{"a": "' + b"x" * 20_000_000, "broken JSON at column 7: Unterminated string"),
}


@pytest.mark.parametrize("name", UNREADABLE_LINES)
def test_lines_that_cannot_be_read_are_named(tmp_path, tokenizer, name):
  assert_named(tmp_path, tokenizer, *UNREADABLE_LINES[name])


READABLE_LINES = {
  "nan": b'{"id": NaN, "score": -Infinity, "conversations": ' + GOOD_TEXT + b"}",
  "twice_the_same": b'{"id": 1, "id": 1, "image": "", "image": "", "conversations": ' + GOOD_TEXT + b"}",
  "carriage_return": b'{"conversations": ' + GOOD_TEXT + b"}\r",
  "mid_bom": b'\xef\xbb\xbf{"conversations": ' + GOOD_TEXT + b"}",
  "20_megabytes": b'{"page": "' + b"x" * 20_000_000 + b'", "conversations": ' + GOOD_TEXT + b"}",
}


@pytest.mark.parametrize("name", READABLE_LINES)
def test_odd_lines_that_are_read(tmp_path, tokenizer, name):
  assert_read_as(tmp_path, tokenizer, READABLE_LINES[name], GOOD)


def test_bom_and_crlf_throughout(tmp_path, tokenizer):
  meta = write_data(tmp_path, GOOD, GOOD, GOOD)
  path = tmp_path / "toy.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
  for packed in (False, True):
    with loading(meta, tokenizer, packed=packed) as loader:
      assert len(list(loader)) == 1 and loader.counters()["toy"] == NOTHING_LOST


def said(*pairs):
  return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


BAD_TURNS = {
  "null": (said(("human", "hi"), ("gpt", None)), 'turn 2 must be {"from": role, "value": text}'),
  "missing": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt"}]}, "turn 2 must be {"),
  "list": (said(("human", "hi"), ("gpt", ["a"])), "turn 2 must be {"),
  "unknown_role": (said(("human", "hi"), ("bot", "yes")), "turn 2 is from 'bot'"),
  "role_null": (said((None, "hi"), ("gpt", "yes")), "turn 1 is from None"),
  "role_list": (said((["human"], "hi"), ("gpt", "yes")), "turn 1 is from ['human']"),
  "empty": ({"conversations": []}, "'conversations' must be a list of at least one turn, got an empty list"),
  "no_list": ({"conversations": "hi"}, "'conversations' must be a list of at least one turn, got str"),
  "turns_null": ({"conversations": None}, "must be a list of at least one turn, got NoneType"),
  "object": ({"conversations": {"from": "gpt"}}, "must be a list of at least one turn, got dict"),
  "texts": ({"conversations": ["hi", "yes"]}, "turn 1 must be {"),
  "surrogate": (
    said(("human", "hi"), ("gpt", "\ud800")),
    "turn 2: character 1 is '\\ud800', half of a surrog",
  ),
  "more_places": (said(("human", "<image>"), ("gpt", "a")), "1 <image> in the human turns but 0 images"),
  # With one image or a video, <image> is put where it is missing; not into a turn that has no text.
  "image_null": (said(("human", None), ("gpt", "a")) | {"image": "a.png"}, "turn 1 must be {"),
  "image_number": (said(("human", 5), ("gpt", "a")) | {"image": "a.png"}, "turn 1 must be {"),
  "image_no_human": (said(("gpt", "a")) | {"image": "a.png"}, "0 <image> in the human turns but 1 images"),
  "video_null": (said(("human", None), ("gpt", "a")) | {"video": "a.gif"}, "no human turn with a text where"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_turns_are_named(tmp_path, tokenizer, name):
  noise().save(tmp_path / "a.png")
  animation(tmp_path / "a.gif")
  assert_named(tmp_path, tokenizer, *BAD_TURNS[name])


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_answer_without_text_is_named(tmp_path, tokenizer, answer):
  assert_named(
    tmp_path, tokenizer, said(("human", "hi"), ("gpt", answer)), "turn 2 is an answer without text"
  )


def test_a_place_for_an_image_in_an_answer_is_text(tmp_path, tokenizer):
  noise().save(tmp_path / "a.png")
  line = with_image("a.png") | said(("human", "<image>\nwhat?"), ("gpt", "red <image>"))
  tiles = len(tiles_by_pillow(tmp_path / "a.png"))
  for batch in batches_of(tmp_path, tokenizer, line):
    assert (batch.input_ids == tokenizer.image_token_id).sum() == tiles * TOKENS_PER_TILE
    # As the same letters are anywhere else.
    text = tokenizer.decode(batch.targets[batch.loss_weight > 0])
    assert "red <image>" in text


@pytest.mark.parametrize("roles", [("system",), ("system", "human"), ("human",)])
def test_a_line_that_teaches_nothing_is_counted(tmp_path, tokenizer, roles):
  batches_of(tmp_path, tokenizer, said(*((role, "be brief") for role in roles)), fully_masked=1)


def test_an_answer_of_a_million_characters_is_cut_and_counted(tmp_path, tokenizer):
  meta = write_data(tmp_path, GOOD, {"conversations": turns("hi", "red circle " * 90_910)}, GOOD)
  start = time.process_time()
  for packed in (False, True):
    with loading(meta, tokenizer, packed=packed, data={"max_seq_length": 256}) as loader:
      (batch,) = loader
      assert loader.counters()["toy"] == NOTHING_LOST | {"truncated": 1}
    good = len(tokenizer.encode(GOOD["conversations"], [], WHERE).input_ids)
    assert (batch.segment_ids > 0).sum() == 2 * good + 256
  # A second or two for each of the three times that it is tokenised: in proportion to its length, not to its square.
  assert time.process_time() - start < 15
