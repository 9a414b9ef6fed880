"""Weights & Biases: https://docs.wandb.ai."""

from collections.abc import Sequence
from typing import Any

import wandb  # pyright: ignore[reportMissingImports]

from internvl_jax.eval.shown import Shown
from internvl_jax.metrics.writers import TrackedRun, Writer, scalars
from internvl_jax.metrics.writers.shown_table import shown_table


class WeightsAndBiases(Writer):
  """A run at Weights & Biases; without a network under WANDB_MODE=offline, to be sent by `wandb sync`."""

  def __init__(self, run: TrackedRun):
    """Starts the run, or resumes it by its id. WANDB_* of the environment are read, as ever."""
    self._run = wandb.init(
      project=run.project("WANDB_PROJECT"),
      name=run.name,
      tags=list(run.tags) or None,
      config=dict(run.config),
      id=run.ids.get("wandb"),
      resume="allow",
      allow_val_change=True,  # A run that resumes may have other settings.
    )
    run.ids.keep("wandb", self._run.id)
    # W&B's own step cannot go back, as that of a run does that resumes from its last checkpoint after a crash.
    self._run.define_metric("step", hidden=True)
    self._run.define_metric("*", step_metric="step")
    self._exit_code = 0

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Logs the values."""
    self._run.log({**scalars(entry), "step": entry["step"]})

  def predictions(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Logs a table."""
    columns, rows = shown_table(shown, wandb.Image)
    self._run.log({f"predictions/{set_name}": wandb.Table(columns=columns, data=rows), "step": step})

  def save_results(self, results: dict[str, Any]) -> None:
    """Adds them to the summary."""
    self._run.summary.update(results)

  def fail(self, error: BaseException) -> None:
    """The run is shown as failed."""
    del error
    self._exit_code = 1

  def close(self) -> None:
    """Waits for what is to be uploaded."""
    self._run.finish(exit_code=self._exit_code)
