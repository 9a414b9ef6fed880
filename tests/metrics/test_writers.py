"""Writers of metrics: those that are there, and one more."""

from types import SimpleNamespace

import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import WRITERS, open_writers
from internvl_jax.metrics.writers.console import LogLines

SERVICE = """
from internvl_jax.metrics.writers import Writer


class Service(Writer):
  def __init__(self, training, output_dir):
    self.told = [("opened", training.report_to, output_dir.name)]

  def start(self, step):
    self.told.append(("started", step))

  def add_entry(self, entry):
    self.told.append(("entry", entry))

  def close(self):
    self.told.append(("closed",))
    raise OSError("cannot be reached")
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
  """A writer of a service as a user would add it: a file with a class, and a line of the table."""
  (tmp_path / "service_of_a_test.py").write_text(SERVICE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(WRITERS, "service", "service_of_a_test:Service")


def test_a_service_is_a_file_and_a_line(tmp_path, service):
  """What fails when it is closed does not keep the others from being closed."""
  training = TrainingArguments(report_to="service", disable_tqdm=True)
  writers = open_writers(training, tmp_path / "out", total_steps=4, terms={})
  (added,) = [writer for writer in writers if type(writer).__name__ == "Service"]
  closed = []
  last = SimpleNamespace(
    start=lambda step: None, add_entry=lambda entry: None, close=lambda: closed.append(1)
  )
  options = {
    "total_steps": 4,
    "epoch_of": float,
    "gauges": SimpleNamespace(),
    "writers": [last, *writers, last],
  }
  log, scores = RunLog(training, tmp_path, **options), {"step": 3, "eval_accuracy": 0.5}
  log.start(2)
  log.record(scores)
  with pytest.raises(OSError, match="cannot be reached"):
    log.__exit__()
  assert added.told == [("opened", "service", "out"), ("started", 2), ("entry", scores), ("closed",)]
  assert len(closed) == 2


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
