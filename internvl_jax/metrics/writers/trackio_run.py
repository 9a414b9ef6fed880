"""Trackio: https://huggingface.co/docs/trackio."""

from collections.abc import Sequence
from typing import Any

import trackio  # pyright: ignore[reportMissingImports]

from internvl_jax.eval.shown import Shown
from internvl_jax.metrics.writers import TrackedRun, Writer, scalars
from internvl_jax.metrics.writers.shown_table import shown_table


class Trackio(Writer):
  """A run of Trackio, on this machine, or in the Space or on the server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name."""

  def __init__(self, run: TrackedRun):
    """Creates the run, or goes on with it; Trackio knows runs by their names."""
    known = run.ids.get("trackio")
    self._run = trackio.init(
      project=run.project("TRACKIO_PROJECT"),
      name=known or run.name,
      config={**run.config, "tags": list(run.tags)},
      resume="must" if known else "never",
      embed=False,
    )
    run.ids.keep("trackio", self._run.name)

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Logs the values."""
    self._run.log(scalars(entry), step=entry["step"])

  def predictions(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Logs a table."""
    columns, rows = shown_table(shown, trackio.Image)
    self._run.log({f"predictions/{set_name}": trackio.Table(columns=columns, data=rows)}, step=step)

  def close(self) -> None:
    """Waits for what is to be sent."""
    self._run.finish()
