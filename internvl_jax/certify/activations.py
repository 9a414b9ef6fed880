"""Where recorded activations first depart from ours."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from internvl_jax.certify.recording import Arrays
from internvl_jax.certify.taps import picks_of

_JUMP, _LEAST = 20, 2e-5
"""A part also departs where its difference is so many times the largest before it, and at least that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Departure:
  """Where activations first depart.

  Attributes:
    part: its name, as in `taps`.
    difference: the largest relative difference of a token.
    token: the first token (of all tiles, for the vision tower), or None where only rows show it.
    shape: of the part's tokens.
  """

  part: str
  difference: float
  token: int
  shape: tuple[int, ...]


def differences(ours: Arrays, theirs: Arrays, part: str) -> np.ndarray:
  """The relative difference of every token's norm, and of the rows that are whole: [tokens]."""
  norms = theirs[f"norm:{part}"].astype(np.float64)
  mine = ours[f"norm:{part}"][tuple(slice(n) for n in norms.shape)].astype(np.float64)
  scale = np.maximum(norms, 1e-3 * norms.max())
  found = (np.abs(mine - norms) / scale).ravel()
  picks = picks_of(theirs)["text" if part == "logits" else part.split(".")[0]]
  apart = np.linalg.norm(ours[f"rows:{part}"].astype(np.float64) - theirs[f"rows:{part}"], axis=-1)
  np.maximum.at(found, picks, apart / scale.ravel()[picks])
  return np.where(np.isfinite(found), found, np.inf)


def first_departure(
  ours: Arrays, theirs: Arrays, parts: Sequence[str], tolerance: float, before: float = 0.0
) -> tuple[Departure | None, float]:
  """The first part that departs, and the largest difference of all.

  Args:
    ours: activations.
    theirs: the recorded ones.
    parts: names, in the order in which they run.
    tolerance: a relative difference.
    before: the largest difference of parts that ran before.
  """
  found, largest, earlier = None, 0.0, max(before, 1e-6)
  for part in parts:
    apart = differences(ours, theirs, part)
    worst = float(apart.max())
    limit = min(tolerance, max(_LEAST, _JUMP * earlier))
    if worst > limit and found is None:
      found = Departure(
        part=part,
        difference=worst,
        token=int(np.argmax(apart > min(limit, worst / 2))),
        shape=theirs[f"norm:{part}"].shape,
      )
    earlier, largest = max(earlier, worst), max(largest, worst)
  return found, largest


STAGES = {
  "vision": "vision tower",
  "projector": "projector",
  "text": "language model",
  "logits": "output embedding",
}


_NAMES = {
  "embeddings": "its input",
  "norm1": "first norm",
  "attn": "attention",
  "norm2": "second norm",
  "mlp": "feed-forward",
  "input_layernorm": "first norm",
  "self_attn": "attention",
  "post_attention_layernorm": "second norm",
  "norm": "the last norm",
  "layer_norm": "its norm",
  "linear_1": "its first linear map",
}


def said_part(departure: Departure) -> str:
  """A part of the model in words, with the first token that departs."""
  part, *rest = departure.part.split(".")
  if rest and rest[0].isdigit():
    place = f"layer {rest[0]}, {_NAMES[rest[1]] if len(rest) > 1 else 'its output'}"
  else:
    place = _NAMES[rest[0]] if rest else "its output"
  name = STAGES[part]
  if part in ("vision", "projector"):
    tile, token = divmod(departure.token, departure.shape[-1])
    return f"{name}, {place}: tile {tile}, token {token} (relative difference {departure.difference:.1e})"
  return f"{name}, {place}: token {departure.token} (relative difference {departure.difference:.1e})"
