"""What a run tells about itself: the log history, TensorBoard, the progress bar and throughput."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tensorboardX import SummaryWriter
from tqdm import tqdm

from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, SFTBatch
from internvl_jax.errors import UserError


def count_supervised(batch: SFTBatch) -> int:
  """Tokens of a batch that a loss is computed on."""
  return int(np.count_nonzero(batch.targets != IGNORE_INDEX))


def count_tiles(batch: SFTBatch, tokens_per_tile: int) -> int:
  """Tiles of a batch that a token refers to; padding tiles are not counted."""
  return int(np.count_nonzero(batch.image_index != NO_IMAGE)) // tokens_per_tile


class RunLog:
  """Collects the metrics of steps and hands them out: log history, TensorBoard, bar.

  The history has the schema of Hugging Face's trainer_state.json: `loss` is the mean over the steps since
  the last entry, `grad_norm` that of the last step, `learning_rate` the value after the scheduler's update.
  """

  def __init__(
    self, training: TrainingArguments, output_dir: Path, *, total_steps: int, epoch_of: Callable[[int], float]
  ):
    """Opens the writers that `training.report_to` asks for.

    Args:
      training: logging settings.
      output_dir: the run's directory.
      total_steps: length of the run.
      epoch_of: passes over the data after that many steps.
    """
    self._training = training
    self._output_dir = output_dir
    self._total_steps = total_steps
    self.epoch = epoch_of
    self._pending: list[Any] = []
    self._tokens = self._tiles = self._steps = 0
    self._window_start = time.perf_counter()
    self._bar: tqdm | None = None
    self.history: list[dict[str, Any]] = []
    board = training.logging_dir or str(output_dir / "tensorboard")
    self._writer = SummaryWriter(board) if training.report_to == "tensorboard" else None

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.close()
    if self._writer is not None:
      self._writer.close()

  def start(self, step: int) -> None:
    """Begins (or goes on) at that step: shows the bar and starts the clock."""
    self._bar = tqdm(
      total=self._total_steps,
      initial=step,
      unit="step",
      disable=self._training.disable_tqdm,
      dynamic_ncols=True,
      mininterval=0.5,
    )
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves the time until now (compiling, saving) out of the throughput."""
    self._window_start = time.perf_counter()
    self._tokens = self._tiles = self._steps = 0

  def add(self, step: int, metrics: Any, *, tokens: int, tiles: int, next_rate: float, timed: bool) -> None:
    """Takes in the metrics of a step, and writes an entry when one is due.

    Args:
      step: steps taken, this one included.
      metrics: `StepMetrics`; read from the device only when an entry is due.
      tokens, tiles: supervised tokens and tiles of the batch.
      next_rate: learning rate of the next step.
      timed: count the step in the throughput; False where it held a compilation.

    Raises:
      UserError: the loss or the gradient is not finite.
    """
    self._pending.append(metrics.loss)
    if timed:
      self._tokens, self._tiles, self._steps = self._tokens + tokens, self._tiles + tiles, self._steps + 1
    else:
      self.restart_clock()
    assert self._bar is not None
    self._bar.update()
    due = step % self._training.logging_steps == 0 or step == self._total_steps
    if due or (step == 1 and self._training.logging_first_step):
      self._write(step, float(metrics.grad_norm), next_rate)

  def _write(self, step: int, grad_norm: float, learning_rate: float) -> None:
    loss = float(np.mean([np.float64(value) for value in self._pending]))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      raise UserError(
        f"step {step}: loss={loss}, grad_norm={grad_norm}: not finite; lower training.learning_rate, or look at the "
        "batch's samples"
      )
    seconds = time.perf_counter() - self._window_start
    entry: dict[str, Any] = {
      "loss": loss,
      "grad_norm": grad_norm,
      "learning_rate": learning_rate,
      "epoch": self.epoch(step),
      "step": step,
    }
    speed = ""
    if self._steps:
      entry["supervised_tokens_per_second"] = self._tokens / seconds
      entry["tiles_per_second"] = self._tiles / seconds
      entry["seconds_per_step"] = seconds / self._steps
      speed = f", {self._tokens / seconds:,.0f} tok/s, {self._tiles / seconds:,.1f} tiles/s"
    self.record(entry)
    self._pending.clear()
    self.restart_clock()
    assert self._bar is not None
    self._bar.set_postfix_str(f"loss {loss:.4f}{speed}")

  def record(self, entry: dict[str, Any]) -> None:
    """Appends an entry to the history and to TensorBoard."""
    self.history.append(entry)
    if self._writer is not None:
      prefix = "eval" if any(key.startswith("eval_") for key in entry) else "train"
      for key, value in entry.items():
        if key != "step":
          self._writer.add_scalar(f"{prefix}/{key.removeprefix('eval_')}", value, entry["step"])

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON values."""
    return {"log_history": self.history, "pending": [float(value) for value in self._pending]}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a checkpoint's log; entries written after it are dropped."""
    self.history = list(state["log_history"])
    self._pending = list(state["pending"])

  def write_trainer_state(self, step: int, data_counters: dict[str, Any]) -> None:
    """Writes trainer_state.json in Hugging Face's schema, with the data's counters beside it."""
    training = self._training
    state = {
      "best_metric": None,
      "best_model_checkpoint": None,
      "epoch": self.epoch(step),
      "eval_steps": training.eval_steps,
      "global_step": step,
      "is_hyper_param_search": False,
      "is_local_process_zero": True,
      "is_world_process_zero": True,
      "log_history": self.history,
      "logging_steps": training.logging_steps,
      "max_steps": self._total_steps,
      "num_train_epochs": math.ceil(self.epoch(self._total_steps)),
      "save_steps": training.save_steps,
      "train_batch_size": training.per_device_train_batch_size,
      "data": data_counters,
    }
    write_json(self._output_dir / "trainer_state.json", state)


def write_json(path: Path, value: Any) -> None:
  """Writes JSON, complete or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  temporary.replace(path)
  logging.debug("wrote %s", path)
