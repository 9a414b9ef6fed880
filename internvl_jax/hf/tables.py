"""Two-way tables of parameter names of the projector and of the language models; see `models.checkpoint_names`."""

from collections.abc import Container, Sequence

import numpy as np

from internvl_jax.models.checkpoint_names import (
  TRANSPOSE,
  Row,
  Transform,
  concatenated_linear,
  linear,
  norm,
  row,
)


def grouped_query_heads(queries: int, groups: int, width: int) -> Transform:
  """Separate q, k, v [heads * width, D] as one map to `groups` times (`queries` q heads, k head, v head)."""

  def load(tensors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    heads = [tensor.reshape(groups, -1, width, *tensor.shape[1:]) for tensor in tensors]
    return np.concatenate(heads, axis=1).reshape(-1, *tensors[0].shape[1:]).T.reshape(shape)

  def save(x: np.ndarray) -> list[np.ndarray]:
    heads = x.T.reshape(groups, queries + 2, width, *x.shape[:-1])
    parts = np.split(heads, [queries, queries + 1], axis=1)
    return [part.reshape(-1, *x.shape[:-1]) for part in parts]

  return Transform(load, save)


# The sixteen numbers of a 4-bit float with two bits of exponent and one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _unpack_mxfp4(tensors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  blocks, scales = (
    tensors  # uint8 [E, F, D/32, 16] with two numbers a byte, the lower half first; [E, F, D/32]
  )
  numbers = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
  whole = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
  return whole.reshape(*blocks.shape[:2], -1).swapaxes(1, 2).reshape(shape)


def _never_written(x: np.ndarray) -> Sequence[np.ndarray]:
  raise AssertionError("a model is never written in 4 bits")


# The experts of OpenAI's gpt-oss, in the microscaling format MXFP4 (OCP Microscaling Formats v1.0): blocks of 32
# numbers of 4 bits with one power of two.
MXFP4 = Transform(
  _unpack_mxfp4,
  _never_written,
  shapes=lambda s: [(s[0], s[2], s[1] // 32, 16), (s[0], s[2], s[1] // 32)],
)


# --- The projector -------------------------------------------------------------------------------------------


def projector(prefix: str, names: tuple[str, str, str]) -> list[Row]:
  """The projector's three layers under the checkpoint's names for them."""
  ours = ("layer_norm", "linear_1", "linear_2")
  makers = (norm, linear, linear)
  return [
    line
    for make, path, name in zip(makers, ours, names, strict=True)
    for line in make(f"mlp1.{path}", f"{prefix}.{name}")
  ]


INTERNVL_PROJECTOR = projector("mlp1", ("0", "1", "3"))
HF_PROJECTOR = projector("multi_modal_projector", ("layer_norm", "linear_1", "linear_2"))


# --- Language models ----------------------------------------------------------------------------------------

LM = "language_model.model"
LM_LAYER = "language_model.model.layers.{i}"
_ATTENTION = f"{LM_LAYER}.self_attn"
_MLP = f"{LM_LAYER}.mlp"

# The names that most families share. A family that fuses projections has those rows and lacks the others.
USUAL = [
  row(f"{LM}.embed_tokens.embedding", f"{LM}.embed_tokens.weight"),
  *(line for name in ("q", "k", "v", "qkv", "o") for line in linear(f"{_ATTENTION}.{name}_proj")),
  *norm(f"{_ATTENTION}.q_norm"),
  *norm(f"{_ATTENTION}.k_norm"),
  *(line for name in ("gate", "up", "gate_up", "down") for line in linear(f"{_MLP}.{name}_proj")),
  *norm(f"{LM_LAYER}.input_layernorm"),
  *norm(f"{LM_LAYER}.post_attention_layernorm"),
  *norm(f"{LM}.norm"),
  *linear("language_model.lm_head"),
]

QWEN3_MOE = [
  *USUAL,
  *linear(f"{_MLP}.gate"),
  *(
    row(f"{_MLP}.experts.{name}_proj", f"{_MLP}.experts.{{e}}.{name}_proj.weight", TRANSPOSE)
    for name in ("gate", "up", "down")
  ),
]

GPT_OSS = [
  *USUAL,
  row(f"{_ATTENTION}.sinks", f"{_ATTENTION}.sinks"),
  *linear(f"{_MLP}.router"),
  *(
    row(f"{_MLP}.experts.{name}", f"{_MLP}.experts.{name}")
    for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
  ),
]


def packed(table: Sequence[Row], names: Container[str]) -> list[Row]:
  """The table with the rows of those tensors that a checkpoint holds in MXFP4, as `_blocks` and `_scales`."""
  return [
    Row(line.ours, (f"{line.theirs[0]}_blocks", f"{line.theirs[0]}_scales"), MXFP4)
    if f"{line.theirs[0]}_blocks".replace("{i}", "0") in names
    else line
    for line in table
  ]


INTERNLM2 = [
  row(f"{LM}.embed_tokens.embedding", f"{LM}.tok_embeddings.weight"),
  *linear(f"{_ATTENTION}.qkv_proj", f"{LM_LAYER}.attention.wqkv"),
  *linear(f"{_ATTENTION}.o_proj", f"{LM_LAYER}.attention.wo"),
  *linear(f"{_MLP}.gate_proj", f"{LM_LAYER}.feed_forward.w1"),
  *linear(f"{_MLP}.up_proj", f"{LM_LAYER}.feed_forward.w3"),
  *linear(f"{_MLP}.down_proj", f"{LM_LAYER}.feed_forward.w2"),
  *norm(f"{LM_LAYER}.input_layernorm", f"{LM_LAYER}.attention_norm"),
  *norm(f"{LM_LAYER}.post_attention_layernorm", f"{LM_LAYER}.ffn_norm"),
  *norm(f"{LM}.norm"),
  *linear("language_model.lm_head", "language_model.output"),
]


def llama_from_grouped_heads(queries: int, groups: int, width: int) -> list[Row]:
  """InternLM2's parameters under LLaMA's names: its fused projection is taken apart."""
  heads = [f"{_ATTENTION}.{name}_proj" for name in "qkv"]
  fused = concatenated_linear(f"{_ATTENTION}.qkv_proj", heads, grouped_query_heads(queries, groups, width))
  return [*fused, *(line for line in USUAL if not line.ours.startswith(f"{_ATTENTION}.qkv_proj"))]
