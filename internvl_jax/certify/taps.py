"""Activations of every part of the model: what its modules return is kept on the way.

Parts have the names that the recorder gives them: "vision.3.norm2", "projector.linear_1", "text.0.self_attn", ...
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.models.internvl import InternVL
from internvl_jax.models.layers import LayerStack

CHILDREN = {
  "vision": ("norm1", "attn", "norm2", "mlp"),
  "text": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
}
"""Parts of a layer that are watched, in the order in which they run."""


class Kept:
  """What is kept of activations: of each part the norms of all tokens, and the rows of a few.

  Attributes:
    found: the arrays, by the recorder's names.
    picks: places of the rows in the flattened tokens, by "vision", "projector" and "text".
  """

  def __init__(self, picks: Mapping[str, jax.Array]):
    """Keeps the rows at `picks`."""
    self.found: dict[str, jax.Array] = {}
    self.picks = picks

  def keep(self, name: str, x: jax.Array) -> None:
    """Keeps a part's output."""
    kind = name.split(".")[0]
    picks = self.picks["text" if kind == "logits" else kind]
    x = x.astype(jnp.float32)
    self.found[f"norm:{name}"] = jnp.linalg.norm(x, axis=-1)
    self.found[f"rows:{name}"] = x.reshape(-1, x.shape[-1])[picks]


def picks_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The places of the rows in recorded activations."""
  return {name.removeprefix("picks:"): value for name, value in arrays.items() if name.startswith("picks:")}


def names_in_order(arrays: Mapping[str, np.ndarray]) -> list[str]:
  """The parts of recorded activations in the order in which they run."""
  names = [name.removeprefix("rows:") for name in arrays if name.startswith("rows:")]
  return sorted(names, key=_order)


def _order(name: str) -> tuple[int, int, int]:
  part, *rest = name.split(".")
  depth = {"vision": 0, "projector": 1, "text": 2, "logits": 3}[part]
  if part == "projector":
    return depth, 0, ("layer_norm", "linear_1").index(rest[0]) if rest else 2
  if rest[:1] == ["embeddings"]:
    return depth, -1, 0
  if rest == ["norm"]:
    return depth, 1 << 30, 0
  if not rest:
    return depth, 0, 0
  children = CHILDREN[part]
  return depth, int(rest[0]), children.index(rest[1]) if len(rest) > 1 else len(children)


class _Tap:
  """A module that keeps what it returns."""

  def __init__(self, inner: Any, name: str, kept: Kept):
    self._inner, self._name, self._kept = inner, name, kept

  def __call__(self, *args: Any, **options: Any) -> Any:
    out = self._inner(*args, **options)
    self._kept.keep(self._name, out[0] if isinstance(out, tuple) else out)
    return out

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)


class _Layers:
  """A `LayerStack` whose layers are watched."""

  def __init__(self, stack: LayerStack, part: str, kept: Kept):
    self._stack, self._part, self._kept = stack, part, kept

  def scan(self, apply: Any, x: Any, **options: Any) -> Any:
    """As `LayerStack.scan`; what layers return beside x is left out."""
    part, kept = self._part, self._kept
    kept.keep(f"{part}.embeddings", x)

    def watched(layer: Any, x: Any, xs: Any) -> tuple[Any, dict[str, jax.Array]]:
      inside = Kept(kept.picks)
      for child in CHILDREN[part]:
        _replace(layer, child, _Tap(getattr(layer, child), f"{part}.{child}", inside))
      x, _ = apply(layer, x, xs)
      inside.keep(part, x)
      return x, inside.found

    x, found = self._stack.scan(watched, x, **options)
    for key, values in found.items():
      kind, _, name = key.partition(":")
      for number in range(len(values)):
        kept.found[f"{kind}:{name.replace(part, f'{part}.{number}', 1)}"] = values[number]
    return x, {}


def _replace(module: Any, name: str, value: Any) -> None:
  # A plain attribute: the stand-in is no module, and nothing but this pass sees it.
  object.__setattr__(module, name, value)


def watch(module: InternVL, kept: Kept) -> None:
  """Puts taps into a bound model, which is not used for anything else afterwards."""
  vision, decoder, projector = module.vision_model, module.language_model.model, module.mlp1
  _replace(vision.encoder, "layers", _Layers(vision.encoder.layers, "vision", kept))
  _replace(decoder, "layers", _Layers(decoder.layers, "text", kept))
  _replace(decoder, "norm", _Tap(decoder.norm, "text.norm", kept))
  for child in ("layer_norm", "linear_1"):
    _replace(projector, child, _Tap(getattr(projector, child), f"projector.{child}", kept))
  _replace(module, "mlp1", _Tap(projector, "projector", kept))
