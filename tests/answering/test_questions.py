"""Questions become the prompts of training; answers, streams, conversations, files and terminals agree."""

import dataclasses
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_jax.answering.lines import AnswerFile
from internvl_jax.answering.model import Chat, How, Model
from internvl_jax.answering.prompts import Prompter, Question
from internvl_jax.answering.terminal import talk
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError, Where
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.inference import open_for_inference
from tests.support.toy import CURVE

IMAGES = sorted(map(str, (CURVE / "data/images").iterdir()))[:3]


@functools.cache
def opened():
  return open_for_inference(CURVE / "init", bf16=False)


@functools.cache
def model():
  return Model(opened())


def trained(turns, **media):
  """What training makes of a conversation up to its last answer."""
  maker = SampleMaker(
    spec=DatasetSpec(name="question", root="", annotation="a test"),
    data=opened().data,
    tokenizer=opened().tokenizer,
    tokens_per_tile=opened().source.config.tokens_per_tile,
    limits=Limits(8192, policy="error"),
  )
  turns = [{"from": role, "value": text} for role, text in turns]
  sample = maker.make({"conversations": turns, **media}, Where("question", "a test", 1))
  return prompt_ids(sample), sample.tiles


@pytest.fixture
def frames(tmp_path):
  folder = tmp_path / "frames"
  folder.mkdir()
  for number in range(3):
    Image.new("RGB", (40, 30), (80 * number, 20, 30)).save(folder / f"{number}.png")
  return str(folder)


def test_prompts_are_those_of_training(frames):
  one, two, three = IMAGES
  earlier = (Question("What?", images=[one]), "A dog.")
  cases = [
    (Question("What?", images=[one]), [("human", "<image>\nWhat?")], {"image": one}),
    (Question("Who?", system="Be brief."), [("system", "Be brief."), ("human", "Who?")], {}),
    (
      Question("Which?", images=[one, two]),
      [("human", "Image-1: <image>\nImage-2: <image>\nWhich?")],
      {"image": [one, two]},
    ),
    (
      Question("<image> or <image>?", images=[two, one]),
      [("human", "<image> or <image>?")],
      {"image": [two, one]},
    ),
    (
      Question("And?", images=[two, three], history=[earlier]),
      [
        *(("human", "<image>\nWhat?"), ("gpt", "A dog.")),
        ("human", "Image-2: <image>\nImage-3: <image>\nAnd?"),
      ],
      {"image": [one, two, three]},
    ),
    (Question("Who?", videos=[frames]), [("human", "<video>\nWho?")], {"video": frames}),
  ]
  for question, turns, media in cases:
    found = Prompter(opened=opened()).prompt(question)
    ids, tiles = trained([*turns, ("gpt", "?")], **media)
    np.testing.assert_array_equal(found.input_ids, ids, err_msg=question.text)
    np.testing.assert_array_equal(found.tiles, tiles, err_msg=question.text)


def test_the_prompt_of_a_conversation_is_the_reference_s_text():
  """What its `chat` makes of a history, of images by their number of tiles, and of its template's system message."""
  history = [(Question("What?", images=IMAGES[:1]), "A dog.")]
  found = Prompter(opened=opened(), max_tiles=2).prompt(Question("And?", images=IMAGES[1:3], history=history))
  system = opened().tokenizer.template.system_message
  tokens = opened().source.config.tokens_per_tile
  counts = [
    Prompter(opened=opened(), max_tiles=2).prompt(Question("?", images=[path])).tiles for path in IMAGES
  ]
  one, two, three = (f"<img>{'<IMG_CONTEXT>' * len(tiles) * tokens}</img>" for tiles in counts)
  assert opened().tokenizer.decode(found.input_ids, special=True) == (
    f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{one}\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA dog.<|im_end|>\n"
    f"<|im_start|>user\nImage-2: {two}\nImage-3: {three}\nAnd?<|im_end|>\n<|im_start|>assistant\n"
  )


def test_images_of_every_kind_and_videos_beside_them(frames):
  path = IMAGES[0]
  picture = Image.open(path).convert("RGB")
  expected = Prompter(opened=opened()).prompt(Question("What?", images=[path]))
  for image in (Path(path), Path(path).read_bytes(), picture, np.asarray(picture)):
    found = Prompter(opened=opened()).prompt(Question("What?", images=[image]))
    np.testing.assert_array_equal(found.tiles, expected.tiles)
  fewer = Prompter(opened=opened(), max_tiles=1, frames=2)
  asked = Question("<video> <image> <video>", images=[path], videos=[frames, [f"{frames}/2.png"]])
  tiles = fewer.prompt(asked).tiles
  # Frames that are given are taken as they are; the image is one tile, between the videos.
  assert [tuple(tile.reshape(-1, 3)[0])[1:] == (20, 30) for tile in tiles] == [True, True, False, True]


def test_what_cannot_be_asked():
  def refused(message, *arguments, **options):
    with pytest.raises(UserError, match=message):
      model().answer(*arguments, **options)

  refused("2 <image> in the question but 1 given", "<image><image>?", images=IMAGES[:1])
  refused("1 <video> in the question but 0 given", "<video>?")
  refused("image not found: /nowhere.png", "?", images=["/nowhere.png"])
  refused(r"array float32 \[3\] is no image", "?", images=[np.zeros(3, np.float32)])
  refused("temprature: no such setting of answers", "?", temprature=1.0)
  refused("max_new_tokens=0: must be a whole number from 1", "?", max_new_tokens=0)
  refused("a Question has its own images", Question("?"), images=IMAGES[:1])
  refused(r"tokens and 0 tiles exceed the model's \d+ tokens", "word " * 100_000)


def test_answers_batches_and_streams_are_the_same_and_draws_depend_on_the_seed():
  settings = {"max_new_tokens": 9, "temperature": 2.0, "repetition_penalty": 3.0}
  asked = [Question("What?", images=IMAGES[:1])] * 2
  first, second = model().answers(asked, batch_size=2, seed=3, **settings)
  assert first and first != second
  parts = list(model().stream("What?", images=IMAGES[:1], seed=3, **settings))
  assert "".join(parts) == first and len(parts) > 1
  assert model().answer(asked[0], seed=4, **settings) not in (first, second)


class Echo:
  """A model whose answers say what was asked."""

  def __init__(self):
    self.asked = []

  def stream(self, question, **settings):
    if "/nowhere.png" in question.images:
      raise UserError("image not found")
    self.asked.append((question, settings))
    yield from ("re", f": {question.text}")

  def prompter(self, max_tiles, frames):
    return model().prompter(max_tiles, frames)

  def decoder(self, how, batch_size):
    assert how is HOW
    return batch_size

  def decode(self, prompts, decoder):
    assert 0 < len(prompts) <= decoder
    return [f"{len(prompt.input_ids)} é {prompt.number}" for prompt in prompts]


def test_a_conversation_asks_with_all_that_was_said():
  echo = Echo()
  chat = Chat(echo, "Be brief.", {"temperature": 0.5})
  assert chat.ask("What?", images=IMAGES[:1]) == "re: What?" and list(chat.stream("Why?")) == ["re", ": Why?"]
  with pytest.raises(UserError):
    chat.ask("And?", images=["/nowhere.png"])
  assert chat.ask("Who?") == "re: Who?"
  earlier = ((Question("What?", tuple(IMAGES[:1])), "re: What?"), (Question("Why?"), "re: Why?"))
  question, settings = echo.asked[-1]
  assert question == Question("Who?", history=earlier, system="Be brief.") and settings == {
    "temperature": 0.5
  }
  chat.clear()
  chat.ask("Who?")
  assert echo.asked[-1][0].history == ()


def test_a_terminal(capsys):
  echo, out = Echo(), io.StringIO()
  lines = [
    *("\n", f"/image {IMAGES[0]}\n", "What?\n", "Why?\n", "/image\n", "/jump\n", "/image /nowhere.png\n"),
    *("Where?\n", "/clear\n", "Why?\n", "/exit\n", "never\n"),
  ]
  talk(Chat(echo, None, {}), iter(lines), out)
  assert out.getvalue() == "re: What?\nre: Why?\nre: Why?\n"
  assert [(len(asked.images), len(asked.history)) for asked, _ in echo.asked] == [(1, 0), (0, 1), (0, 0)]
  told = capsys.readouterr().err
  assert "/image needs a path" in told and "/jump: no such command" in told and "image not found" in told


# --- Files of questions -------------------------------------------------------------------------------------

HOW = How.of({"max_new_tokens": 4, "temperature": 2.0, "seed": 1})


def write_lines(path, lines):
  path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
  return path


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def questions(folder):
  name = Path(IMAGES[0]).name
  turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Why?"},
  ]
  return write_lines(
    folder / "questions.jsonl",
    [
      {"id": "a", "question": "What?", "image": name},
      {"messages": turns, "images": [name]},
      "{broken\n",
      {"id": 7, "question": "What?", "image": "nowhere.png"},
      {"question": "What?", "image": name, "note": "kept out"},
    ],
  )


def test_a_file_of_questions_is_answered_in_order_and_goes_on(tmp_path):
  inputs, output = questions(tmp_path), tmp_path / "answers.jsonl"
  file = AnswerFile(inputs=inputs, output=output, root=str(CURVE / "data/images"), batch_size=2)
  assert file.run(Echo(), HOW) == (3, 2)
  found = read_lines(output)
  assert [line["id"] for line in found] == ["a", 2, 3, 7, 5]
  assert ["answer" in line for line in found] == [True, True, False, False, True]
  assert f"{inputs}:3" in found[2]["error"] and "nowhere.png" in found[3]["error"]
  history = ((Question("What?", images=IMAGES[:1]), "A dog."),)
  second = model().prompter().prompt(Question("Why?", history=history, system="Be brief."))
  assert found[1]["answer"] == f"{len(second.input_ids)} é 2"

  whole = output.read_bytes()
  output.write_bytes(whole[: whole.index(b"\n") + 20])  # Killed while it wrote its second line.
  assert dataclasses.replace(file, batch_size=1).run(Echo(), HOW) == (2, 2)
  assert output.read_bytes() == whole
  assert file.run(Echo(), HOW) == (0, 0)


def test_files_that_do_not_belong_together(tmp_path):
  inputs, output = questions(tmp_path), tmp_path / "answers.jsonl"
  write_lines(output, [{"id": "b", "answer": "?"}])
  file = AnswerFile(inputs=inputs, output=output)
  with pytest.raises(UserError, match=r"answers.jsonl:1 answers id 'b', but .* has 'a' there"):
    file.run(Echo(), HOW)
  output.unlink()
  with pytest.raises(DataError, match=r"questions.jsonl:1 .*image not found"):
    dataclasses.replace(file, strict=True).run(Echo(), HOW)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"questoin": "?"}, "one of question, messages, conversations"),
    ({"question": "?", "imagee": "a.png"}, "has the key 'imagee'; did you mean image"),
    ({"question": "?", "image": 3}, "'image' must be a path or a list of paths, got '3'"),
    ({"question": 3}, "are texts"),
    ({"messages": [{"role": "assistant", "content": "?"}]}, "the last turn must be the user's question"),
    ({"messages": [{"role": "tool", "content": "?"}]}, "a turn has a role"),
    ({"messages": [{"role": "user", "content": "?"}] * 2}, "take turns, got human, human"),
    ({"question": "<image>", "images": ["a.png", "b.png"]}, "1 images or videos more than places"),
    ([1], "must be an object"),
  ],
)
def test_lines_that_cannot_be_asked(tmp_path, line, message):
  file = AnswerFile(inputs=tmp_path / "q.jsonl", output=tmp_path / "a.jsonl")
  with pytest.raises(DataError, match=message):
    file._question(json.dumps(line).encode(), Where("--inputs", "q.jsonl", 1))
