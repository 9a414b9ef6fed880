"""Two-way tables of parameter names: how one of our arrays and a checkpoint's tensors turn into each other.

A row pairs one of our paths with the checkpoint's keys. `{i}` stands for the layer's index on both sides; our
stacks hold many layers in one array, and the tables speak of one. `{e}`, on the checkpoint's side alone, stands
for an expert: our array of all experts has them along its first axis. Rows that a model has no parameter for (a
bias that a variant lacks) are not used; a parameter without a row is an error.
"""

import dataclasses
from collections.abc import Callable, Container, Sequence

import numpy as np

from internvl_jax.models.lora import MARK
from internvl_jax.models.vit import resize_position_embedding

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a checkpoint's tensors become one array of ours and back.

  Attributes:
    load: tensors, and the shape wanted -> our array.
    save: our array -> tensors.
    part: the index into the tensor that holds an index of ours, where there is one tensor and such an index;
      then only that part of it is read. None: the tensors are read whole.
    resizes: `load` takes tensors of other shapes than `save` gives.
    shapes: our shape -> the tensors' shapes, for what is only read; else `save` tells them.
  """

  load: Callable[[Sequence[np.ndarray], tuple[int, ...]], np.ndarray]
  save: Callable[[np.ndarray], Sequence[np.ndarray]]
  part: Callable[[Index], Index] | None = None
  resizes: bool = False
  shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]] | None = None


SAME = Transform(lambda x, shape: x[0], lambda x: [x], lambda index: index)
TRANSPOSE = Transform(lambda x, shape: x[0].T, lambda x: [x.T], lambda index: index[::-1])
# A convolution's [out, in, height, width] as [height, width, in, out].
CONV = Transform(lambda x, shape: x[0].transpose(2, 3, 1, 0), lambda x: [x.transpose(3, 2, 0, 1)])
CLASS_TOKEN = Transform(lambda x, shape: x[0].reshape(-1), lambda x: [x.reshape(1, 1, -1)])
POSITIONS = Transform(
  lambda x, shape: resize_position_embedding(x[0][0], shape[0] - 1), lambda x: [x[None]], resizes=True
)


def concatenated(*sizes: int) -> Transform:
  """Tensors [size, ...] one after the other, as our last axis; those of two axes are transposed."""
  borders = list(np.cumsum(sizes[:-1]))
  return Transform(
    lambda x, shape: np.concatenate([tensor.T for tensor in x], axis=-1),
    lambda x: [part.T for part in np.split(x, borders, axis=-1)],
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


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table."""

  ours: str
  theirs: tuple[str, ...]
  transform: Transform = SAME


def row(ours: str, theirs: str, transform: Transform = SAME) -> Row:
  """A row with one tensor."""
  return Row(ours, (theirs,), transform)


def linear(path: str, key: str | None = None) -> list[Row]:
  """Rows of a linear map: its kernel, transposed, its bias, and what an adapter adds under PEFT's names."""
  key = key or path
  return [
    row(f"{path}.kernel", f"{key}.weight", TRANSPOSE),
    row(f"{path}.bias", f"{key}.bias"),
    row(f"{path}{MARK}a", f"{key}.lora_A.weight", TRANSPOSE),
    row(f"{path}{MARK}b", f"{key}.lora_B.weight", TRANSPOSE),
    row(f"{path}{MARK}magnitude", f"{key}.lora_magnitude_vector"),
  ]


def concatenated_linear(path: str, keys: Sequence[str], transform: Transform) -> list[Row]:
  """Rows of our one linear map that the checkpoint holds as several; adapters have no such form."""
  return [
    Row(f"{path}.kernel", tuple(f"{key}.weight" for key in keys), transform),
    Row(f"{path}.bias", tuple(f"{key}.bias" for key in keys), transform),
  ]


def norm(path: str, key: str | None = None) -> list[Row]:
  """Rows of a norm: its scale, and the bias that layer norms have."""
  key = key or path
  return [row(f"{path}.scale", f"{key}.weight"), row(f"{path}.bias", f"{key}.bias")]


# --- The ViT and the projector ------------------------------------------------------------------------------

_VIT = "vision_model.embeddings"
_LAYER = "vision_model.encoder.layers.{i}"
_HF_VIT = "vision_tower.embeddings"
_HF_LAYER = "vision_tower.encoder.layer.{i}"


def internvl_vision(width: int) -> list[Row]:
  """InternViT under the reference's names."""
  del width
  return [
    row(f"{_VIT}.class_embedding", f"{_VIT}.class_embedding", CLASS_TOKEN),
    row(f"{_VIT}.position_embedding", f"{_VIT}.position_embedding", POSITIONS),
    row(f"{_VIT}.patch_kernel", f"{_VIT}.patch_embedding.weight", CONV),
    row(f"{_VIT}.patch_bias", f"{_VIT}.patch_embedding.bias"),
    *linear(f"{_LAYER}.attn.qkv"),
    *linear(f"{_LAYER}.attn.proj"),
    *linear(f"{_LAYER}.mlp.fc1"),
    *linear(f"{_LAYER}.mlp.fc2"),
    *norm(f"{_LAYER}.norm1"),
    *norm(f"{_LAYER}.norm2"),
    *norm(f"{_LAYER}.attn.q_norm"),
    *norm(f"{_LAYER}.attn.k_norm"),
    row(f"{_LAYER}.ls1", f"{_LAYER}.ls1"),
    row(f"{_LAYER}.ls2", f"{_LAYER}.ls2"),
  ]


def hf_vision(width: int) -> list[Row]:
  """InternViT under transformers' names, with q, k and v apart."""
  heads = [f"{_HF_LAYER}.attention.{name}_proj" for name in "qkv"]
  return [
    row(f"{_VIT}.class_embedding", f"{_HF_VIT}.cls_token", CLASS_TOKEN),
    row(f"{_VIT}.position_embedding", f"{_HF_VIT}.position_embeddings", POSITIONS),
    row(f"{_VIT}.patch_kernel", f"{_HF_VIT}.patch_embeddings.projection.weight", CONV),
    row(f"{_VIT}.patch_bias", f"{_HF_VIT}.patch_embeddings.projection.bias"),
    *concatenated_linear(f"{_LAYER}.attn.qkv", heads, concatenated(width, width, width)),
    *linear(f"{_LAYER}.attn.proj", f"{_HF_LAYER}.attention.projection_layer"),
    *linear(f"{_LAYER}.mlp.fc1", f"{_HF_LAYER}.mlp.fc1"),
    *linear(f"{_LAYER}.mlp.fc2", f"{_HF_LAYER}.mlp.fc2"),
    *norm(f"{_LAYER}.norm1", f"{_HF_LAYER}.layernorm_before"),
    *norm(f"{_LAYER}.norm2", f"{_HF_LAYER}.layernorm_after"),
    *norm(f"{_LAYER}.attn.q_norm", f"{_HF_LAYER}.attention.q_norm"),
    *norm(f"{_LAYER}.attn.k_norm", f"{_HF_LAYER}.attention.k_norm"),
    row(f"{_LAYER}.ls1", f"{_HF_LAYER}.lambda_1"),
    row(f"{_LAYER}.ls2", f"{_HF_LAYER}.lambda_2"),
  ]


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
