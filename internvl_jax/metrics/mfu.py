"""How much of the devices' arithmetic a run puts to use: model FLOPs utilization (MFU).

Useful are the matrix products that the batch's own tokens and tiles need, forward and backward: no padding,
nothing that is computed twice to save memory, no gradient of what is frozen, and of attention only the pairs
that see each other.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from internvl_jax.batch import BatchCounts
from internvl_jax.chips import PEAKS
from internvl_jax.models.flash import PARTS
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.trees import LAYER_RANGE, submodule_of

_EMBEDDING = "language_model.model.embed_tokens.embedding"
_MATRIX = re.compile(r"(kernel|\.experts\.\w+_proj|\.adapter\.[ab])$")


def peak_flops(devices: Sequence[Any]) -> float | None:
  """The devices' bfloat16 FLOP/s together; None where a kind is not in the table."""
  # Of some kinds, a chip is two devices at the same place: v7x, and v4 without megacore.
  chips = {
    (getattr(device, "slice_index", 0), *device.coords) if device.platform == "tpu" else device.id: device
    for device in devices
  }
  peaks = [_peak(device.device_kind) for device in chips.values()]
  return None if None in peaks else sum(peak for peak in peaks if peak is not None)


def _peak(kind: str) -> float | None:
  return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, kind)), None)


@dataclasses.dataclass(frozen=True)
class UsefulFlops:
  """FLOPs that a batch needs, by what it holds.

  Attributes:
    per_tile, per_image_token, per_token: matrix products and the ViT's attention, the projector, the decoder.
    per_pair: attention of the decoder's layers that see everything.
    windowed: (window, FLOPs a pair) of those that do not.
    tokens_per_tile: image tokens of one tile.
  """

  per_tile: float
  per_image_token: float
  per_token: float
  per_pair: float
  windowed: tuple[tuple[int, float], ...]
  tokens_per_tile: int

  def of(self, counts: BatchCounts) -> float:
    """FLOPs of a step over a batch."""
    tokens, image_tokens, pairs = float(counts.tokens), float(counts.image_tokens), float(counts.pairs)
    total = self.per_tile * image_tokens / self.tokens_per_tile + self.per_image_token * image_tokens
    total += self.per_token * tokens + self.per_pair * pairs
    # At most: the first tokens of a segment see less than their window.
    return total + sum(each * min(pairs, tokens * window) for window, each in self.windowed)


def useful_flops(
  config: InternVLConfig, shapes: Mapping[str, Any], trainable: Collection[str], twice: Collection[str] = ()
) -> UsefulFlops:
  """Counts what a training step of a model has to compute.

  Args:
    config: the model.
    shapes: of its parameters, by path.
    trainable: the paths that get a gradient.
    twice: parts that run forward once more, for a reference policy.
  """
  first = min(map(_stage, trainable))
  costs = {"patches": 0.0, "vision_model": 0.0, "mlp1": 0.0, "language_model": 0.0}
  for path, leaf in shapes.items():
    if _MATRIX.search(path) and _runs(path, config):
      passes = 1 + (path in trainable) + _passes_gradient(path, first) + (submodule_of(path) in twice)
      part = "patches" if path.endswith("patch_kernel") else submodule_of(path)
      costs[part] += 2 * passes * leaf.size * _share(path, config)
  if config.text.tie_word_embeddings:
    passes = 1 + (_EMBEDDING in trainable) + (first < (4, 0)) + ("language_model" in twice)
    costs["language_model"] += 2 * passes * shapes[_EMBEDDING].size
  vision, text = config.vision, config.text
  tokens = vision.num_tokens
  attention = sum(
    4 * vision.hidden_size * tokens**2 * ((3 if first <= (1, i) else 1) + ("vision_model" in twice))
    for i in range(vision.layers_run(config.select_layer))
  )
  each = 4 * text.num_heads * text.head_dim * ((3 if first <= (3, 0) else 1) + ("language_model" in twice))
  windows = text.windows or (None,) * text.num_layers
  return UsefulFlops(
    per_tile=costs["patches"] * vision.num_patches + costs["vision_model"] * tokens + attention,
    per_image_token=costs["mlp1"],
    per_token=costs["language_model"],
    per_pair=each * sum(window is None for window in windows),
    windowed=tuple((window, each) for window in windows if window is not None),
    tokens_per_tile=config.tokens_per_tile,
  )


def _stage(path: str) -> tuple[int, int]:
  """Where in the forward pass a parameter is used."""
  span, part = LAYER_RANGE.search(path), submodule_of(path)
  if part == "vision_model":
    return (1, int(span[1])) if span else (0, 0)
  if part in ("mlp1", "mlp2") or ".embed_tokens." in path:
    return (2, 0)
  return (3, int(span[1])) if span else (4, 0)


def _passes_gradient(path: str, first: tuple[int, int]) -> bool:
  """Whether the gradient goes on through this matrix to something that trains."""
  stage = _stage(path)
  return stage > first or (stage == first and LAYER_RANGE.search(path) is not None)


def _runs(path: str, config: InternVLConfig) -> bool:
  if submodule_of(path) in PARTS:
    return False
  span = LAYER_RANGE.search(path)
  return (
    span is None
    or submodule_of(path) != "vision_model"
    or int(span[1]) < config.vision.layers_run(config.select_layer)
  )


def _share(path: str, config: InternVLConfig) -> float:
  """The share of a matrix that a token meets: that of k of E experts, or all."""
  experts: Any = config.text.experts
  return experts.top_k / experts.num_experts if ".experts." in path else 1.0
