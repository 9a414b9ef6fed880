"""Learning rates that are not the same for all parameters: by part of the model, by names of tensors, by layers of the ViT.

All follow one schedule: a parameter's rate is training.learning_rate at that step times a constant of its own, as with the
parameter groups of a PyTorch optimizer under one scheduler. Weight decay is multiplied by it as well.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.optim.labels import ADAPTERS
from internvl_jax.trees import LAYER_RANGE, submodule_of

PARTS = {
  "vision_lr": "vision_model",
  "projector_lr": "mlp1",
  "language_lr": "language_model",
  "adapters_lr": ADAPTERS,
}
"""Field of `training` -> the label (`labels.labels_of`) of the parameters whose peak rate it is."""


def part_rates(training: TrainingArguments) -> dict[str, float | None]:
  """The peak rates of parts by field; None is training.learning_rate."""
  return {
    "vision_lr": training.vision_lr,
    "projector_lr": training.projector_lr,
    "language_lr": training.language_lr,
    "adapters_lr": training.adapters_lr,
  }


_PATTERNS = "training.lr_by_pattern"
_EXAMPLE = "'{\"mlp1\\\\..*\": 1e-4}'"


def rate_scales(
  training: TrainingArguments, labels: Mapping[str, str], names: Mapping[str, np.ndarray], num_layers: int
) -> dict[str, np.ndarray]:
  """What multiplies training.learning_rate, of the parameters for which that is not 1 throughout.

  The first pattern that matches a tensor's name from end to end says its rate. Of all others it is that of their part,
  and in the ViT times `layer_lr_decay` to the power of `_above`.

  Args:
    training: the rates.
    labels: of the parameters that train, by path (`labels.labels_of`).
    names: the checkpoint's names of these, [*lead, n]: n tensors for each layer and expert (`hf.weights.Names`).
    num_layers: of the ViT.

  Returns:
    Arrays float32 by path: [*lead], where `lead` are the parameter's first axes, which run over layers and experts; [] if
    it is the same for all of them.

  Raises:
    UserError: a rate is of a part of which nothing trains, or a pattern matches no name.
  """
  named = _named_rates(training, names)
  rates = part_rates(training)
  by_label = {
    PARTS[field]: training.learning_rate if rate is None else _checked(field, rate, labels)
    for field, rate in rates.items()
  }
  found = {}
  for path, label in labels.items():
    rate = np.asarray(by_label.get(label, training.learning_rate))
    if submodule_of(path) == "vision_model":
      rate = rate * training.layer_lr_decay ** _above(path, num_layers)
    if (own := named.get(path)) is not None:
      rate = np.where(np.isnan(own), rate.reshape(rate.shape + (1,) * (own.ndim - rate.ndim)), own)
    if (rate != training.learning_rate).any():
      rate = rate if (rate != rate.flat[0]).any() else rate.flat[0]
      found[path] = np.asarray(rate / training.learning_rate, np.float32)
  return found


def _above(path: str, num_layers: int) -> np.ndarray:
  """How many layers of the ViT come after a parameter, the one behind its last layer included; [layers] of a stack.

  Embeddings count as layer 0, layer i (from 0) as i + 1, what follows as num_layers + 1: as in BEiT and in InternVL's own code for its
  ViT (segmentation/mmcv_custom/layer_decay_optimizer_constructor.py, internvl_g's trainer_monkey_patch.py).
  """
  if span := LAYER_RANGE.search(path):
    return num_layers - np.arange(int(span[1]), int(span[2]))
  return np.asarray(num_layers + 1 if ".embeddings." in path else 0)


def _checked(field: str, rate: float, labels: Mapping[str, str]) -> float:
  """The peak rate of a part, something of which has to train."""
  if PARTS[field] not in labels.values():
    hint = " (adapters in it have training.adapters_lr)" if ADAPTERS in labels.values() else ""
    raise UserError(
      f"training.{field}={rate:g}, but of {PARTS[field]} nothing trains{hint}; remove it, or let that part train"
    )
  return rate


def _named_rates(training: TrainingArguments, names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The rates that patterns say, [*lead] by path; NaN where none matches. Paths that none matches are left out."""
  patterns = [(re.compile(text), rate) for text, rate in _patterns(training).items()]
  if not patterns:
    return {}
  matched = {key: _first_match(patterns, key) for keys in names.values() for key in keys.flat}
  for pattern, _ in patterns:
    if not any(pattern.fullmatch(key) for key in matched):
      example = next(iter(matched), "none")
      raise UserError(
        f"{_PATTERNS}: {pattern.pattern!r} matches the whole name of no tensor that trains (the first one is {example}); "
        "names are the checkpoint's"
      )
  found = {}
  for path, keys in names.items():
    rates = np.array([matched[key] for key in keys.flat]).reshape(keys.shape)
    if np.isnan(rates).all():
      continue
    if not np.array_equal(rates, np.broadcast_to(rates[..., :1], rates.shape), equal_nan=True):
      raise UserError(
        f"{_PATTERNS}: {' and '.join(keys.reshape(-1, keys.shape[-1])[0])} are one parameter here and have one rate; let a "
        "pattern match all of them"
      )
    found[path] = rates[..., 0]
  return found


def _first_match(patterns: list[tuple[re.Pattern[str], float]], key: str) -> float:
  return next((rate for pattern, rate in patterns if pattern.fullmatch(key)), np.nan)


def _patterns(training: TrainingArguments) -> dict[str, Any]:
  return json.loads(training.lr_by_pattern or "{}")


def problems(training: TrainingArguments) -> Iterator[str]:
  """What keeps the rates from being used, whatever the model is."""
  asked = [f"training.{field}={rate:g}" for field, rate in part_rates(training).items() if rate is not None]
  asked += [f"{_PATTERNS}={training.lr_by_pattern!r}"] if training.lr_by_pattern else []
  if asked and training.learning_rate == 0:
    yield (
      f"{', '.join(asked)} with training.learning_rate=0: rates follow learning_rate's schedule; set it above 0, and freeze "
      "what should not train"
    )
  try:
    patterns = _patterns(training)
  except json.JSONDecodeError:
    patterns = None
  if not isinstance(patterns, dict):
    yield f"{_PATTERNS}={training.lr_by_pattern!r} must be a JSON object of names and rates, such as {_EXAMPLE}"
    return
  for pattern, rate in patterns.items():
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < np.inf:
      yield f"{_PATTERNS}: the rate of {pattern!r} must be a number of at least 0, not {rate!r}"
    try:
      re.compile(pattern)
    except re.error as error:
      yield f"{_PATTERNS}: {pattern!r} is no regular expression: {error}"


def rates_text(scales: Mapping[str, np.ndarray], labels: Mapping[str, str], learning_rate: float) -> str:
  """The peak rates by part, for the log: "vision_model 1.4e-06 to 2e-05, mlp1 0.0002, language_model 2e-05".

  Args:
    scales: of `rate_scales`.
    labels: of the parameters that train, by path.
    learning_rate: the peak of all others.
  """
  parts = []
  for label in dict.fromkeys(labels.values()):
    rates = [
      learning_rate * scales.get(path, np.ones(())) for path, found in labels.items() if found == label
    ]
    low, high = min(map(np.min, rates)), max(map(np.max, rates))
    parts.append(f"{label} {low:.3g}" + (f" to {high:.3g}" if high > low else ""))
  return ", ".join(parts)
