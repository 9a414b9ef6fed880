"""Samples that are shown at every evaluation, and their files."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import EvalConfig, TrainingArguments
from internvl_jax.eval import shown as module
from internvl_jax.eval.scoring import Question
from internvl_jax.eval.shown import Picture, Shown, ShownFiles, chosen_lines, without_marks
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TrackedRun, open_writers
from internvl_jax.storage.paths import path_of
from tests.support.buckets import bucket, names_in, one_store, store  # noqa: F401
from tests.support.held_out import NO_PROMPT, score_set


def picture(color, size=(8, 8)):
  return Picture.of(Image.new("RGB", size, color))


def sample(question, *pictures, answer="red"):
  return Shown(
    question=question, answer=answer, prediction="<b>re\u0301d", scores={"accuracy": 0.5}, pictures=pictures
  )


@pytest.mark.parametrize(
  ("size", "shown"), [((900, 300), (448, 149)), ((20, 1000), (9, 448)), ((30, 20), (30, 20))]
)
def test_a_picture_is_a_small_jpeg_named_by_its_content(size, shown):
  ours = picture("red", size)
  with Image.open(io.BytesIO(ours.content)) as opened:
    assert opened.format == "JPEG" and opened.size == shown
  assert ours.name == picture("red", size).name != picture("blue", size).name
  # Nothing but the name is held in memory.
  assert dataclasses.asdict(ours) == {"name": ours.name}
  array = np.asarray(Image.new("RGB", size, "red"))
  assert Picture.of(array).name == ours.name and ours.name.startswith("pictures/") and len(ours.name) == 29


def check_files(folder, names_of, monkeypatch):
  written = []
  whole = module.write_whole
  monkeypatch.setattr(
    module, "write_whole", lambda path, content: (written.append(path.name), whole(path, content))
  )
  red, blue = picture("red"), picture("blue")
  files = ShownFiles(folder)
  files.write(3, "vqa", [sample("what?", red), sample("what?", red, blue, answer=["red", "blue"])])
  # A start after this one does not write them again, either.
  ShownFiles(folder).write(6, "vqa", [sample("what?", blue)])
  pictures = sorted(picture.name for picture in (red, blue))
  assert names_of(folder / "evaluations") == ["3/vqa.jsonl", "6/vqa.jsonl", *pictures]
  assert sorted(name for name in written if name.endswith("jpg")) == [name[9:] for name in pictures]
  lines = (folder / "evaluations/3/vqa.jsonl").read_text(encoding="utf-8").splitlines()
  assert json.loads(lines[1]) == {
    "question": "what?",
    "answer": ["red", "blue"],
    "prediction": "<b>re\u0301d",
    "scores": {"accuracy": 0.5},
    "pictures": [red.name, blue.name],
  }
  assert (folder / "evaluations" / red.name).read_bytes() == red.content


def test_files_of_shown_samples(tmp_path, monkeypatch):
  def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

  check_files(tmp_path, names_of, monkeypatch)


@one_store
def test_files_of_shown_samples_in_a_bucket(bucket, monkeypatch):  # noqa: F811
  check_files(path_of(bucket) / "run", lambda folder: names_in(str(folder)), monkeypatch)


def test_the_same_samples_are_chosen_each_time():
  chosen = chosen_lines(1000, 5, seed=1)
  assert len(chosen) == 5 and chosen == chosen_lines(1000, 5, seed=1) != chosen_lines(1000, 5, seed=2)
  assert max(chosen) < 1000
  assert chosen_lines(3, 5, 0) == chosen_lines(3, -1, 0) == {0, 1, 2} and chosen_lines(3, 0, 0) == set()
  assert EvalConfig().show == 0


def test_a_question_is_read_without_its_marks():
  assert without_marks("<image>\nWhat <b>is</b> it?") == "What <b>is</b> it?"
  assert without_marks("<video>\nWho?") == "Who?"


def test_answers_are_shown_with_their_scores():
  asked = [
    Question(NO_PROMPT, "red", {}, text="which?", pictures=(picture("red"),)),
    Question(NO_PROMPT, "red", {}, text="not shown"),
    Question(NO_PROMPT, "red", {}, text="no picture", pictures=()),
  ]
  first, last = score_set(asked, [" blue", "red", "red "]).shown
  assert (first.question, first.answer, first.prediction) == ("which?", "red", "blue")
  assert first.scores == {"accuracy": 0.0} and first.pictures == (picture("red"),)
  assert last.question == "no picture" and last.scores == {"accuracy": 1.0} and last.pictures == ()


def test_writers_of_metrics_get_what_is_shown(tmp_path):
  training = TrainingArguments(disable_tqdm=True)
  writers = open_writers(TrackedRun(training=training, output_dir=tmp_path), total_steps=4, terms={})
  told = []

  class Table(type(writers[-1]).__mro__[1]):
    def predictions(self, step, set_name, shown):
      told.append((step, set_name, shown))

  log = RunLog(training, tmp_path, total_steps=4, epoch_of=float, gauges=None, writers=[*writers, Table()])
  log.add_predictions(2, "vqa", [sample("what?")])
  assert told == [(2, "vqa", [sample("what?")])]
  assert (tmp_path / "evaluations/2/vqa.jsonl").is_file()
