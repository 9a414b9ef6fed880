"""Compares a recording with what this program computes, stage by stage, in the order in which a number arises."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from internvl_jax.certify import model_checks, sample_checks
from internvl_jax.certify.findings import Finding, Status
from internvl_jax.certify.ours import Ours
from internvl_jax.certify.recording import Recording

FOLLOWS = "follows from the stages above"


def compare(recording: Recording, ours: Ours, tolerance: float) -> list[Finding]:
  """The findings of all stages.

  Args:
    recording: theirs.
    ours: the same checkpoint and mixture here.
    tolerance: largest relative difference of activations, logits and losses.

  Raises:
    UserError: the recording is of another mixture or checkpoint.
  """
  samples = [ours.sample(entry["dataset"], entry["line"]) for entry in recording.manifest["samples"]]
  found = sample_checks.check(recording, samples, ours.tokenizer, ours.data.normalize_type)
  runs = model_checks.run_samples(recording, ours)
  model = [
    *model_checks.check_activations(recording, ours, runs, tolerance),
    *model_checks.check_predictions(recording, runs, tolerance),
    model_checks.check_gradients(recording, ours),
    model_checks.check_packed(recording, ours, tolerance),
    *model_checks.check_update(recording, ours, tolerance),
  ]
  return [*found, *_with_consequences(model)]


def _with_consequences(findings: list[Finding]) -> Iterator[Finding]:
  """Findings about the model, where those that have no cause of their own are said to follow from an earlier one."""
  departed = False
  for finding in findings:
    if finding.status is Status.DEPARTS and departed and not finding.cause:
      finding = dataclasses.replace(finding, cause=FOLLOWS)
    # What decays, and what AdamW does to given gradients, follows from nothing.
    departed = departed or finding.status is Status.DEPARTS
    yield finding


def first_departure(findings: list[Finding]) -> Finding | None:
  """The first stage that departs; None where none does."""
  return next((finding for finding in findings if finding.status is Status.DEPARTS), None)


def largest_difference(findings: list[Finding]) -> float:
  """The largest relative difference of the stages that agree."""
  found = [f.difference for f in findings if f.status is Status.AGREES and f.difference is not None]
  return float(np.max(found)) if found else 0.0
