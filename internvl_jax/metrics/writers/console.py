"""Metrics on the terminal: a progress bar, and a line of the log for each entry."""

import math
from collections.abc import Mapping
from typing import Any

from absl import logging
from tqdm import tqdm

from internvl_jax.metrics.writers import Writer

_LOSS = {"loss": "loss {:.4f}"}

_TEXTS = {
  "grad_norm": "grad_norm {:.3g}",
  "learning_rate": "learning_rate {:.3g}",
  "skipped_steps": "{} steps skipped",
  "seconds_per_step": "{:.3g} s a step",
  "data_seconds_per_step": "{:.3g} of it waiting for data",
  "compute_seconds_per_step": "{:.3g} computing",
  "supervised_tokens_per_second": "{:,.0f} supervised tokens/s",
  "tiles_per_second": "{:,.1f} tiles/s",
  "mfu": "MFU {:.1%}",
  "save_pause_seconds": "{:.2g} s of pause for a save",
}


class ProgressBar(Writer):
  """The progress of the run, how long it still takes, and the last loss that was logged."""

  def __init__(self, total_steps: int, *, disable: bool):
    """Sets it up; `start` shows it."""
    self._total_steps, self._disable = total_steps, disable
    self._last_loss = ""
    self.bar: tqdm | None = None

  def start(self, step: int) -> None:
    """Shows the bar."""
    self.bar = tqdm(
      total=self._total_steps,
      initial=step,
      unit="step",
      disable=self._disable,
      dynamic_ncols=True,
      mininterval=0.5,
      # Its own guess of what is left would count the compilation as a step.
      bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )

  def add_step(self, step: int, remaining: str) -> None:
    """Moves the bar by a step."""
    assert self.bar is not None
    self.bar.set_postfix_str(", ".join(filter(None, (remaining, self._last_loss))), refresh=False)
    self.bar.update()

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Keeps the loss, to show it from the next step on."""
    if "learning_rate" in entry:
      self._last_loss = f"loss {entry.get('loss', math.nan):.4f}"

  def end_steps(self) -> None:
    """Leaves the bar as it is."""
    if self.bar is not None:
      self.bar.close()


class LogLines(Writer):
  """A line of the log for each entry; scores are logged by what computes them."""

  def __init__(self, total_steps: int, terms: Mapping[str, str]):
    """Sets it up; `terms` are the task's own metrics to show, as `tasks.task.Task.shown_terms` has them."""
    self._total_steps, self._remaining = total_steps, ""
    self._texts = {**_LOSS, **terms, **_TEXTS}

  def add_step(self, step: int, remaining: str) -> None:
    """Keeps how long the run still takes, for the next line."""
    self._remaining = remaining

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Logs the entry."""
    if "learning_rate" in entry:
      logging.info("%s", self.line(entry))

  def line(self, entry: dict[str, Any]) -> str:
    """The entry as a line of the log."""
    parts = [f"step {entry['step']}/{self._total_steps}"]
    parts += [text.format(entry[key]) for key, text in self._texts.items() if key in entry]
    if "peak_memory_bytes" in entry:
      parts.append(f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB at most")
    if self._remaining:
      parts.append(self._remaining)
    return ", ".join(parts)
