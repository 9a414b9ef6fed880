"""Counters of the samples of a run, for each dataset: lost, cut, untaught; and when a loss ends the run."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging

from internvl_jax.arguments import LoaderConfig
from internvl_jax.data.load.batching import EVENTS, MicroBatch
from internvl_jax.data.sample.notes import Note
from internvl_jax.data.where import DataError

COUNTERS = ("samples", *EVENTS)

# Lost samples named in the message that ends a run.
_OFFENDERS_SHOWN = 5
# `max_bad_fraction` is judged against at least so many samples (or one epoch): otherwise a single bad file among
# the first hundred would always exceed 1 %.
_FEWEST_JUDGED = 1000


class Tally:
  """Counts of the samples handed out.

  Attributes:
    planned: int64 [datasets, COUNTERS], what the plan passed over, the same on every host; and what an earlier run
      counted.
    read: int64 [datasets, COUNTERS], what this host read.
    offenders: why the first samples were lost.
  """

  def __init__(self, datasets: Sequence[str], loader: LoaderConfig, *, hosts: int, epoch: int):
    """Begins at 0.

    Args:
      datasets: their names.
      loader: which losses end the run.
      hosts: among which samples are dealt.
      epoch: samples of an epoch.
    """
    self._names, self._loader, self._hosts, self._epoch = list(datasets), loader, hosts, epoch
    self.planned = np.zeros((len(datasets), len(COUNTERS)), np.int64)
    self.read = np.zeros_like(self.planned)
    self.offenders: list[str] = []
    self._told: set[tuple[str, str]] = set()

  @property
  def lost(self) -> int:
    """Samples of which nothing was learned, on this host and by the plan."""
    columns = [COUNTERS.index("unreadable"), COUNTERS.index("over_long")]
    return int((self.planned + self.read)[:, columns].sum())

  @property
  def untaught(self) -> int:
    """Samples without a supervised token, on this host and in what the plan passed over."""
    return int((self.planned + self.read)[:, COUNTERS.index("fully_masked")].sum())

  def summary(self) -> str:
    """One line of what this host knows of."""
    return summarize_counters(self.named(self.read))

  def tell_losses(self, before: "Tally") -> None:
    """Logs what is lost whenever its number has doubled: each is counted, and a log should stay readable."""
    if self.lost.bit_length() > before.lost.bit_length():
      logging.warning(
        "Lost samples on this host: %s. The first: %s", self.summary(), " | ".join(self.offenders)
      )

  def copy(self) -> "Tally":
    """A tally that counts on its own."""
    other = copy.copy(self)
    other.planned, other.read, other.offenders = self.planned.copy(), self.read.copy(), list(self.offenders)
    return other

  def restore(self, counters: dict[str, dict[str, int]]) -> None:
    """Goes on from the counters of an earlier run; a dataset that it did not have begins at 0."""
    for name, counts in zip(self._names, self.planned, strict=True):
      counts[:] = [counters.get(name, {}).get(counter, 0) for counter in COUNTERS]

  def named(self, read: np.ndarray) -> dict[str, dict[str, int]]:
    """Names the counts, {dataset: {counter: count}} with what all hosts read."""
    counts = (self.planned + read).tolist()
    return {
      name: dict(zip(COUNTERS, row, strict=True)) for name, row in zip(self._names, counts, strict=True)
    }

  def add_skipped(
    self, event: str, datasets: np.ndarray, reasons: Iterable[str], *, by_all: bool = True
  ) -> None:
    """Counts samples that are in no row.

    Args:
      event: what befell them.
      datasets: int [n], of each.
      reasons: why, for the first of them.
      by_all: all hosts pass over the same ones; else these are this host's.

    Raises:
      DataError: the settings say that one such ends the run.
    """
    lost = np.bincount(datasets, minlength=len(self.planned))
    counts = self.planned if by_all else self.read
    counts[:, 0] += lost
    counts[:, COUNTERS.index(event)] += lost
    self._note(event, reasons)

  def add(self, micro: MicroBatch) -> None:
    """Counts the samples of a micro-batch.

    Raises:
      DataError: the settings say that one that was lost ends the run.
    """
    self.read[:, 0] += np.bincount(micro.datasets, minlength=len(self.read))
    for column, happened in enumerate(micro.events.T, 1):
      self.read[:, column] += np.bincount(micro.datasets[happened], minlength=len(self.read))
    lost = micro.events[micro.lengths == 0]
    for event, reason in zip(lost, micro.errors, strict=True):
      self._note(EVENTS[int(event.argmax())], [reason])
    self._tell(micro.notes)

  def add_batch(self, micro_batches: Iterable[MicroBatch], before: "Tally") -> None:
    """Counts the samples of a batch; tells and judges what is lost among them.

    Args:
      micro_batches: of the batch.
      before: the counts before it.

    Raises:
      DataError: the settings say that what was lost ends the run.
    """
    for micro in micro_batches:
      self.add(micro)
    if self.lost > before.lost:
      self.judge()
      self.tell_losses(before)
    if self.untaught.bit_length() > before.untaught.bit_length():
      logging.warning("Samples without a supervised token on this host: %s", self.summary())

  def judge(self) -> None:
    """Ends the run where too many samples were lost.

    Over-long samples that loader.on_over_length="drop" is to drop are not among them.

    Raises:
      DataError: more than loader.max_bad_fraction were lost, with the first of them.
    """
    counts, judged = self._judged()
    bad, total = counts["unreadable"], counts["samples"]
    if self._loader.on_over_length != "drop":
      bad += counts["over_long"]
    if bad > self._loader.max_bad_fraction * judged:
      raise DataError(
        f"{bad} of {total} samples were lost, more than loader.max_bad_fraction={self._loader.max_bad_fraction} of "
        f"{judged}; the first: {' | '.join(self.offenders)}"
      )

  def judge_untaught(self) -> None:
    """Ends the run where too many samples had nothing to learn.

    Raises:
      DataError: more than loader.max_untaught_fraction had no supervised token.
    """
    counts, judged = self._judged()
    if counts["fully_masked"] > self._loader.max_untaught_fraction * judged:
      raise DataError(
        f"{counts['fully_masked']} of {counts['samples']} samples had no supervised token, more than "
        f"loader.max_untaught_fraction={self._loader.max_untaught_fraction} of {judged}; check that data.max_seq_length reaches "
        "the answers and that turns of 'gpt' hold them: python -m internvl_jax.doctor names the lines"
      )

  def _judged(self) -> tuple[dict[str, int], int]:
    """The counters of all hosts, as far as this one can tell, and of how many samples a share is taken."""
    # What the plan passed over is known of all samples; of the rest, this host has seen its share.
    counts = (self.planned + self._hosts * self.read).sum(0).tolist()
    return dict(zip(COUNTERS, counts, strict=True)), max(counts[0], min(self._epoch, _FEWEST_JUDGED))

  def nothing_taught(
    self, micro_batches: Sequence[MicroBatch], seen: int, rows: int, taught_hint: str
  ) -> DataError:
    """The error of a run that has had nothing to learn from.

    Args:
      micro_batches: of the last batch.
      seen: batches so far.
      rows: of a batch.
      taught_hint: what to check; see `LineSchema`.
    """
    longest = max(int(micro.lengths.max(initial=0)) for micro in micro_batches)
    which = "the first batch" if seen == 1 else f"the first {seen} batches, the last of them"
    return DataError(
      f"no token is supervised in {which}: {rows} rows of samples of up to {longest} tokens; "
      f"check {taught_hint}that data.max_seq_length reaches the answers"
      + (f"; the first that was lost: {self.offenders[0]}" if self.offenders else "")
    )

  def _tell(self, notes: Iterable[Note]) -> None:
    """Logs the first note of each kind of a dataset."""
    for note in notes:
      if (kind := (note.dataset, note.kind)) not in self._told:
        # Copies of this tally share it: what was said once need not be said again.
        self._told.add(kind)
        logging.warning("%s; this is said once a dataset", note.message)

  def _note(self, event: str, reasons: Iterable[str]) -> None:
    for reason in reasons:
      if self._ends_the_run(event):
        raise DataError(reason)
      self.offenders = [*self.offenders, reason][:_OFFENDERS_SHOWN]

  def _ends_the_run(self, event: str) -> bool:
    if event == "over_long" and self._loader.on_over_length in ("error", "drop"):
      return self._loader.on_over_length == "error"
    return event != "fully_masked" and self._loader.on_bad_sample == "error"


def untaught_samples(counters: dict[str, dict[str, Any]]) -> str | None:
  """A line that tells how many samples had nothing to learn; None if all had."""
  masked = {name: counts["fully_masked"] for name, counts in counters.items() if counts["fully_masked"]}
  if not masked:
    return None
  total = sum(counts["samples"] for counts in counters.values())
  of_each = ", ".join(f"{name} {count}" for name, count in masked.items())
  return (
    f"{sum(masked.values())} of {total} samples had nothing to learn, since no token of theirs is supervised ({of_each}); "
    "python -m internvl_jax.doctor names the lines"
  )


def summarize_counters(counters: dict[str, dict[str, Any]]) -> str:
  """One line that tells what happened to samples beyond being read; empty if nothing did."""
  parts = []
  for name, counts in counters.items():
    told = [f"{counts[event]} {event.replace('_', ' ')}" for event in EVENTS if counts[event]]
    parts += [f"{name}: {', '.join(told)} of {counts['samples']}"] if told else []
  return "; ".join(parts)
