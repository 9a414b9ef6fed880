"""Compares what the model computes: activations, logits, losses, gradients, a packed row, an update.

Ours runs on the recorded ids, labels and pixels, so that a difference of samples does not look like one of the model.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.certify import causes
from internvl_jax.certify.activations import STAGES, first_departure, said_part
from internvl_jax.certify.findings import Finding, Status, absent
from internvl_jax.certify.ours import Ours, Rows
from internvl_jax.certify.recording import Arrays, Recording
from internvl_jax.certify.taps import names_in_order, picks_of

_GRADIENTS = 1e-3
"""Of a parameter's gradient: sums over thousands of tokens, in another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What ours computes on a recorded sample; its logits, which are large, are not kept.

  Attributes:
    activations: norms and rows of every part.
    difference: the largest relative difference of its logits from theirs.
    token: the first place that has more than half of it.
    losses: of the tokens that predict a label: by the number of places from a token to the label that it is compared with,
      of which 1 is right.
  """

  activations: Arrays
  difference: float
  token: int
  losses: Mapping[int, np.ndarray]


def run_samples(recording: Recording, ours: Ours) -> list[Run]:
  """Runs the model on all recorded samples."""
  found = []
  for number, theirs in enumerate(recording.samples):
    picks = picks_of(recording.activations(number)) if number in recording.deep else None
    logits, activations = ours.run(Rows.of([theirs]), picks)
    logits = logits[0, : len(theirs["input_ids"])]
    difference, token = compare_predictions(logits, theirs) if len(theirs["places"]) else (0.0, 0)
    losses = {shift: token_losses(logits, theirs["labels"], shift) for shift in (0, 1, 2)}
    kept = activations if picks else {}
    found.append(Run(activations=kept, difference=difference, token=token, losses=losses))
  return found


def check_activations(
  recording: Recording, ours: Ours, runs: Sequence[Run], tolerance: float
) -> list[Finding]:
  """A finding for each of the vision tower, the projector, the language model and the output embedding."""
  found: dict[str, Finding] = {}
  for number in recording.deep:
    for finding in _of_sample(recording, ours, number, runs[number].activations, tolerance):
      known = found.get(finding.stage)
      if known is None or (known.status is Status.AGREES and finding.status is Status.DEPARTS):
        found[finding.stage] = finding
      elif known.status is finding.status:
        largest = max(known.difference or 0.0, finding.difference or 0.0)
        found[finding.stage] = dataclasses.replace(known, difference=largest)
  return list(found.values())


def _of_sample(
  recording: Recording, ours: Ours, number: int, mine: Arrays, tolerance: float
) -> Iterator[Finding]:
  """The findings of one sample."""
  theirs = recording.activations(number)
  parts, before, departed = names_in_order(theirs), 0.0, False
  for prefix, stage in STAGES.items():
    chosen = [part for part in parts if part.split(".")[0] == prefix]
    if not chosen:  # A sample without images.
      continue
    departure, largest = first_departure(mine, theirs, chosen, tolerance, before)
    before = max(before, largest)
    finding = Finding(
      stage=stage,
      status=Status.AGREES,
      compared=f"{len(chosen)} parts, {len(recording.deep)} samples",
      difference=largest,
    )
    if departure is not None:
      frequencies = recording.manifest["rope_frequencies"]
      rows = Rows.of([recording.samples[number]])
      finding = dataclasses.replace(
        finding,
        status=Status.DEPARTS,
        where=f"{recording.place(number)}, {said_part(departure)}",
        cause="" if departed else causes.of_activation(departure.part, theirs, rows, ours, frequencies),
      )
      departed = True
    yield finding


# --- Predictions --------------------------------------------------------------------------------------------


def compare_predictions(logits: np.ndarray, theirs: Arrays) -> tuple[float, int]:
  """The largest relative difference of logits [S, V], and the first place that has it above half of that."""
  chosen = logits[theirs["places"]].astype(np.float64)
  largest = max(float(np.abs(theirs["top_logits"]).max()), 1e-30)
  ours = np.take_along_axis(chosen, theirs["top_ids"], axis=1)
  high = chosen.max(axis=1, keepdims=True)
  total = (np.log(np.exp(chosen - high).sum(axis=1, keepdims=True)) + high)[:, 0]
  apart = np.abs(ours - theirs["top_logits"]).max(axis=1)
  apart = np.maximum(apart, np.abs(total - theirs["logsumexp"]))
  full = theirs["full_logits"]
  apart[: len(full)] = np.maximum(apart[: len(full)], np.abs(chosen[: len(full)] - full).max(axis=1))
  apart = np.where(np.isfinite(apart), apart, np.inf) / largest
  return float(apart.max()), int(theirs["places"][np.argmax(apart >= apart.max() / 2)])


def token_losses(logits: np.ndarray, labels: np.ndarray, shift: int = 1) -> np.ndarray:
  """Cross-entropy of the label so many places on, where there is one: logits [S, V], labels [S] not shifted -> [n]."""
  targets = np.pad(labels, (0, shift), constant_values=IGNORE_INDEX)[shift:]
  places = np.flatnonzero(targets != IGNORE_INDEX)
  chosen = logits[places].astype(np.float64)
  high = chosen.max(axis=1, initial=-np.inf)
  total = np.log(np.exp(chosen - high[:, None]).sum(axis=1)) + high
  return total - chosen[np.arange(len(places)), targets[places]]


def check_predictions(recording: Recording, runs: Sequence[Run], tolerance: float) -> list[Finding]:
  """Findings about the logits of all samples, their losses, and the loss of the micro-batch."""
  count = sum(len(theirs["places"]) for theirs in recording.samples)
  finding = Finding(
    stage="logits",
    status=Status.AGREES,
    compared=f"{count:,} supervised tokens, {len(recording.samples)} samples",
    difference=max(run.difference for run in runs),
  )
  departing = next((number for number, run in enumerate(runs) if run.difference > tolerance), None)
  if departing is not None:
    where = f"{recording.place(departing)}, token {runs[departing].token}"
    finding = dataclasses.replace(finding, status=Status.DEPARTS, where=where)
  return [finding, _check_losses(recording, runs, tolerance), _check_batch_loss(recording, runs, tolerance)]


def _check_losses(recording: Recording, runs: Sequence[Run], tolerance: float) -> Finding:
  theirs = np.array([float(sample["loss"]) for sample in recording.samples])
  ours = np.array([run.losses[1].mean() if len(run.losses[1]) else np.nan for run in runs])
  supervised = np.flatnonzero([len(run.losses[1]) > 0 for run in runs])
  if not len(supervised):
    return absent("loss", "no sample has a supervised token")
  apart = np.abs(ours - theirs)[supervised] / np.abs(theirs[supervised]).max()
  apart = np.where(np.isfinite(apart), apart, np.inf)
  finding = Finding(
    stage="loss",
    status=Status.AGREES,
    compared=f"{len(supervised)} samples",
    difference=float(apart.max()),
  )
  if apart.max() <= tolerance:
    return finding
  number = int(supervised[np.argmax(apart > tolerance)])
  cause = causes.of_loss(theirs[number], [runs[number].losses], [recording.samples[number]], tolerance)
  return dataclasses.replace(
    finding,
    status=Status.DEPARTS,
    where=f"{recording.place(number)}: {theirs[number]:.6f} in theirs, {ours[number]:.6f} in ours",
    cause=cause,
  )


def _check_batch_loss(recording: Recording, runs: Sequence[Run], tolerance: float) -> Finding:
  stage = "loss of a micro-batch"
  if "batch_loss" not in recording.manifest:
    return absent(stage, recording.why_absent("gradients"))
  theirs = float(recording.manifest["batch_loss"])
  losses = [runs[number].losses for number in recording.deep]
  tokens = np.concatenate([loss[1] for loss in losses])
  ours = float(tokens.mean()) if len(tokens) else np.nan
  apart = abs(ours - theirs) / abs(theirs)
  finding = Finding(
    stage=stage,
    status=Status.AGREES,
    compared=f"{len(losses)} samples, mean of {len(tokens):,} tokens",
    difference=apart,
  )
  if apart <= tolerance:
    return finding
  return dataclasses.replace(
    finding,
    status=Status.DEPARTS,
    where=f"{theirs:.6f} in theirs, {ours:.6f} in ours",
    cause=causes.of_loss(theirs, losses, [recording.samples[n] for n in recording.deep], tolerance),
  )


# --- A packed row -------------------------------------------------------------------------------------------


def check_packed(recording: Recording, ours: Ours, tolerance: float) -> Finding:
  """The finding about a row of segments that do not see each other."""
  stage, theirs = "packed row", recording.packed
  if theirs is None:
    return absent(stage, recording.why_absent("packed"))
  samples = [recording.samples[number] for number in recording.deep]
  rows = Rows.packed(theirs, samples)
  _, mine = ours.run(rows, picks_of(theirs))
  departure, largest = first_departure(mine, theirs, names_in_order(theirs), tolerance)
  finding = Finding(
    stage=stage,
    status=Status.AGREES,
    compared=f"{len(samples)} segments, {len(theirs['input_ids']):,} tokens",
    difference=largest,
  )
  if departure is None:
    return finding
  return dataclasses.replace(
    finding,
    status=Status.DEPARTS,
    where=f"segment {int(theirs['segments'][departure.token])}, {said_part(departure)}",
    cause=causes.of_packed(departure.token, departure.part, theirs, rows, ours),
  )


# --- Gradients and an update --------------------------------------------------------------------------------

SKETCHES, _BLOCK = 8, 65521


@functools.cache
def _signs() -> np.ndarray:
  # The recorder's legacy generator, whose numbers never change.
  return 2.0 * np.random.RandomState(0).randint(0, 2, (SKETCHES, _BLOCK)) - 1


def sketch(x: np.ndarray) -> np.ndarray:
  """Eight projections of an array, by the formula of the recorder's docstring."""
  flat = x.reshape(-1).astype(np.float64)
  if flat.size > _BLOCK:
    flat = np.pad(flat, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK).sum(0)
  return _signs()[:, : len(flat)] @ flat


def _apart(ours: Mapping[str, np.ndarray], theirs: Arrays, rename: Mapping[str, str]) -> dict[str, float]:
  """The relative difference of every tensor, by its name in the tables; order is theirs."""
  floor = 1e-6 * float(np.linalg.norm(theirs["norm"]))
  found = {}
  for name, norm, projections in zip(theirs["names"], theirs["norm"], theirs["sketch"], strict=True):
    key = rename[str(name)]
    if key not in ours:
      continue
    scale = max(float(norm), floor)
    difference = np.sqrt(np.mean((sketch(ours[key]) - projections) ** 2)) / scale
    difference = max(difference, abs(float(np.linalg.norm(ours[key].astype(np.float64))) - norm) / scale)
    if (full := theirs.get(f"full:{name}")) is not None and full.shape == ours[key].shape:
      difference = max(difference, float(np.linalg.norm(ours[key] - full)) / scale)
    found[key] = float(difference) if np.isfinite(difference) else np.inf
  return found


def _sketches(
  ours: Mapping[str, np.ndarray], theirs: Arrays, rename: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
  """The sketches of the tensors that both have [parameters, SKETCHES]."""
  both = [
    (ours[rename[str(name)]], projections)
    for name, projections in zip(theirs["names"], theirs["sketch"], strict=True)
    if rename[str(name)] in ours
  ]
  return np.array([sketch(array) for array, _ in both]), np.array([projections for _, projections in both])


def check_gradients(recording: Recording, ours: Ours) -> Finding:
  """The finding about the gradients of the micro-batch."""
  stage, theirs = "gradients", recording.gradients
  if theirs is None:
    return absent(stage, recording.why_absent("gradients"))
  samples = [recording.samples[number] for number in recording.deep]
  mine = ours.gradients(Rows.of(samples))
  rename = {str(name): ours.tensor_name(str(name)) for name in theirs["names"]}
  apart = _apart(mine, theirs, rename)
  if not apart:
    return absent(stage, f"none of the names is known here, e.g. {theirs['names'][0]}")
  finding = Finding(
    stage=stage,
    status=Status.AGREES,
    compared=f"{len(apart)} of {len(theirs['names'])} parameters",
    difference=max(apart.values()),
  )
  departing = [name for name, difference in apart.items() if difference > _GRADIENTS]
  if not departing:
    return finding
  # Gradients come from the loss back: the last parameter is the first to depart.
  first = max(departing, key=causes.depth_of)
  return dataclasses.replace(
    finding,
    status=Status.DEPARTS,
    where=f"{first} (relative difference {apart[first]:.1e}); {len(departing)} of {len(apart)} parameters differ",
    cause=causes.of_gradients(*_sketches(mine, theirs, rename)),
  )


def check_update(recording: Recording, ours: Ours, tolerance: float) -> list[Finding]:
  """Findings about which parameters decay, and about one AdamW update."""
  theirs = recording.update
  if theirs is None:
    return [absent(stage, recording.why_absent("update")) for stage in ("weight decay", "AdamW update")]
  applies = ours.decays()
  rename = {str(name): ours.tensor_name(str(name)) for name in theirs["names"]}
  said = {
    rename[str(name)]: bool(flag) for name, flag in zip(theirs["names"], theirs["decayed"], strict=True)
  }
  said = {name: flag for name, flag in said.items() if name in applies}
  differing = [name for name, flag in said.items() if applies[name] != flag]
  decay = Finding(stage="weight decay", status=Status.AGREES, compared=f"{len(said)} parameters")
  if differing:
    known, cause = causes.of_decay(said, differing, ours)
    decay = dataclasses.replace(
      decay,
      status=Status.KNOWN if known else Status.DEPARTS,
      where=f"{differing[0]} {'decays' if said[differing[0]] else 'does not decay'} in theirs; {len(differing)} differ",
      cause=cause,
    )
  mine = ours.update(float(theirs["learning_rate"]), float(theirs["weight_decay"]))
  apart = _apart({name: mine[name] for name in said if name not in differing}, theirs, rename)
  update = Finding(
    stage="AdamW update",
    status=Status.AGREES,
    compared=f"{len(apart)} parameters",
    difference=max(apart.values()),
  )
  if update.difference is not None and update.difference > tolerance:
    first = next(name for name, difference in apart.items() if difference > tolerance)
    update = dataclasses.replace(
      update,
      status=Status.DEPARTS,
      where=f"{first} (relative difference {apart[first]:.1e})",
      cause="AdamW's betas, epsilon, bias correction or learning rate",
    )
  return [decay, update]
