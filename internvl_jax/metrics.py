"""What a run tells about itself: the log history, TensorBoard, the progress bar and throughput."""

import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tensorboardX import SummaryWriter
from tqdm import tqdm

from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import BatchCounts
from internvl_jax.intervals import Best, Due
from internvl_jax.mfu import UsefulFlops
from internvl_jax.outputs import CHECKPOINTS, write_json
from internvl_jax.storage.paths import AnyPath, Mirror, path_of

_TEXTS = {
  "loss": "loss {:.4f}",
  "rewards/accuracies": "rewards/accuracies {:.3f}",
  "rewards/margins": "rewards/margins {:.3g}",
  "grad_norm": "grad_norm {:.3g}",
  "learning_rate": "learning_rate {:.3g}",
  "skipped_steps": "{} steps skipped",
  "seconds_per_step": "{:.3g} s a step",
  "data_seconds_per_step": "{:.3g} of it waiting for data",
  "compute_seconds_per_step": "{:.3g} computing",
  "supervised_tokens_per_second": "{:,.0f} supervised tokens/s",
  "tiles_per_second": "{:,.1f} tiles/s",
  "mfu": "MFU {:.1%}",
}


@dataclasses.dataclass(frozen=True)
class StepTimes:
  """Where the time of a step went.

  Attributes:
    whole: seconds from the end of the step before to the end of this one.
    data: of them, seconds in which the devices had nothing to do because the batch was not there yet.
    compute: seconds in which they computed.
  """

  whole: float
  data: float
  compute: float


class StepClock:
  """Measures steps that overlap: the host is a step ahead of the devices, so its own waits are not theirs."""

  def __init__(self):
    """A clock that has not seen the start of any step."""
    self._last: float | None = None

  def restart(self, now: float | None) -> None:
    """Lets the next step begin now; None: leaves it out, since what came before is not over."""
    self._last = now

  def times(self, *, fetched_in: float, dispatched: float, done: float) -> StepTimes | None:
    """The times of the step that is done; None if its start was not seen.

    Args:
      fetched_in: seconds that the host waited for the batch.
      dispatched: when the step was handed to the devices.
      done: when they were through with it.
    """
    start, self._last = self._last, done
    if start is None:
      return None
    idle = max(0.0, dispatched - start)
    return StepTimes(done - start, min(idle, fetched_in), done - max(dispatched, start))


@dataclasses.dataclass(frozen=True)
class Gauges:
  """What turns counts and seconds into rates.

  Attributes:
    useful: FLOPs that a batch needs.
    peak: FLOP/s of all devices together; None where it is not known.
    devices: this host's, to ask for their memory.
  """

  useful: UsefulFlops
  peak: float | None
  devices: Sequence[Any]

  def peak_memory(self) -> int | None:
    """Most bytes that were ever in use on one of this host's devices; None where the backend does not tell."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self.devices]
    return max((value for value in found if value is not None), default=None)


class _Window:
  """Sums over the steps since the last log entry."""

  def __init__(self):
    self.losses: list[float] = []
    self.terms: dict[str, list[float]] = {}
    self.skipped = 0
    self.steps = 0
    self.supervised = self.tiles = self.flops = 0.0
    self.whole = self.data = self.compute = 0.0

  def add_times(self, counts: BatchCounts, times: StepTimes, useful: UsefulFlops) -> None:
    self.steps += 1
    self.supervised += float(counts.supervised)
    self.tiles += float(counts.image_tokens) / useful.tokens_per_tile
    self.flops += useful.of(counts)
    self.whole += times.whole
    self.data += times.data
    self.compute += times.compute

  def rates(self, gauges: Gauges) -> dict[str, Any]:
    """The entries of the log that tell how fast it goes."""
    if not self.steps:
      return {}
    found = {
      "supervised_tokens_per_second": self.supervised / self.whole,
      "tiles_per_second": self.tiles / self.whole,
      "seconds_per_step": self.whole / self.steps,
      "data_seconds_per_step": self.data / self.steps,
      "compute_seconds_per_step": self.compute / self.steps,
    }
    if gauges.peak is not None:
      found["mfu"] = self.flops / self.whole / gauges.peak
    return found


class RunLog:
  """Collects the metrics of steps and hands them out: log history, TensorBoard, bar, log lines.

  The history has the schema of Hugging Face's trainer_state.json: `loss` is the mean over the steps since
  the last entry (over those that were not skipped), and so are the objective's terms; `grad_norm` that of the last step, `learning_rate` the value
  after the scheduler's update.
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
    writes: bool = True,
  ):
    """Opens the writers that `training.report_to` asks for.

    Args:
      training: logging settings.
      output_dir: the run's directory.
      total_steps: length of the run.
      epoch_of: passes over the data after that many steps.
      gauges: what rates are made of.
      best: what the best model is known by; None where it is not looked for.
      writes: whether this is the one process of the run that writes; the others only keep the history.
    """
    self._training = training
    self._output_dir = output_dir
    self._total_steps = total_steps
    self.epoch = epoch_of
    self._due = Due(training=training, total_steps=total_steps, epoch_of=epoch_of)
    self._best = best
    self._gauges = gauges
    self._writes = writes
    self._window = _Window()
    self._bar: tqdm | None = None
    self.history: list[dict[str, Any]] = []
    self.skipped_in_a_row = 0
    self._started = 0, time.perf_counter()
    # Of the steps whose time says something: not of those that a program was compiled for.
    self._timed_steps, self._timed_seconds = 0, 0.0
    self._last_loss = ""
    board = path_of(training.logging_dir) if training.logging_dir else output_dir / "tensorboard"
    self._board = Board(board) if writes and training.report_to == "tensorboard" else None

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.close()
    if self._board is not None:
      self._board.close()

  def start(self, step: int) -> None:
    """Begins (or goes on) at that step and shows the bar."""
    self._started = step, time.perf_counter()
    self._bar = tqdm(
      total=self._total_steps,
      initial=step,
      unit="step",
      disable=self._training.disable_tqdm or not self._writes,
      dynamic_ncols=True,
      mininterval=0.5,
      # Its own guess of what is left would count the compilation as a step.
      bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )

  def add(self, step: int, metrics: Any, *, next_rate: float, times: StepTimes | None) -> None:
    """Takes in a step, and writes an entry when one is due.

    Args:
      step: steps taken, this one included.
      metrics: its `StepMetrics`, read from the device.
      next_rate: learning rate of the next step.
      times: how long it took; None leaves it out of the rates (it held a compilation).
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
    assert self._bar is not None
    told = [text for text in (self._left(step), self._last_loss) if text]
    self._bar.set_postfix_str(", ".join(told), refresh=False)
    self._bar.update()
    if self._due.logs(step):
      self._write(step, float(metrics.grad_norm), next_rate)

  def _write(self, step: int, grad_norm: float, learning_rate: float) -> None:
    window, self._window = self._window, _Window()
    entry: dict[str, Any] = {
      "loss": float(np.mean(window.losses)) if window.losses else None,
      "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
      "learning_rate": learning_rate,
      **{name: float(np.mean(values)) for name, values in window.terms.items()},
      "epoch": self.epoch(step),
      "step": step,
      "skipped_steps": window.skipped or None,
      **window.rates(self._gauges),
      "peak_memory_bytes": self._gauges.peak_memory(),
    }
    entry = {key: value for key, value in entry.items() if value is not None}
    self.record(entry)
    self._last_loss = f"loss {entry.get('loss', math.nan):.4f}"
    if self._writes:
      logging.info("%s", self._line(entry))

  def _left(self, step: int) -> str:
    """How long the rest of the run takes at the speed so far, without evaluations and saves; "" while not known."""
    if not self._timed_steps or step >= self._total_steps:
      return ""
    seconds = (self._total_steps - step) * self._timed_seconds / self._timed_steps
    return f"{datetime.timedelta(seconds=round(seconds))} left"

  def _line(self, entry: dict[str, Any]) -> str:
    """An entry as a line of the log."""
    parts = [f"step {entry['step']}/{self._total_steps}"]
    for key, text in _TEXTS.items():
      if key in entry:
        parts.append(text.format(entry[key]))
    if "peak_memory_bytes" in entry:
      parts.append(f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB at most")
    if left := self._left(entry["step"]):
      parts.append(left)
    return ", ".join(parts)

  def record(self, entry: dict[str, Any]) -> None:
    """Appends an entry to the history and to TensorBoard."""
    self.history.append(entry)
    if self._board is not None:
      self._board.add(entry)

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
    """Goes on from a checkpoint's log; entries written after it are dropped."""
    history = list(state["log_history"])
    if not all(isinstance(entry["step"], int) for entry in history):
      raise ValueError("an entry of its log has no step")
    self.history, self._window.losses = history, list(map(float, state["pending"]))
    # Checkpoints of earlier versions do not have these.
    self._window.skipped = state.get("pending_skipped", 0)
    self._window.terms = {name: list(values) for name, values in state.get("pending_terms", {}).items()}
    self.skipped_in_a_row = state.get("skipped_in_a_row", 0)

  def write_trainer_state(self, step: int, data_counters: dict[str, Any]) -> None:
    """Writes trainer_state.json in Hugging Face's schema, with the data's counters beside it."""
    if not self._writes:
      return
    training, due = self._training, self._due
    saved = {entry["step"] for entry in self.history if due.saves(entry["step"])} | {self._total_steps}
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
      "max_steps": self._total_steps,
      "num_train_epochs": math.ceil(self.epoch(self._total_steps)),
      "save_steps": due.save_steps,
      "train_batch_size": training.per_device_train_batch_size,
      "data": data_counters,
    }
    write_json(self._output_dir / "trainer_state.json", state)

  def write_train_results(self, *, num_samples: int) -> None:
    """Writes train_results.json under Hugging Face's names.

    `train_loss` is the mean over all steps of the run, those before a restart included; what is told of time is of
    the steps since. Where there are none, since the run ended before it had written all, what is there stays, and
    otherwise nothing is told of time.

    Args:
      num_samples: of an epoch.
    """
    first, start = self._started
    last = self.history[-1]["step"] if self.history else 0
    path = self._output_dir / "train_results.json"
    if not self._writes or not self.history or (last <= first and path.exists()):
      return
    results = {
      "epoch": self.epoch(last),
      "train_loss": self._mean_loss(),
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
    write_json(path, results)

  def tell_skipped(self) -> None:
    """Tells, at the end of a run, how many of its steps changed nothing, where some did."""
    skipped, total = self.skipped_steps, self._total_steps
    if skipped and self._writes:
      logging.warning(
        "%d of %d steps were skipped, since loss or gradient was not finite: the model is what the other %d made of it",
        *(skipped, total, total - skipped),
      )

  def _mean_loss(self) -> float | None:
    """The mean over the steps that were not skipped; None if there are none."""
    total = steps = before = 0
    for entry in self.history:
      if "learning_rate" not in entry:
        continue  # Scores of an evaluation.
      taken, before = entry["step"] - before - entry.get("skipped_steps", 0), entry["step"]
      if taken:
        total, steps = total + taken * entry["loss"], steps + taken
    return total / steps if steps else None


class Board:
  """TensorBoard's files; those for a bucket are kept here, too, and sent again when they have grown."""

  def __init__(self, folder: AnyPath):
    """Opens a file; each start of a run has one of its own."""
    self._stack = contextlib.ExitStack()
    self._mirror = self._stack.enter_context(Mirror.of(folder))
    self._writer = SummaryWriter(str(self._mirror.folder))

  def add(self, entry: dict[str, Any]) -> None:
    """Writes an entry of the history."""
    prefix = "eval" if any(key.startswith("eval_") for key in entry) else "train"
    for key, value in entry.items():
      if key != "step":
        self._writer.add_scalar(f"{prefix}/{key.removeprefix('eval_')}", value, entry["step"])
    if self._mirror.is_due():
      self._writer.flush()
      self._mirror.send()

  def close(self) -> None:
    """Writes what is left."""
    self._writer.close()
    self._stack.close()


class Trace:
  """An XProf trace of some steps, for TensorBoard's profile plugin."""

  def __init__(self, folder: AnyPath, steps: Sequence[int]):
    """Sets it up.

    Args:
      folder: where it goes.
      steps: the first and the last step, counted from 1; empty for no trace.
    """
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._running = False
    self._stack = contextlib.ExitStack()

  def before(self, step: int) -> None:
    """The step is about to be handed to the devices."""
    if self._first <= step <= self._last and not self._running:
      jax.profiler.start_trace(str(self._stack.enter_context(Mirror.of(self._folder)).folder))
      self._running = True

  def after(self, step: int) -> None:
    """The devices are through with the step."""
    if self._running and step >= self._last:
      self.stop()

  def stop(self) -> None:
    """Writes the trace, if one is being made."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      self._stack.close()
      logging.info("Wrote a trace to %s", self._folder)
