"""Writers of metrics: those that are there, one more, and trackers that fail."""

import sys
import threading
from types import SimpleNamespace

import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TRACKERS, TrackedRun, Tracker, background, open_writers, scalars
from internvl_jax.metrics.writers.console import LogLines
from internvl_jax.metrics.writers.ids import TrackerIds

SERVICE = """
from internvl_jax.metrics.writers import Writer

made, broken = [], []


class Service(Writer):
  def __init__(self, run):
    self.told = [("opened", run.name, dict(run.config), list(run.tags), run.ids.get("service"))]
    made.append(self)
    run.ids.keep("service", "id 1")

  def start(self, step):
    self.told.append(("started", step))

  def add_entry(self, entry):
    if broken:
      broken.pop()()
    self.told.append(("entry", entry))

  def save_results(self, results):
    self.told.append(("results", results))

  def fail(self, error):
    self.told.append(("failed", str(error)))

  def close(self):
    self.told.append(("closed",))
"""

SCORES = {"step": 3, "eval_accuracy": 0.5}


@pytest.fixture
def service(tmp_path, monkeypatch):
  """A writer of a service as a user would add it, a file with a class, and a line of the table; the file as a module."""
  (tmp_path / "service_of_a_test.py").write_text(SERVICE)
  monkeypatch.syspath_prepend(tmp_path)
  tracker = Tracker(writer="service_of_a_test:Service", package="service_of_a_test")
  monkeypatch.setitem(TRACKERS, "service", tracker)
  (tmp_path / "out").mkdir()
  import service_of_a_test  # pyright: ignore[reportMissingImports]

  yield service_of_a_test
  sys.modules.pop("service_of_a_test")


def log_of(tmp_path, *others):
  training = TrainingArguments(report_to="service", run_name="mine", disable_tqdm=True)
  run = TrackedRun(training=training, output_dir=tmp_path / "out", config={"a": {"b": 1}}, tags=("new",))
  writers = [*others, *open_writers(run, total_steps=4, terms={}), *others]
  gauges = SimpleNamespace()
  return RunLog(training, tmp_path, total_steps=4, epoch_of=float, gauges=gauges, writers=writers)


def test_a_service_is_a_file_and_a_line(tmp_path, service):
  with log_of(tmp_path) as log:
    with log.steps():
      log.start(2)
      log.record(SCORES)
    log.save_results(num_samples=4)
  (made,) = service.made
  opened, started, entry, (kind, results), closed = made.told
  assert opened == ("opened", "mine", {"a": {"b": 1}}, ["new"], None)
  assert (started, entry, closed) == (("started", 2), ("entry", SCORES), ("closed",))
  assert (kind, results["train_samples"]) == ("results", 4)
  assert log.remarks() == []


def test_a_run_that_fails_says_so_and_its_id_is_kept(tmp_path, service):
  def run_that_fails():
    with log_of(tmp_path):
      raise ValueError("no good")

  with pytest.raises(ValueError, match="no good"):
    run_that_fails()
  with log_of(tmp_path):
    pass
  first, second = service.made
  assert first.told[-2:] == [("failed", "no good"), ("closed",)]
  assert second.told[0][-1] == "id 1"


def test_a_tracker_that_fails_is_off_and_the_run_goes_on(tmp_path, service, caplog):
  def unreachable():
    raise ConnectionError("no route to host\nsecond line")

  service.broken.append(unreachable)
  with caplog.at_level("WARNING", logger="absl"), log_of(tmp_path) as log:
    for _ in range(3):
      log.record(SCORES)
  assert len(log.history) == 3 and [told[0] for told in service.made[0].told] == ["opened"]
  remark = (
    "service failed (ConnectionError: no route to host) and lacks metrics; trainer_state.json has all of them"
  )
  assert log.remarks() == [remark]


def test_a_tracker_that_hangs_is_not_waited_for(tmp_path, service, monkeypatch):
  monkeypatch.setattr(background, "CLOSE_SECONDS", 0.05)
  hold = threading.Event()
  service.broken.append(lambda: hold.wait(60))
  with log_of(tmp_path) as log:
    log.record(SCORES)
  hold.set()
  (remark,) = log.remarks()
  assert remark.startswith("service had not taken all metrics")


def test_what_fails_when_it_is_closed_keeps_no_other_open(tmp_path, service):
  closed = []

  class Other(LogLines):
    def close(self):
      closed.append(1)
      raise OSError("disk is gone")

  with pytest.raises(OSError, match="disk is gone"), log_of(tmp_path, Other(4, {})):
    pass
  assert len(closed) == 2 and service.made[0].told[-1] == ("closed",)


def test_ids_are_kept_beside_each_other(tmp_path):
  ids = TrackerIds(tmp_path)
  assert ids.get("wandb") is None
  ids.keep("wandb", "a")
  ids.keep("mlflow", "b")
  ids.keep("wandb", "c")
  assert (TrackerIds(tmp_path).get("wandb"), ids.get("mlflow")) == ("c", "b")


def test_names_of_scalars():
  assert scalars({"step": 1, "loss": 2.0, "epoch": 0.5}) == {"train/loss": 2.0, "train/epoch": 0.5}
  assert scalars({**SCORES, "epoch": 0.5}) == {"eval/accuracy": 0.5, "eval/epoch": 0.5}


def test_an_entry_as_a_line_of_the_log():
  lines = LogLines(10, {"margin": "margin {:.2f}", "not there": "{}"})
  lines.add_step(4, "0:45:00 left")
  entry = {
    "step": 4,
    "loss": 1.5,
    "learning_rate": 2e-5,
    "margin": 0.125,
    "another term": 1.0,
    "mfu": 0.4321,
    "peak_memory_bytes": 3 << 30,
    "epoch": 0.4,
  }
  told = "step 4/10, loss 1.5000, margin 0.12, learning_rate 2e-05, MFU 43.2%, 3.0 GiB at most, 0:45:00 left"
  assert lines.line(entry) == told
