"""Held-out sets: what `eval.annotation` may name, and what is wrong with what it names."""

import json

import pytest

from internvl_jax.arguments import EvalConfig
from internvl_jax.config_checks import problems
from internvl_jax.config_paths import path_problems
from internvl_jax.data.source.records import open_records
from internvl_jax.data.where import DataError
from internvl_jax.eval.sets import first_score, read_sets
from tests.support.configurations import sound_config

LINE = {
  "image": "a.png",
  "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Two files of lines, in a folder that is not the working directory."""
  (tmp_path / "data/images").mkdir(parents=True)
  (tmp_path / "data/images/a.png").write_bytes(b"")
  for name in ("vqa.jsonl", "docs.jsonl"):
    (tmp_path / "data" / name).write_text(json.dumps(LINE) + "\n")
  monkeypatch.chdir(tmp_path)
  return tmp_path / "data"


def sets(annotation, **settings):
  return read_sets(EvalConfig(annotation=annotation, **settings))


def test_one_file_is_a_set_without_a_name(files):
  (found,) = sets(
    "data/my vqa.test.jsonl", root="images", group_field="kind", metrics=("anls", "loss", "anls")
  )
  assert (found.name, found.label, found.metrics, found.group_field) == (
    "my_vqa",
    "",
    ("anls", "loss"),
    "kind",
  )
  spec = found.spec()
  assert (spec.name, spec.root, spec.annotation) == ("eval.annotation", "images", "data/my vqa.test.jsonl")
  assert sets(None) == () and first_score(EvalConfig()) is None
  assert first_score(EvalConfig(annotation="a.jsonl")) == "accuracy"


@pytest.mark.parametrize("inline", [False, True])
def test_several_sets(files, inline):
  """Of a file, paths are meant from its folder, as in a meta file; of JSON, from the working directory."""
  folder = "data/" if inline else ""
  named = {
    "vqa": {"annotation": f"{folder}vqa.jsonl", "root": f"{folder}images", "metrics": "vqa_accuracy"},
    "docs": f"{folder}docs.jsonl",
    "all": {"annotation": f"{folder}vqa.jsonl", "root": "", "repeat_time": 0.5, "data_augment": True},
  }
  annotation = json.dumps(named)
  if not inline:
    (files / "sets.json").write_text(annotation)
    annotation = "data/sets.json"
  vqa, docs, every = sets(annotation, root=f"{folder}images", metrics=("anls",), group_field="kind")
  assert [found.name for found in (vqa, docs, every)] == ["vqa", "docs", "all"]
  assert (vqa.label, vqa.metrics, docs.metrics) == ("vqa/", ("vqa_accuracy",), ("anls",))
  for found in (vqa, docs):
    assert (found.spec().annotation, found.spec().root) == (f"data/{found.name}.jsonl", "data/images")
  assert every.spec().lines_used(10) == 5 and not every.spec().data_augment
  assert vqa.generates and first_score(EvalConfig(annotation=annotation)) == "vqa/vqa_accuracy"


def test_a_set_of_several_files_has_their_lines_in_order(files):
  (both,) = sets('{"both": ["data/vqa.jsonl", "data/docs.jsonl"]}', root="data/images")
  spec = both.spec()
  records = open_records(spec.annotation, spec.name, key=spec.key)
  assert len(records) == 2 and records.where(1).file.endswith("docs.jsonl") and spec.root == "data/images"


@pytest.mark.parametrize("text", ["[1]", json.dumps(LINE), json.dumps(LINE) + "\n" + json.dumps(LINE), "{"])
def test_a_json_file_of_lines_is_one_set(files, text):
  (files / "lines.json").write_text(text)
  (found,) = sets("data/lines.json")
  assert found.label == ""


@pytest.mark.parametrize(
  ("annotation", "cause"),
  [
    ('{"a": 3}', "set 'a': expected a file, a list of files or an object with 'annotation', got 3"),
    ('{"a": {"root": ""}}', "expected a file"),
    ('{"a/b": "a.jsonl"}', "set 'a/b': its name is one of files and scores"),
    ('{"a": {"annotation": "a.jsonl", "metrics": ["anl"]}}', "there is no metric 'anl'; did you mean 'anls'"),
    ('{"a": {"annotation": "a.jsonl", "metrics": []}}', "'metrics' must be a list of metrics"),
    ('{"a": {"annotation": "a.jsonl", "group_field": 3}}', "'group_field' must be a string"),
    ('{"a": "b.jsonl"', "broken JSON"),
    ("{}", "names no set"),
  ],
)
def test_what_names_no_sets(annotation, cause):
  with pytest.raises(DataError, match=cause.replace("[", r"\[")):
    sets(annotation)


def test_files_of_sets_are_looked_for_when_they_are_opened(files):
  (found,) = sets('{"a": "gone.jsonl"}')
  with pytest.raises(DataError, match=r"dataset 'eval.annotation a': annotation file not found"):
    found.spec()
  (found,) = sets('{"a": {"annotation": "data/vqa.jsonl", "metric": "anls"}}')
  with pytest.raises(DataError, match="unknown key 'metric'"):
    found.spec()


def checked(folder, **settings):
  config = sound_config(folder)
  for name, value in settings.items():
    setattr(config.eval, name, value)
  config.training.eval_strategy = config.training.save_strategy = "epoch"
  config.training.load_best_model_at_end = True
  return config


def test_sets_are_checked_before_anything_heavy(tmp_path):
  (line,) = problems(checked(tmp_path, annotation='{"a": "b.jsonl"}', metrics=("anlz",)))
  assert "set 'a': 'metrics': there is no metric 'anlz'; did you mean 'anls'" in line


@pytest.mark.parametrize(
  ("metric", "known"), [("a/anls", True), ("eval_c/loss_red", True), ("c/loss", True), ("anls", False)]
)
def test_the_best_may_be_known_by_a_score_of_any_set(tmp_path, metric, known):
  named = {
    "a": {"annotation": "b", "metrics": "anls"},
    "c": {"annotation": "d", "metrics": "loss", "group_field": "x"},
  }
  config = checked(tmp_path, annotation=json.dumps(named))
  config.training.metric_for_best_model = metric
  found = problems(config)
  assert (found == []) if known else "it has a/anls, c/loss, c/loss_GROUP" in found[0]


def test_names_of_sets_are_no_paths(tmp_path):
  config = checked(tmp_path, annotation='{"a": "b.jsonl"}')
  assert not list(path_problems(config, "train"))
  config.eval.annotation = "none.jsonl"
  assert "no such file" in next(path_problems(config, "train"))
