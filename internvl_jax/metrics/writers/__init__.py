"""Writers of metrics: each gets what a run measures and writes it in its own form.

A tracker is added by a file here, with a class that has the methods of `Writer` (from which it may inherit those that do
nothing), and a line in `TRACKERS`. It is made and called on a thread of its own (background.py), so it may take its time,
and what it raises turns it off with a warning and ends no run.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from internvl_jax.arguments import TrainingArguments
from internvl_jax.metrics.writers.ids import TrackerIds
from internvl_jax.storage.paths import AnyPath

if TYPE_CHECKING:
  from internvl_jax.eval.shown import Shown  # The table below is read before anything heavy.


class Writer(Protocol):
  """Takes the metrics of a run; only on the process that writes the run's files. All methods do nothing by default."""

  def start(self, step: int) -> None:
    """The run starts, or resumes, after `step` steps."""

  def add_step(self, step: int, remaining: str) -> None:
    """A step is done.

    Args:
      step: steps taken, this one included.
      remaining: how long the rest of the run takes, as "0:45:00 left"; empty while not known.
    """

  def add_entry(self, entry: dict[str, Any]) -> None:
    """An entry of the log history: means over some steps (it has a "learning_rate"), or scores ("eval_...")."""

  def predictions(self, step: int, set_name: str, shown: "Sequence[Shown]") -> None:
    """Samples of a held-out set that are shown at an evaluation (`eval.show`), always the same ones.

    Args:
      step: steps taken.
      set_name: of the held-out set.
      shown: question, pictures, wanted answer, prediction and scores of each.
    """

  def save_state(self, state: dict[str, Any]) -> None:
    """A checkpoint was asked for: the run's state by the names of Hugging Face's trainer_state.json."""

  def save_results(self, results: dict[str, Any]) -> None:
    """The run is over: its results by the names of Hugging Face's train_results.json."""

  def end_steps(self) -> None:
    """The last step of this start is taken, also after an error; results and scores may follow."""

  def fail(self, error: BaseException) -> None:
    """The run ends by an error; `close` follows."""

  def close(self) -> None:
    """Writes what is left; also after an error."""

  def remark(self) -> str | None:
    """What to tell at the end of the run, a line; asked after `close`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracker:
  """A tracker that `training.report_to` may name.

  Attributes:
    writer: "module:class"; a class is made from a `TrackedRun`. By name, so that a tracker's library is imported by the
      runs alone that report to it.
    package: what it imports; the package's extra that brings it along has the tracker's name.
  """

  writer: str
  package: str


_ROOM = "internvl_jax.metrics.writers"

TRACKERS: dict[str, Tracker] = {
  "tensorboard": Tracker(writer=f"{_ROOM}.tensorboard:TensorBoard", package="tensorboardX"),
  "wandb": Tracker(writer=f"{_ROOM}.wandb_run:WeightsAndBiases", package="wandb"),
  "mlflow": Tracker(writer=f"{_ROOM}.mlflow_run:MLflow", package="mlflow"),
  "trackio": Tracker(writer=f"{_ROOM}.trackio_run:Trackio", package="trackio"),
}
"""Name in `training.report_to` -> the tracker."""


def is_installed(name: str) -> bool:
  """Whether the library of a tracker can be imported; imports nothing."""
  return importlib.util.find_spec(TRACKERS[name].package) is not None


def trackers_named(report_to: str) -> list[str]:
  """The trackers that `training.report_to` asks for, each once.

  As in Hugging Face's Trainer: "all" is each that is installed, "none" is none.

  Args:
    report_to: names with commas between.
  """
  names = dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip())
  if "all" in names:
    return [name for name in TRACKERS if is_installed(name)]
  return [name for name in names if name != "none"]


def report_problems(report_to: str) -> Iterator[str]:
  """What speaks against a value of `training.report_to`, a line each."""
  field = f"training.report_to={report_to!r}"
  names = [name.strip() for name in report_to.split(",")]
  if unknown := [name for name in names if name not in (*TRACKERS, "none", "all")]:
    known = ", ".join((*TRACKERS, "all", "none"))
    yield f"{field}: {unknown[0]!r} is no tracker; one or several, with commas between, of {known}"
    return
  if len(names) > 1 and (alone := [name for name in names if name in ("all", "none")]):
    yield f"{field}: {alone[0]!r} stands alone"
    return
  for name in trackers_named(report_to):
    if not is_installed(name):
      yield (
        f"{field} needs the package {TRACKERS[name].package}, which is not installed: pip install 'internvl_jax[{name}]'"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedRun:
  """What trackers are told of a run before it starts.

  Attributes:
    training: `run_name`, `project`, `logging_dir`.
    output_dir: the run's directory.
    config: all settings, as JSON values without secrets.
    tags: words to find it by.
  """

  training: TrainingArguments
  output_dir: AnyPath
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tags: Sequence[str] = ()

  @property
  def ids(self) -> TrackerIds:
    """Its ids at trackers, of the starts before this one."""
    return TrackerIds(self.output_dir)

  @property
  def name(self) -> str:
    """What it is called: `training.run_name`, or its directory's name."""
    return self.training.run_name or self.output_dir.absolute().name

  def project(self, variable: str) -> str:
    """What it belongs to: `training.project`, or what the tracker's own variable of the environment says."""
    return self.training.project or os.environ.get(variable) or "internvl_jax"


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
  """The values of an entry of the log, named train/... or eval/...; its step is left out."""
  prefix = "eval" if any(key.startswith("eval_") for key in entry) else "train"
  return {f"{prefix}/{key.removeprefix('eval_')}": value for key, value in entry.items() if key != "step"}


def open_writers(run: TrackedRun, *, total_steps: int, terms: Mapping[str, str]) -> list[Writer]:
  """The writers of a run: JSON files, shown samples, log lines and a progress bar always, and the trackers that are asked for.

  Args:
    run: `training.report_to` names the trackers, `training.disable_tqdm` leaves out the bar.
    total_steps: length of the run.
    terms: the task's own metrics that log lines show: name -> text with a format.
  """
  from internvl_jax.metrics.writers.background import Background
  from internvl_jax.metrics.writers.console import LogLines, ProgressBar
  from internvl_jax.metrics.writers.json_files import JsonFiles, LogFiles
  from internvl_jax.metrics.writers.shown_files import ShownFilesWriter

  writers: list[Writer] = [
    JsonFiles(run.output_dir),
    LogFiles(run.output_dir),
    ShownFilesWriter(run.output_dir),
  ]
  writers += [Background(name, TRACKERS[name].writer, run) for name in trackers_named(run.training.report_to)]
  writers.append(ProgressBar(total_steps, disable=run.training.disable_tqdm))
  writers.append(LogLines(total_steps, terms))
  return writers
