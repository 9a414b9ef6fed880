"""The log history of a run, and the entries that are made of its steps."""

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from internvl_jax.arguments import TrainingArguments
from internvl_jax.eval.shown import Shown
from internvl_jax.intervals import Best, Due
from internvl_jax.metrics.gauges import Gauges, StepTimes, Window
from internvl_jax.metrics.writers import Writer
from internvl_jax.outputs import CHECKPOINTS
from internvl_jax.storage.paths import AnyPath


class RunLog:
  """Collects the metrics of steps, and passes entries to the writers; a context manager that closes them.

  The history has the schema of Hugging Face's trainer_state.json: `loss` is the mean over the steps since the last
  entry (over those that were not skipped), and so are the objective's terms; `grad_norm` that of the last step,
  `learning_rate` the value after the scheduler's update.

  Attributes:
    history: its entries.
    epoch: function of the steps taken -> passes over the data.
    total_steps: length of the run.
    skipped_in_a_row: how many steps were skipped since the last one that was not.
  """

  def __init__(
    self,
    training: TrainingArguments,
    output_dir: AnyPath,
    *,
    total_steps: int,
    epoch_of: Callable[[int], float],
    gauges: Gauges,
    best: Best | None = None,
    writers: Sequence[Writer] = (),
  ):
    """Sets it up.

    Args:
      training: logging settings.
      output_dir: the run's directory.
      total_steps: length of the run.
      epoch_of: passes over the data after that many steps.
      gauges: what rates are made of.
      best: what the best model is known by; None where it is not looked for.
      writers: who gets the metrics; none on processes that only keep the history.
    """
    self._training = training
    self._output_dir = output_dir
    self.total_steps = total_steps
    self.epoch = epoch_of
    self._due = Due(training=training, total_steps=total_steps, epoch_of=epoch_of)
    self._best = best
    self._gauges = gauges
    self._writers = writers
    self._window = Window()
    self.history: list[dict[str, Any]] = []
    self.skipped_in_a_row = 0
    self._started = 0, time.perf_counter()
    # Of the steps whose time counts: not of those that a program was compiled for.
    self._timed_steps, self._timed_seconds = 0, 0.0

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)
        if error is not None:
          stack.callback(writer.fail, error)

  @contextlib.contextmanager
  def steps(self) -> Iterator[None]:
    """The body takes the steps; writers are told when it is over, also after an error."""
    try:
      yield
    finally:
      for writer in self._writers:
        writer.end_steps()

  def start(self, step: int) -> None:
    """Starts, or resumes, after `step` steps."""
    self._started = step, time.perf_counter()
    for writer in self._writers:
      writer.start(step)

  def add(self, step: int, metrics: Any, *, next_rate: float, times: StepTimes | None) -> None:
    """Adds a step, and an entry when one is due.

    Args:
      step: steps taken, this one included.
      metrics: its `StepMetrics`, read from the device.
      next_rate: learning rate of the next step.
      times: how long it took; None leaves it out of the rates (it included a compilation).
    """
    if metrics.skipped:
      self._window.skipped += 1
      self.skipped_in_a_row += 1
    else:
      self._window.losses.append(float(metrics.loss))
      for name, value in metrics.terms.items():
        self._window.terms.setdefault(name, []).append(float(value))
      self.skipped_in_a_row = 0
    if times is not None:
      self._window.add_times(metrics.counts, times, self._gauges.useful)
      self._timed_steps, self._timed_seconds = self._timed_steps + 1, self._timed_seconds + times.whole
    for writer in self._writers:
      writer.add_step(step, self._remaining(step))
    if self._due.logs(step):
      self.record(self._entry(step, float(metrics.grad_norm), next_rate))

  def add_save(self, pause: float) -> None:
    """Adds the seconds that the devices had nothing to do because of a save; writing it takes longer, beside them."""
    self._window.save_pause += pause

  def _entry(self, step: int, grad_norm: float, learning_rate: float) -> dict[str, Any]:
    """The entry of the steps since the last one; a new window begins."""
    window, self._window = self._window, Window()
    entry: dict[str, Any] = {
      "loss": float(np.mean(window.losses)) if window.losses else None,
      "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
      "learning_rate": learning_rate,
      **{name: float(np.mean(values)) for name, values in window.terms.items()},
      "epoch": self.epoch(step),
      "step": step,
      "skipped_steps": window.skipped or None,
      **window.rates(self._gauges),
      "save_pause_seconds": window.save_pause or None,
      "peak_memory_bytes": self._gauges.peak_memory(),
    }
    return {key: value for key, value in entry.items() if value is not None}

  def _remaining(self, step: int) -> str:
    """How long the rest of the run takes at the speed so far, without evaluations and saves; "" while not known."""
    if not self._timed_steps or step >= self.total_steps:
      return ""
    seconds = (self.total_steps - step) * self._timed_seconds / self._timed_steps
    return f"{datetime.timedelta(seconds=round(seconds))} left"

  def record(self, entry: dict[str, Any]) -> None:
    """Appends an entry to the history, and passes it to the writers."""
    self.history.append(entry)
    for writer in self._writers:
      writer.add_entry(entry)

  def add_predictions(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Passes samples of a held-out set that are shown at an evaluation to the writers."""
    for writer in self._writers:
      writer.predictions(step, set_name, shown)

  @property
  def start_scores(self) -> dict[str, float]:
    """The scores of the model before the first step (`training.eval_on_start`), by their names; empty where there are none."""
    entries = (entry for entry in self.history if entry["step"] == 0 and "learning_rate" not in entry)
    return {name: value for name, value in next(entries, {}).items() if name.startswith("eval_")}

  def is_scored(self, step: int) -> bool:
    """Whether the history has scores of the model after that step."""
    return any(entry["step"] == step and "learning_rate" not in entry for entry in self.history)

  def best_step(self, among: Collection[int]) -> int | None:
    """The one of these steps whose model has the best score; None where it is not looked for, or none was scored."""
    found = self._best.of(self.history, among) if self._best else None
    return found[0] if found else None

  @property
  def skipped_steps(self) -> int:
    """Steps of the whole run that changed nothing, those before a restart included."""
    return sum(entry.get("skipped_steps", 0) for entry in self.history) + self._window.skipped

  def skipped_remark(self) -> str | None:
    """How many steps of the run changed nothing; None where all did."""
    skipped, total = self.skipped_steps, self.total_steps
    if not skipped:
      return None
    return (
      f"{skipped} of {total} steps were skipped, since loss or gradient was not finite: the model is what the other "
      f"{total - skipped} made of it"
    )

  def remarks(self) -> list[str]:
    """What to tell at the end of the run, a line each; once the log is closed."""
    remarks = [self.skipped_remark(), *(writer.remark() for writer in self._writers)]
    return [remark for remark in remarks if remark is not None]

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON values."""
    return {
      "log_history": self.history,
      "pending": self._window.losses,
      "pending_terms": self._window.terms,
      "pending_skipped": self._window.skipped,
      "skipped_in_a_row": self.skipped_in_a_row,
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Resumes from a checkpoint's log; entries written after it are dropped."""
    history = list(state["log_history"])
    if not all(isinstance(entry["step"], int) for entry in history):
      raise ValueError("an entry of its log has no step")
    self.history, self._window.losses = history, list(map(float, state["pending"]))
    # Checkpoints of earlier versions do not have these.
    self._window.skipped = state.get("pending_skipped", 0)
    self._window.terms = {name: list(values) for name, values in state.get("pending_terms", {}).items()}
    self.skipped_in_a_row = state.get("skipped_in_a_row", 0)

  def save_state(self, step: int, data_counters: dict[str, Any]) -> None:
    """Passes the run's state to the writers, by the names of Hugging Face's trainer_state.json.

    Args:
      step: steps taken.
      data_counters: of each dataset, what became of its samples; written under "data".
    """
    training, due = self._training, self._due
    saved = {entry["step"] for entry in self.history if due.saves(entry["step"])} | {self.total_steps}
    best = self._best.of(self.history, saved) if self._best else None
    state = {
      "best_global_step": best[0] if best else None,
      "best_metric": best[1] if best else None,
      "best_model_checkpoint": str(self._output_dir / CHECKPOINTS / str(best[0])) if best else None,
      "epoch": self.epoch(step),
      "eval_steps": None if training.eval_steps is None else due.eval_steps,
      "global_step": step,
      "is_hyper_param_search": False,
      "is_local_process_zero": True,
      "is_world_process_zero": True,
      "log_history": self.history,
      "logging_steps": due.logging_steps,
      "max_steps": self.total_steps,
      "num_train_epochs": math.ceil(self.epoch(self.total_steps)),
      "save_steps": due.save_steps,
      "train_batch_size": training.per_device_train_batch_size,
      "data": data_counters,
    }
    for writer in self._writers:
      writer.save_state(state)

  def save_results(self, *, num_samples: int) -> None:
    """Passes the run's results to the writers, by the names of Hugging Face's train_results.json.

    `train_loss` is the mean over all steps of the run, those before a restart included; times are those of the steps
    since. Where there are none, since the run ended before it had written all, there are no times.

    Args:
      num_samples: of an epoch.
    """
    first, start = self._started
    if not self.history:
      return
    last = self.history[-1]["step"]
    results = {
      "epoch": self.epoch(last),
      "train_loss": _mean_loss(self.history),
      "train_samples": num_samples,
    }
    if last > first:
      seconds = time.perf_counter() - start
      samples = num_samples * (self.epoch(last) - self.epoch(first))
      results["train_runtime"] = seconds
      results["train_samples_per_second"] = samples / seconds
      results["train_steps_per_second"] = (last - first) / seconds
    if skipped := self.skipped_steps:
      results["skipped_steps"] = skipped
    for writer in self._writers:
      writer.save_results(results)


def _mean_loss(history: Sequence[dict[str, Any]]) -> float | None:
  """The mean over the steps that were not skipped; None if there are none."""
  total = steps = before = 0
  for entry in history:
    if "learning_rate" not in entry:
      continue  # Scores of an evaluation.
    taken, before = entry["step"] - before - entry.get("skipped_steps", 0), entry["step"]
    if taken:
      total, steps = total + taken * entry["loss"], steps + taken
  return total / steps if steps else None
