"""A run that is watched: held-out sets are scored during it, the best checkpoint is exported, and `evaluate` agrees."""

import json

import pytest

from tests.support import forked
from tests.support.toy import CURVE, log_history, run_training, train_command

SETS = {
  "easy": {"annotation": "train.jsonl", "root": "", "metrics": ["exact_match", "anls"]},
  "held": {"annotation": "train.jsonl", "root": "", "metrics": "loss", "repeat_time": 0.5},
}
SETTINGS = (
  *("eval.limit=6", "eval.max_new_tokens=2", "eval.batch_size=4", "eval.show=2", "loader.tile_buckets=(16,)"),
  *("training.max_steps=4", "training.eval_strategy=steps", "training.eval_steps=2", "training.save_steps=2"),
  *("training.load_best_model_at_end=True", "training.metric_for_best_model=held/loss"),
  *("training.greater_is_better=True", "training.save_total_limit=1", "training.eval_on_start=True"),
)


@pytest.fixture(scope="module")
def sets_file(tmp_path_factory):
  """Names files of another folder."""
  folder, data = tmp_path_factory.mktemp("sets"), CURVE / "data"
  entries = {
    name: {**entry, "annotation": str(data / entry["annotation"]), "root": str(data)}
    for name, entry in SETS.items()
  }
  (folder / "sets.json").write_text(json.dumps(entries))
  return folder / "sets.json"


@pytest.fixture(scope="module")
def watched(sets_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp("watched")
  done = run_training(folder, folder / "out", f"eval.annotation={sets_file}", *SETTINGS)
  assert done.returncode == 0, done.stderr
  return folder / "out"


def test_sets_are_scored_during_a_run(watched):
  """The worst loss, which is asked for as the best, is that of step 2: its model is kept and exported."""
  scores = [entry for entry in log_history(watched) if "learning_rate" not in entry]
  assert [entry["step"] for entry in scores] == [0, 2, 4]
  names = {"eval_easy/exact_match", "eval_easy/anls", "eval_held/loss"}
  changes = {f"{name}_change" for name in names}
  assert scores[0].keys() == names | {"epoch", "step"}
  assert scores[1].keys() == scores[2].keys() == names | changes | {"epoch", "step"}
  for entry in scores[1:]:
    assert all(entry[f"{name}_change"] == entry[name] - scores[0][name] for name in names)
  losses = [entry["eval_held/loss"] for entry in scores]
  assert losses[0] > losses[1] > losses[2] > 1
  state = json.loads((watched / "trainer_state.json").read_text())
  assert (state["best_global_step"], state["best_metric"]) == (2, losses[1])
  assert sorted(path.name for path in (watched / "checkpoints").iterdir()) == ["2", "4"]
  results = json.loads((watched / "eval_results.json").read_text())
  change = {"loss_change": losses[1] - losses[0]}
  assert results["held"] == {"loss": losses[1], **change, "num_questions": 6, "by_group": {}}
  assert results["easy"]["anls"] == scores[1]["eval_easy/anls"] and results["easy"]["num_questions"] == 6


def test_the_same_samples_are_shown_at_every_evaluation(watched):
  shown = {}
  for step in (0, 2, 4):
    for name in SETS:
      lines = (watched / f"evaluations/{step}/{name}.jsonl").read_text().splitlines()
      shown[step, name] = [json.loads(line) for line in lines]
  questions = {
    tuple(line["question"] for line in lines) for (_, name), lines in shown.items() if name == "easy"
  }
  assert len(questions) == 1 and len(*questions) == 2
  pictures = {picture for lines in shown.values() for line in lines for picture in line["pictures"]}
  assert pictures == {f"pictures/{path.name}" for path in (watched / "evaluations/pictures").iterdir()}
  assert {line["prediction"] for line in shown[2, "held"]} == {""} and shown[2, "held"][0][
    "scores"
  ].keys() == {"loss"}
  assert shown[2, "easy"][0]["scores"].keys() == {"exact_match", "anls"}


def test_the_command_gives_the_same_scores(watched, sets_file, tmp_path):
  _, environment = train_command(tmp_path, tmp_path)
  arguments = [
    "-m",
    "internvl_jax.evaluate",
    f"--model={watched}",
    f"--annotation={sets_file}",
    f"--output={tmp_path}",
  ]
  arguments += ["--limit=6", "--max_new_tokens=2", "--batch_size=4"]
  done = forked.run(arguments, environment=environment, folder=tmp_path)
  assert done.returncode == 0, done.stderr
  ours, theirs = (json.loads((folder / "eval_results.json").read_text()) for folder in (tmp_path, watched))
  # Which model a run began with, only the run knows.
  known = {name: value for name, value in theirs["easy"].items() if not name.endswith("_change")}
  assert ours["easy"] == known != theirs["easy"]
  assert ours["held"]["loss"] == pytest.approx(theirs["held"]["loss"], rel=1e-5)
  assert json.loads(done.stdout) == ours
  assert (tmp_path / "predictions.jsonl").read_text() == (watched / "predictions.jsonl").read_text()
