"""Trackers' own files, written without a network and read back by their own readers, where they are installed."""

import json
import struct

import pytest
from PIL import Image

from internvl_jax.arguments import TrainingArguments
from internvl_jax.eval.shown import Picture, Shown
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TrackedRun, open_writers

ENTRIES = [{"step": step, "loss": 4.0 / step, "learning_rate": 1e-3, "epoch": step / 4} for step in (1, 2, 3)]
SCORES = {"step": 2, "eval_accuracy": 0.25, "epoch": 0.5}
LOSSES = [(1, 4.0), (2, 2.0), (2, 2.0), (3, 4.0 / 3)]
SHOWN = [
  Shown(
    question=f"What is <b>{color}</b>?",
    answer=["that", "this"],
    prediction=color,
    scores={"accuracy": 1.0},
    pictures=tuple(
      Picture.of(Image.new("RGB", (40, 20), name)) for name in (color, "blue")[: 1 + (color == "red")]
    ),
  )
  for color in ("red", "green")
]
COLUMNS = ["picture", "picture 2", "question", "answer", "prediction", "accuracy"]
CONFIG = {"training": {"learning_rate": 1e-3, "run_name": "mine"}, "data": {"meta_path": "my_meta.json"}}


def log_run(folder, tracker, entries, *, error=None):
  """A start of a run that logs the entries."""
  training = TrainingArguments(report_to=tracker, run_name="mine", project="ours", disable_tqdm=True)
  run = TrackedRun(training=training, output_dir=folder / "out", config=CONFIG, tags=("first", "try"))
  writers = open_writers(run, total_steps=4, terms={})
  options = {"total_steps": 4, "epoch_of": float, "gauges": None, "writers": writers}
  log = RunLog(training, run.output_dir, **options)
  with log:
    for entry in entries:
      log.record(entry)
    log.add_predictions(2, "held out", SHOWN)
    if error is None:
      log.save_results(num_samples=8)
    else:
      log.__exit__(type(error), error, None)
  assert log.remarks() == []


@pytest.fixture
def run_of(tmp_path, monkeypatch):
  """Logs a run in two starts, the first of which fails, so that the second repeats a step; in the folder of the test."""

  def log(tracker):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    log_run(tmp_path, tracker, [*ENTRIES[:2], SCORES], error=OSError("the machine is gone"))
    log_run(tmp_path, tracker, ENTRIES[1:])
    return json.loads((tmp_path / "out/trackers.json").read_text())[tracker]

  return log


def wandb_records(path):
  """The records of a .wandb file: W&B's messages in LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
  from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

  content, at, whole = path.read_bytes(), 7, b""
  while at + 7 <= len(content):
    if (left := 32768 - at % 32768) < 7:
      at += left
      continue
    _, length, kind = struct.unpack("<IHB", content[at : at + 7])
    whole += content[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # A record that is whole, or the last part of one.
      yield Record.FromString(whole)
      whole = b""


def test_wandb_offline(tmp_path, run_of, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
  run_id = run_of("wandb")
  files = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
  assert len(files) == 2
  records = [record for file in files for record in wandb_records(file)]
  runs = [record.run for record in records if record.HasField("run")]
  assert {(run.run_id, run.display_name, run.project, tuple(run.tags)) for run in runs} == {
    (run_id, "mine", "ours", ("first", "try"))
  }
  config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
  assert config["training"] == CONFIG["training"]
  rows = [
    {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
    for record in records
    if record.HasField("history")
  ]
  assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == LOSSES
  assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == [(2, 0.25)]
  paths = [row["predictions/held out/path"] for row in rows if row.get("predictions/held out/nrows") == 2]
  assert len(paths) == 2
  table = json.loads((files[0].parent / "files" / paths[0]).read_text())
  assert table["columns"] == COLUMNS and table["data"][0][2:] == [
    "What is <b>red</b>?",
    "that | this",
    "red",
    1.0,
  ]
  # The file lists pictures by their kind; they are in the artifact that goes with it.
  assert [row[:2] for row in table["data"]] == [["Image", "Image"], ["Image", None]]
  (first, _) = [record.artifact for record in records if record.HasField("artifact")]
  assert len([content for content in first.manifest.contents if content.path.endswith(".png")]) == 3
  assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]


def test_mlflow_in_a_file(tmp_path, run_of, monkeypatch):
  tracking = pytest.importorskip("mlflow.tracking")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  run_id = run_of("mlflow")
  client = tracking.MlflowClient()
  experiment = client.get_experiment_by_name("ours")
  (run,) = client.search_runs([experiment.experiment_id])
  assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "mine", "FINISHED")
  assert run.data.params["training.learning_rate"] == "0.001" and run.data.tags["first"] == "true"
  losses = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train/loss")]
  assert sorted(losses) == LOSSES
  assert run.data.metrics["train_samples"] == 8
  table = client.load_table(experiment.experiment_id, "predictions/held out-2.json", run_ids=[run_id])
  assert list(table.columns)[:6] == COLUMNS and list(table["prediction"]) == ["red", "green"] * 2


def test_trackio_on_this_machine(tmp_path, run_of, monkeypatch):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when it is imported.
  sqlite_storage = pytest.importorskip("trackio.sqlite_storage")
  name = run_of("trackio")
  logs = sqlite_storage.SQLiteStorage.get_logs("ours", name)
  losses = [(entry["step"], entry["train/loss"]) for entry in logs if "train/loss" in entry]
  assert sorted(losses) == LOSSES
  tables = [entry["predictions/held out"] for entry in logs if "predictions/held out" in entry]
  row = tables[0]["_value"][0]
  assert len(tables) == 2 and list(row) == COLUMNS and row["prediction"] == "red"
  assert (tmp_path / "trackio/media" / row["picture"]["file_path"]).is_file()
  config = sqlite_storage.SQLiteStorage.get_run_config("ours", name)
  assert (config["training"], config["tags"]) == (CONFIG["training"], ["first", "try"])
