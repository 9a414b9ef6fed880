"""Held-out data are opened and looked at before a run begins, and named as what they are."""

import json

import pytest
from PIL import Image

from internvl_jax.arguments import EvalConfig
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import DataError
from internvl_jax.errors import UserError
from internvl_jax.eval.questions import open_questions
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.open_model import open_model
from internvl_jax.setup.held_out import start_check
from internvl_jax.tasks import open_task
from tests.support.toy import CURVE, curve_config


def turns(question, *answers):
  return [
    {"from": role, "value": value}
    for role, value in zip(("human", "gpt") * 2, (question, *answers), strict=False)
  ]


GOOD = {"image": "a.png", "conversations": turns("<image>\nwhat?", "red")}
BAD = {
  "gone": (GOOD | {"image": "gone.png"}, "gone.png; check eval.root"),
  # What a line says of sizes does not stand for the file.
  "gone_but_sized": (GOOD | {"image": "gone.png", "width": 9, "height": 9}, "image not found"),
  "cut": (GOOD | {"image": "cut.png"}, "cannot be decoded"),
  "no_answer": ({"conversations": turns("what?")}, "does not end with an answer from 'gpt'"),
  "unlearned": (
    {"conversations": [*turns("what?"), {"from": "gpt", "value": "red", "loss": False}]},
    "no token of its last answer would be learned, so it cannot be scored",
  ),
  "long": ({"conversations": turns("what? " * 2000, "red")}, "raise data.max_seq_length or delete the line"),
  "video": ({"video": "gone.mp4", "conversations": turns("what?", "red")}, "video not found"),
  "key": ({"image_path": "a.png", "conversations": turns("what?", "red")}, "key 'image_path'"),
  "no_object": ([1], "expected a JSON object, got list"),
}


@pytest.fixture(scope="module")
def chat():
  return ChatTokenizer(load_tokenizer(CURVE / "init"), "internvl2_5")


@pytest.fixture
def config(tmp_path):
  Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
  (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
  config = curve_config(tmp_path / "out")
  config.eval.annotation, config.eval.root = str(tmp_path / "held.jsonl"), str(tmp_path)
  config.loader.cache_dir = str(tmp_path / "cache")
  return config


def write(config, *records):
  with open(config.eval.annotation, "w") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


def test_what_cannot_be_asked_is_named_line_by_line(config, chat):
  write(config, GOOD, *(record for record, _ in BAD.values()), GOOD)
  found = open_questions(config.eval, config.data, chat, 4)[0].problems(workers=0)
  assert len(found) == len(BAD)
  for number, (message, (name, (_, cause))) in enumerate(zip(found, BAD.items(), strict=True), 2):
    assert message.startswith(f"{config.eval.annotation}:{number} (dataset 'eval.annotation'): "), message
    assert cause in message and "meta file" not in message and "on_over_length" not in message, (
      name,
      message,
    )


def test_questions_beyond_the_limit_are_not_asked(config, chat):
  write(config, GOOD, GOOD, BAD["gone"][0])
  asked = EvalConfig(annotation=config.eval.annotation, root=config.eval.root, limit=2)
  (questions,) = open_questions(asked, config.data, chat, 4)
  assert questions.problems(workers=0) == [] and questions.read(1).answer == "red"


def one_set(config, **settings):
  asked = EvalConfig(annotation=config.eval.annotation, root=config.eval.root, **settings)
  return lambda chat: open_questions(asked, config.data, chat, 4)[0]


def test_what_is_read_of_a_line(config, chat):
  people = [{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]
  several = {
    "image": ["a.png", "a.png"],
    "conversations": turns("<image><image>\nwhat?", "red", "sure?", "yes"),
  }
  write(config, GOOD | {"answers": people}, several | {"answers": "yes"}, GOOD | {"answers": []})
  questions = one_set(config)(chat)
  first, second, third = map(questions.read, range(3))
  assert (first.question, first.answer, first.answers) == ("what?", "red", ("red", "dark red"))
  assert (second.question, second.answers, third.answers) == ("what?\nred\nsure?", ("yes",), ("red",))
  (picture,) = questions.pictures(0)
  assert [picture, picture] == questions.pictures(1)
  write(config, GOOD | {"answers": [["red"]]})
  (message,) = one_set(config)(chat).problems(workers=0)
  assert "'answers' must be a list of texts" in message


def test_the_loss_alone_needs_no_answer_at_the_end(config, chat):
  dialog = [*turns("what?", "red", "sure?"), {"from": "gpt", "value": "yes", "loss": False}]
  write(config, GOOD | {"conversations": dialog}, BAD["unlearned"][0])
  found = one_set(config, metrics=("loss",))(chat)
  assert "no token of its last answer" in "".join(found.problems(workers=0)) and found.read(0).answer == "yes"
  assert len(found.problems(workers=0)) == 1 and len(one_set(config)(chat).problems(workers=0)) == 2


def test_a_file_that_is_none(config, chat):
  for text, cause in (("\n", "add lines, or do not name it"), ("a,b\n1,2\n", "it is a table of text")):
    with open(config.eval.annotation, "w") as file:
      file.write(text)
    with pytest.raises(DataError, match=cause):
      open_questions(config.eval, config.data, chat, 4)


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_held_out_data_are_refused_before_the_first_step(config, chat, policy, tmp_path):
  write(config, GOOD)
  source, _ = open_model(config, with_weights=False)
  config.loader.on_bad_sample = policy
  config.loader.sequence_buckets = ()
  start_check(config, source, chat, open_task(config, source)).finish()
  # Of pairs, which the loader reads, those may be dropped that its policy drops.
  pair = {"question": "what?", "chosen": "red", "rejected": "blue"}
  (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n{json.dumps(pair | {'image': 'gone.png'})}\n")
  (tmp_path / "pairs.json").write_text(
    json.dumps({"p": {"root": str(tmp_path), "annotation": "pairs.jsonl"}})
  )
  config.preference.loss_type, config.preference.eval_meta_path = "sigmoid", str(tmp_path / "pairs.json")
  (message,) = start_check(config, source, chat, open_task(config, source)).problems()
  assert f"{tmp_path}/pairs.jsonl:2 (dataset 'p'): image not found" in message
  if policy == "drop":
    start_check(config, source, chat, open_task(config, source)).finish()
    config.preference.eval_meta_path = None
    write(config, BAD["gone"][0])
  with pytest.raises(
    UserError, match=r"1 lines of the held-out data cannot be used: .*; correct them before the run"
  ):
    start_check(config, source, chat, open_task(config, source)).finish()
