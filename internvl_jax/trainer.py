"""The loop: evaluate, save, fetch, step, log, in this order.

The loader is advanced only after a save, so that a checkpoint's loader state names the very next batch.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import SFTBatch
from internvl_jax.checkpoint import Checkpointer
from internvl_jax.metrics import RunLog, count_supervised, count_tiles
from internvl_jax.optim import Schedule
from internvl_jax.state import TrainState
from internvl_jax.step import StepMetrics, TrainStep


class Loader(Protocol):
  """Where batches come from; see `data.pipeline.TrainLoader`."""

  def __next__(self) -> SFTBatch: ...
  def get_state(self) -> dict[str, Any]: ...
  def counters(self) -> dict[str, Any]: ...


@dataclasses.dataclass
class CompiledSteps:
  """The jitted step, compiled ahead of its first use for each shape of batch, and saying so.

  Attributes:
    step: what to compile.
    batch_shardings: where the fields of a batch go.
  """

  step: TrainStep
  batch_shardings: SFTBatch
  _programs: dict[tuple, Any] = dataclasses.field(default_factory=dict)

  def __call__(
    self, state: TrainState, frozen: dict[str, jax.Array], batch: SFTBatch, learning_rate: float
  ) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step with a batch of numpy arrays; the state's buffers are given away."""
    inputs = (state, frozen, jax.device_put(batch, self.batch_shardings), np.float32(learning_rate))
    shape = (batch.input_ids.shape, batch.tiles.shape)
    if shape not in self._programs:
      self._programs[shape] = self._compile(inputs)
    return self._programs[shape](*inputs)

  def knows(self, batch: SFTBatch) -> bool:
    """Whether the step is compiled for this shape of batch."""
    return (batch.input_ids.shape, batch.tiles.shape) in self._programs

  def _compile(self, inputs: tuple) -> Any:
    batch: SFTBatch = inputs[2]
    A, R, S = batch.input_ids.shape
    start = time.perf_counter()
    program = jax.jit(self.step.__call__, donate_argnums=0).lower(*inputs).compile()
    logging.info(
      "Compiled the step for %d x %d rows of %d tokens and %d tiles a shard in %.1f s",
      *(A, R, S, batch.tiles.shape[2]),
      time.perf_counter() - start,
    )
    return program


@dataclasses.dataclass(kw_only=True)
class Trainer:
  """Runs optimizer steps until the last one.

  Attributes:
    training: when to save, evaluate and stop.
    steps: the compiled step.
    schedule: the learning rate.
    loader: batches of numpy arrays.
    checkpointer: where to save.
    log: where metrics go.
    total_steps: steps of the whole run.
    tokens_per_tile: to count tiles.
    show: function of a batch -> text for the log, to see what the model is taught.
    evaluate: function (parameters, step) -> metrics to log, or None.
  """

  training: TrainingArguments
  steps: CompiledSteps
  schedule: Schedule
  loader: Loader
  checkpointer: Checkpointer
  log: RunLog
  total_steps: int
  tokens_per_tile: int
  show: Callable[[SFTBatch], str]
  evaluate: Callable[[dict[str, jax.Array], int], dict[str, float]] | None = None

  def run(self, state: TrainState, frozen: dict[str, jax.Array]) -> TrainState:
    """Trains from `state` to the last step and returns the state there; everything is saved by then."""
    first = int(state.step)
    self.log.start(first)
    for step in range(first, self.total_steps):
      if step > first:
        self._between_steps(state, frozen, step)
      batch = next(self.loader)
      if step == first:
        logging.info("First batch:\n%s", self.show(batch))
      fresh = not self.steps.knows(batch)
      state, metrics = self.steps(state, frozen, batch, self.schedule(step))
      if fresh:
        jax.block_until_ready(metrics)
      self.log.add(
        step + 1,
        metrics,
        tokens=count_supervised(batch),
        tiles=count_tiles(batch, self.tokens_per_tile),
        next_rate=self.schedule(step + 1),
        timed=not fresh,
      )
    if self.training.save_strategy != "no":
      self._save(state)
    self.log.write_trainer_state(self.total_steps, self.loader.counters())
    self.checkpointer.wait()
    return state

  def _between_steps(self, state: TrainState, frozen: dict[str, jax.Array], step: int) -> None:
    if self._evaluates_at(step):
      assert self.evaluate is not None
      scores = self.evaluate({**frozen, **state.params}, step)
      self.log.record({**scores, "epoch": self.log.epoch(step), "step": step})
      self.log.restart_clock()
    if self.training.save_strategy == "steps" and step % self.training.save_steps == 0:
      self._save(state)
      self.log.restart_clock()

  def _evaluates_at(self, step: int) -> bool:
    every = self.training.eval_steps or self.training.logging_steps
    asked = "steps" in (self.training.eval_strategy, self.training.evaluation_strategy)
    return asked and self.evaluate is not None and step % every == 0

  def _save(self, state: TrainState) -> None:
    self.checkpointer.save(state, loader=self.loader.get_state(), trainer=self.log.state())
    self.log.write_trainer_state(int(state.step), self.loader.counters())
