"""Writers of metrics: each gets what a run measures and writes it in its own form.

A service is added by a file here, with a class that has the methods of `Writer` (from which it may inherit those that do
nothing), and a line in `WRITERS`.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from internvl_jax.arguments import TrainingArguments
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

  def close(self) -> None:
    """Writes what is left; also after an error."""


WRITERS: dict[str, str] = {
  "tensorboard": "internvl_jax.metrics.writers.tensorboard:TensorBoard",
}
"""Value of `training.report_to` -> "module:class"; a class is made from (training, output_dir).

By name, so that a service's library is imported by the runs alone that report to it.
"""


def open_writers(
  training: TrainingArguments, output_dir: AnyPath, *, total_steps: int, terms: Mapping[str, str]
) -> list[Writer]:
  """The writers of a run: JSON files, shown samples, log lines and a progress bar always, and the service that is asked for.

  Args:
    training: `report_to` names the service, `disable_tqdm` leaves out the bar.
    output_dir: the run's directory.
    total_steps: length of the run.
    terms: the task's own metrics that log lines show: name -> text with a format.
  """
  from internvl_jax.metrics.writers.console import LogLines, ProgressBar
  from internvl_jax.metrics.writers.json_files import JsonFiles
  from internvl_jax.metrics.writers.shown_files import ShownFilesWriter

  writers: list[Writer] = [JsonFiles(output_dir), ShownFilesWriter(output_dir)]
  if training.report_to in WRITERS:
    module, _, name = WRITERS[training.report_to].partition(":")
    writers.append(getattr(importlib.import_module(module), name)(training, output_dir))
  writers.append(ProgressBar(total_steps, disable=training.disable_tqdm))
  writers.append(LogLines(total_steps, terms))
  return writers
