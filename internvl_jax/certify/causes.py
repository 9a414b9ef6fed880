"""Probable causes of departures: each is tried, and named where it makes theirs of ours.

Norms and feed-forwards work token by token, so that the recorded rows of their inputs and outputs suffice to try another
epsilon or activation; attention is run again as a whole.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from internvl_jax.certify.activations import first_departure
from internvl_jax.certify.ours import Ours, Rows
from internvl_jax.certify.recording import Arrays
from internvl_jax.certify.taps import names_in_order, picks_of
from internvl_jax.hf.families import UNDECAYED
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.rope import Rope

# Relative difference of rows that says that a cause is found.
_FOUND = 2e-5

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
  "exact GELU": lambda x: jax.nn.gelu(x, approximate=False),
  "GELU by its tanh approximation": lambda x: jax.nn.gelu(x, approximate=True),
  "quick GELU (x * sigmoid(1.702 x))": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "SiLU": jax.nn.silu,
  "ReLU": jax.nn.relu,
}


def of_activation(
  part: str, theirs: Arrays, rows: Rows, ours: Ours, frequencies: Sequence[float] | None
) -> str:
  """The probable cause of a departure that begins in a part of the model; empty where none is known.

  Args:
    part: its name, as in `taps`.
    theirs: the recorded activations.
    rows: what the model ran on.
    ours: the checkpoint.
    frequencies: of their rotary embedding, where they are recorded.
  """
  kind, *rest = part.split(".")
  last = rest[-1] if rest else ""
  if "norm" in last and part != "projector.layer_norm":
    return _of_norm(part, theirs, ours)
  if last == "mlp" or part == "projector":
    return _of_feed_forward(part, theirs, ours)
  if last == "self_attn":
    return _of_rotary(part, theirs, rows, ours, frequencies)
  if part == "projector.layer_norm":
    return _of_shuffle(part, theirs, rows, ours)
  if kind == "logits":
    return _of_head(theirs, ours)
  if part == "vision.embeddings":
    return "patch or position embeddings"
  if part == "text.embeddings":
    return "token embeddings, or the places of the image features"
  return ""


def _distance(found: np.ndarray, theirs: np.ndarray) -> float:
  """The largest relative difference of rows."""
  scale = np.maximum(np.linalg.norm(theirs, axis=-1), 1e-3 * np.linalg.norm(theirs, axis=-1).max())
  return float((np.linalg.norm(found - theirs, axis=-1) / scale).max())


# --- Token by token -----------------------------------------------------------------------------------------


def _input_of(part: str, theirs: Arrays, ours: Ours) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """The recorded input rows of a norm, with its scale and bias."""
  kind, *rest = part.split(".")
  if part == "text.norm":
    layers = [int(m[1]) for name in theirs if (m := re.fullmatch(r"rows:text\.(\d+)", name))]
    return (
      theirs[f"rows:text.{max(layers)}"],
      np.asarray(ours.params["language_model.model.norm.scale"]),
      None,
    )
  number, child = int(rest[0]), rest[1]
  x = theirs[f"rows:{kind}.{number - 1}" if number else f"rows:{kind}.embeddings"]
  weights = ours.layer(kind, number)
  if child == "norm2":
    x = x + weights["ls1"] * theirs[f"rows:{kind}.{number}.attn"]
  if child == "post_attention_layernorm":
    x = x + theirs[f"rows:{kind}.{number}.self_attn"]
  return x, weights[f"{child}.scale"], weights.get(f"{child}.bias")


def _of_norm(part: str, theirs: Arrays, ours: Ours) -> str:
  """The epsilon that makes their output of their input."""
  x, scale, bias = (None if a is None else np.asarray(a, np.float64) for a in _input_of(part, theirs, ours))
  assert x is not None and scale is not None
  y = theirs[f"rows:{part}"].astype(np.float64)
  if bias is not None:
    x, y = x - x.mean(-1, keepdims=True), y - bias
  plain, square = x * scale, np.mean(x * x, axis=-1)
  factor = (plain * y).sum(-1) / (plain * plain).sum(-1)
  # Rows with small numbers tell epsilon best.
  epsilon = float((1 / factor**2 - square)[np.argmin(square)])
  if epsilon < 0 or _distance(plain / np.sqrt(square + epsilon)[:, None], y) > _FOUND:
    return "the norm's kind or weights"
  config = ours.source.config
  stated = (
    getattr(config.vision, "layer_norm_eps", None) if part.startswith("vision") else config.text.rms_norm_eps
  )
  return f"the norm's epsilon: about {epsilon:.1e} in theirs, {stated:.1e} in the checkpoint's config.json"


def _linear(x: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
  y = x @ weights[f"{name}.kernel"]
  return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _of_feed_forward(part: str, theirs: Arrays, ours: Ours) -> str:
  """The activation that makes their output of their input."""
  y = theirs[f"rows:{part}"]
  kind, *rest = part.split(".")
  if part == "projector":
    weights = {
      path.removeprefix("mlp1."): np.asarray(a) for path, a in ours.params.items() if path.startswith("mlp1.")
    }
    inner, second, up = theirs["rows:projector.linear_1"], "linear_2", 1.0
  else:
    weights = ours.layer(kind, int(rest[0]))
    x = theirs[f"rows:{kind}.{rest[0]}." + ("norm2" if kind == "vision" else "post_attention_layernorm")]
    names = ("mlp.fc1", "mlp.fc2") if kind == "vision" else ("mlp.gate_proj", "mlp.down_proj")
    if f"{names[0]}.kernel" not in weights:
      return "the feed-forward"
    inner, second = _linear(x, weights, names[0]), names[1]
    up = 1.0 if kind == "vision" else _linear(x, weights, "mlp.up_proj")
  for name, function in ACTIVATIONS.items():
    if _distance(_linear(np.asarray(function(inner)) * up, weights, second), y) < _FOUND:
      mine = "SiLU" if kind == "text" else "exact GELU"
      return f"the activation is {name} in theirs, {mine} in ours" if name != mine else ""
  return "the feed-forward's activation or weights"


def _of_head(theirs: Arrays, ours: Ours) -> str:
  """Whether their output embedding is the table of their input embeddings."""
  table = np.asarray(ours.params["language_model.model.embed_tokens.embedding"])
  if _distance(theirs["rows:text.norm"] @ table.T, theirs["rows:logits"]) < _FOUND:
    return "the output embedding is tied to the input embedding in theirs, the checkpoint has one of its own (tie_word_embeddings)"
  return "the output embedding's weights, or a scale of logits"


# --- Run again ----------------------------------------------------------------------------------------------


def _agrees(part: str, theirs: Arrays, rows: Rows, ours: Ours, config: InternVLConfig) -> bool:
  """Whether a part of another model of the same parameters agrees with theirs."""
  _, mine = ours.run(rows, picks_of(theirs), config)
  return first_departure(mine, theirs, [part], 1e-4)[0] is None


def _of_rotary(part: str, theirs: Arrays, rows: Rows, ours: Ours, frequencies: Sequence[float] | None) -> str:
  """The base of their rotary embedding, if that makes their attention of ours."""
  config = ours.source.config
  bases = [1e4, 5e5, 1e6, 5e6]
  if frequencies is not None:
    width = config.text.head_dim
    bases = [float(f"{frequencies[-1] ** (-width / (width - 2)):.4g}")]
  for base in bases:
    if base == config.text.rope.theta and type(config.text.rope) is Rope:
      continue
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, rope=Rope(theta=base)))
    if _agrees(part, theirs, rows, ours, other):
      return f"the rotary embedding: its base is {base:g} in theirs, {config.text.rope} in ours (rope_theta, rope_scaling)"
  return "attention: the rotary embedding's kind, the mask, or the projections"


def _of_shuffle(part: str, theirs: Arrays, rows: Rows, ours: Ours) -> str:
  """Whether the other version of the pixel shuffle makes their projector's input of ours."""
  config = ours.source.config
  version = {"v1": "v2", "v2": "v1"}[config.ps_version]
  if _agrees(part, theirs, rows, ours, dataclasses.replace(config, ps_version=version)):
    return f"the pixel shuffle: ps_version is {version!r} in theirs, {config.ps_version!r} in ours"
  return "the pixel shuffle, the hidden state that is selected (select_layer), or the projector's norm"


def of_packed(token: int, part: str, theirs: Arrays, rows: Rows, ours: Ours) -> str:
  """The probable cause of a departure in a row of segments."""
  others = {
    "tokens see the segments before their own: the mask of segments is not applied (as without flash attention's patch)": {
      "segments": np.minimum(rows.segments, 1)
    },
    "positions do not begin anew in each segment": {
      "positions": np.arange(rows.ids.shape[1], dtype=np.int32)[None]
    },
  }
  for cause, change in others.items():
    _, mine = ours.run(dataclasses.replace(rows, **change), picks_of(theirs))
    if first_departure(mine, theirs, names_in_order(theirs), 1e-4)[0] is None:
      return cause
  if int(theirs["segments"][token]) > 1 and part.endswith("self_attn"):
    return "attention across segments: the mask, or positions"
  return "not the segments: it departs within the first"


# --- Losses, gradients, decay -------------------------------------------------------------------------------


def of_loss(
  theirs: float, losses: Sequence[Mapping[int, np.ndarray]], samples: Sequence[Arrays], tolerance: float
) -> str:
  """Which other mean or target gives their loss; ours is the mean over all supervised tokens.

  Args:
    theirs: their loss.
    losses: of the tokens of each sample, by the distance of a token's label; see `model_checks.Run`.
    samples: the recorded ones.
    tolerance: a relative difference.
  """
  counts = np.array([max(len(loss[1]), 1) for loss in losses])
  sums = np.array([loss[1].sum() for loss in losses])
  lengths = np.array([len(sample["input_ids"]) for sample in samples])
  roots = (sums / counts**0.5).sum() / (counts**0.5).sum()
  candidates = {
    "the mean of the samples' means": (sums / counts).mean(),
    "weighted by the square root of each sample's tokens (loss_reduction='square')": roots,
    "the sum over tokens": sums.sum(),
    "divided by all tokens, also those that are not supervised": sums.sum() / lengths.sum(),
    "divided by all predictions, also those that are not supervised": sums.sum() / (lengths - 1).sum(),
    "divided by all tokens and padding": sums.sum() / (lengths.max() * len(lengths)),
    "of each token's own label: labels are not shifted": _mean(losses, 0),
    "of the label after the next: labels are shifted twice": _mean(losses, 2),
  }
  for name, value in candidates.items():
    if abs(value - theirs) <= tolerance * abs(theirs):
      return f"theirs is {name}; ours is the mean over the supervised tokens of the micro-batch"
  return ""


def _mean(losses: Sequence[Mapping[int, np.ndarray]], distance: int) -> float:
  found = np.concatenate([loss[distance] for loss in losses])
  return float(found.mean()) if len(found) else np.inf


def of_gradients(sketches: np.ndarray, theirs: np.ndarray) -> str:
  """Whether all gradients are one multiple of ours, by their sketches [parameters, n]."""
  factor = float((sketches * theirs).sum() / (sketches * sketches).sum())
  rest = np.linalg.norm(theirs - factor * sketches) / np.linalg.norm(theirs)
  if rest < 1e-3 and abs(factor - 1) > 1e-3:
    return f"all gradients are {factor:.4g} times ours: the loss is scaled"
  return ""


def depth_of(name: str) -> tuple[int, int]:
  """How late in the forward pass a tensor is used."""
  layer = re.search(r"\.layers?\.(\d+)\.", name)
  number = int(layer[1]) if layer else -1
  if re.search(r"lm_head|language_model\.output\b", name):
    return 4, 0
  if name.startswith("language_model"):
    return 3, 1 << 30 if re.search(r"\.norm\.", name) and layer is None else number
  return (2, 0) if re.match(r"mlp1|multi_modal_projector", name) else (1, number)


# All releases spare PyTorch's LayerNorm and biases.
_RULES = {"4.46": r"bias", **UNDECAYED}


def of_decay(said: Mapping[str, bool], differing: Sequence[str], ours: Ours) -> tuple[bool, str]:
  """Whether their choice of what decays is that of a release of transformers, and the cause.

  Args:
    said: which tensors decay in theirs.
    differing: those that do in one and not in the other.
    ours: the checkpoint.
  """
  for release, names in _RULES.items():
    for own_names in (False, True):
      rule = ours.decays(names, own_names=own_names)
      if all(rule[name] == flag for name, flag in said.items()):
        return True, (
          f"theirs is the rule of transformers {release}; training here follows transformers 4.49 where the family "
          "does (docs/training.md)"
        )
  norms = [name for name in differing if "norm" in name]
  kinds = "norms" if len(norms) == len(differing) else "norms and others" if norms else "others than norms"
  verb = "decay" if said[differing[0]] else "do not decay"
  return False, f"{kinds} {verb} in theirs, by the rule of no release of transformers"
