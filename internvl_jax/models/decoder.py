"""The decoder: one file for every family, told apart by data.

What a family does in its own way is a switch of `DecoderConfig` where it is small (biases, norms of q and k,
fused projections, rotary embeddings) and a module of its own where it is not (`DecoderConfig.experts`).

Letters: B rows, T tokens, D width, N query heads, K key-value heads, G = N/K, H head width, F mlp width,
V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from internvl_jax.models import lora
from internvl_jax.models.activations import activations
from internvl_jax.models.attention import Mask, SharedPrompts, attention
from internvl_jax.models.base_weights import quantize_layer
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import Embed, LayerStack, Linear, RMSNorm, make_param
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.rope import Rope, rotate, rotations
from internvl_jax.parallel.rules import constrain


class Experts(Protocol):
  """The settings of a feed-forward of experts, which builds the module; see `models.moe`."""

  def build(self, hidden_size: int, rngs: nnx.Rngs) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and switches of a decoder.

  Attributes:
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim: V, D, L, N, K, H.
    intermediate_size: F of the dense feed-forward.
    experts: the feed-forward of experts that takes its place, or None.
    rms_norm_eps: of all norms.
    rope: the rotary embedding.
    qkv_bias, o_bias, mlp_bias: which linear layers have one.
    qkv: "separate" projections; or one, whose outputs are "grouped" by key-value head (G queries, key, value:
      InternLM2) or "concatenated" (all queries, keys, values: Phi-3).
    fused_gate_up: gate and up of the feed-forward are one projection (Phi-3).
    qk_norm: RMS norms on each head of q and k (Qwen3).
    sinks: a learned attention sink for each head (gpt-oss).
    windows: how many keys each layer's queries see, None for all; empty for all layers.
    tie_word_embeddings: the output embedding is the input embedding.
    stacked: the layers' weights are in stacks, for one scan; else in arrays of their own, which CPUs decode from uncopied.
    lora, quantize_base: adapters of the layers, and the format of their frozen kernels (`weight_formats.FORMATS`) or "none".
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  experts: Experts | None = None
  rms_norm_eps: float = 1e-6
  rope: Rope = dataclasses.field(default_factory=Rope)
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qkv: Literal["separate", "grouped", "concatenated"] = "separate"
  fused_gate_up: bool = False
  qk_norm: bool = False
  sinks: bool = False
  windows: tuple[int | None, ...] = ()
  tie_word_embeddings: bool = False
  stacked: bool = True
  lora: LoRASpec | None = None
  quantize_base: str = "none"


KeysAndValues: TypeAlias = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]

_CACHED = (None, "rows", "heads", None, None)
"""How a cache's keys and values [L, B, K, S, H] are sharded: new ones are written into slots, which stay together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the tokens seen so far, for every layer.

  Attributes:
    layers: for each segment of the layers' stack by its name, keys and values [layers, B, K, S, H]: heads come before
      slots, as products of queries with keys want them, so that nothing is transposed for each token.
    segment_ids: int [B, S]; 0 marks slots that no query may see.
  """

  layers: dict[str, KeysAndValues]
  segment_ids: Int[Array, "B S"]

  @property
  def slots(self) -> int:
    """S."""
    return self.segment_ids.shape[1]

  def with_slots(self, slots: int) -> "KVCache":
    """The cache with so many slots, the new ones empty."""
    more = slots - self.slots

    def grow(x: jax.Array) -> jax.Array:
      return constrain(jnp.pad(x, [(0, 0)] * 3 + [(0, more), (0, 0)]), *_CACHED)

    return KVCache(jax.tree.map(grow, self.layers), jnp.pad(self.segment_ids, ((0, 0), (0, more))))


class LayerCache(NamedTuple):
  """The cache while a layer is run: the arrays of its segment, of which it changes its own slots in place.

  Attributes:
    k, v: [layers, B, K, S, H].
    layer: its number in the segment.
    offset: the slot of the first new token.
  """

  k: Float[Array, "L B K S H"]
  v: Float[Array, "L B K S H"]
  layer: Int[Array, ""] | int
  offset: Int[Array, ""]

  def write(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "LayerCache":
    """The cache with the keys and values of new tokens."""
    start = (self.layer, 0, 0, self.offset, 0)

    def written(old: jax.Array, new: jax.Array) -> jax.Array:
      new = new.astype(old.dtype).swapaxes(1, 2)[None]
      return constrain(jax.lax.dynamic_update_slice(old, new, start), *_CACHED)

    return self._replace(k=written(self.k, k), v=written(self.v, v))

  def read(self) -> KeysAndValues:
    """The layer's keys and values [B, S, K, H]."""
    k, v = (
      jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False).swapaxes(1, 2) for x in (self.k, self.v)
    )
    return k, v


class DecoderAttention(nnx.Module):
  """Causal self-attention with grouped key-value heads and rotary positions."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.layout = config.qkv

    def linear(d_in: int, d_out: int, axes: tuple[str, str], pieces: int, bias: bool) -> Linear:
      return Linear(d_in, d_out, bias=bias, axes=axes, pieces=pieces, rngs=rngs)

    if config.qkv == "separate":
      self.q_proj = linear(D, N * H, ("embed", "heads"), N, config.qkv_bias)
      self.k_proj = linear(D, K * H, ("embed", "kv_heads"), K, config.qkv_bias)
      self.v_proj = linear(D, K * H, ("embed", "kv_heads"), K, config.qkv_bias)
    else:
      out = "kv_heads" if config.qkv == "grouped" else "fused"
      self.qkv_proj = linear(D, (N + 2 * K) * H, ("embed", out), K, config.qkv_bias)
    self.o_proj = linear(N * H, D, ("heads", "embed"), N, config.o_bias)
    self.q_norm = RMSNorm(H, eps=config.rms_norm_eps, axis=None) if config.qk_norm else None
    self.k_norm = RMSNorm(H, eps=config.rms_norm_eps, axis=None) if config.qk_norm else None
    self.sinks = make_param(jnp.zeros(N), ("heads",)) if config.sinks else None

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    mask: Mask,
    cache: LayerCache | None,
    backend: str,
  ) -> tuple[Float[Array, "B T D"], KeysAndValues | LayerCache]:
    """Attends over x [B, T, D]; with a cache over what it holds, x's own keys and values among it.

    Returns:
      The new x, and its keys and values, or the cache with them.
    """
    q, k, v = self._project(x)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    kept: KeysAndValues | LayerCache = (k, v)
    if cache is not None:
      kept = cache.write(k, v)
      k, v = kept.read()
    sinks = None if self.sinks is None else self.sinks[...]
    out = attention(q, k, v, mask, sinks=sinks, backend=backend)
    return self.o_proj(out.reshape(*x.shape[:2], -1)), kept

  def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H]."""
    N, K, H = self.num_heads, self.num_kv_heads, self.head_dim
    heads = (*x.shape[:2], -1, H)
    if self.layout == "separate":
      q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
      if self.q_norm is not None:
        # The TPU compiler, let to fuse the norm over heads into the product, ends in a failed check for some meshes.
        q, k = jax.lax.optimization_barrier((q, k))
      return q.reshape(heads), k.reshape(heads), v.reshape(heads)
    y = self.qkv_proj(x)
    if self.layout == "concatenated":
      q, k, v = jnp.split(y, [N * H, (N + K) * H], axis=-1)
      return q.reshape(heads), k.reshape(heads), v.reshape(heads)
    y = y.reshape(*x.shape[:2], K, N // K + 2, H)
    return y[..., :-2, :].reshape(heads), y[..., -2, :], y[..., -1, :]


class DecoderMLP(nnx.Module):
  """SwiGLU (arXiv:2002.05202)."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    self.fused = config.fused_gate_up
    if self.fused:
      self.gate_up_proj = Linear(D, 2 * F, bias=bias, axes=("embed", "fused"), rngs=rngs)
    else:
      self.gate_proj = Linear(D, F, bias=bias, axes=("embed", "mlp"), rngs=rngs)
      self.up_proj = Linear(D, F, bias=bias, axes=("embed", "mlp"), rngs=rngs)
    inner = "fused" if self.fused else "mlp"
    self.down_proj = Linear(F, D, bias=bias, axes=(inner, "embed"), rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None, kernels: Kernels
  ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Maps x [B, T, D]; `valid` and the second result are there for what has a router."""
    del valid
    gate, up = (
      jnp.split(self.gate_up_proj(x), 2, axis=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
    )
    return self.down_proj(activations(kernels.activations).swiglu(gate, up)), {}


class DecoderLayer(nnx.Module):
  """One pre-norm block."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, eps = config.hidden_size, config.rms_norm_eps
    self.self_attn = DecoderAttention(config, rngs)
    self.mlp = config.experts.build(D, rngs) if config.experts else DecoderMLP(config, rngs)
    self.input_layernorm = RMSNorm(D, eps=eps)
    self.post_attention_layernorm = RMSNorm(D, eps=eps)
    if config.lora is not None:
      lora.attach(self, config.lora, rngs)
    quantize_layer(self, config.quantize_base)

  def __call__(
    self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None, kernels: Kernels, **attend: Any
  ) -> tuple[Float[Array, "B T D"], KeysAndValues | LayerCache, dict[str, jax.Array]]:
    """Returns the new x, its keys and values or the cache with them, and statistics of the router if there is one."""
    x = _by_token(x)
    y, kv = self.self_attn(_by_token(self.input_layernorm(x)), backend=kernels.attention, **attend)
    x = x + y
    y, router = self.mlp(_by_token(self.post_attention_layernorm(x)), valid=valid, kernels=kernels)
    return _by_token(x + y), kv, router


def _by_token(x: jax.Array) -> jax.Array:
  """Shards x [B, T, D] over the devices that its tokens are sharded over."""
  return constrain(x, "rows", "tokens", None)


class Decoder(nnx.Module):
  """Embedding table, blocks and final norm."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.kv_shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    self.rope, self.windows = config.rope, config.windows
    self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
    bounds = (0, config.num_layers) if config.stacked else tuple(range(config.num_layers + 1))
    self.layers = LayerStack(lambda r: DecoderLayer(config, r), bounds=bounds, rngs=rngs)
    self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    shared: SharedPrompts | None = None,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels | None = None,
    remat: Callable[..., Any] | None = None,
    unroll: int = 1,
  ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Runs embeddings x [B, T, D] to normalized hidden states [B, T, D].

    Args:
      x: token embeddings with image features in place, in the compute dtype.
      positions: int [B, T], for the rotary embedding.
      segment_ids, kv_segment_ids: see `Mask`. Segment 0 is padding to a router's statistics.
      shared: prompts that segments have in common, for models without windows, which count along the row, where what
        is shared is too far off.
      dropout_key: randomness of the adapters' dropout; None is evaluation.
      kernels: the backends; None is XLA's.
      remat, unroll: see `LayerStack.scan`.

    Returns:
      The hidden states, and the routers' statistics [L, B, ...]; see `models.moe`.
    """
    T = x.shape[1]
    assert shared is None or not any(self.windows)
    prompts = {} if shared is None else shared._asdict()
    mask, xs = self._mask(T, segments=segment_ids, kv_segments=kv_segment_ids, **prompts)
    if dropout_key is not None:
      xs["dropout"] = jax.random.split(dropout_key, self.kv_shape[0])
    options = {
      "rotation": rotations(self.rope, positions, self.kv_shape[-1], bound=T),
      "cache": None,
      "kernels": kernels or Kernels(),
      "valid": None if segment_ids is None else segment_ids > 0,
    }

    def apply(layer: Any, x: jax.Array, xs: dict[str, jax.Array]):
      if "dropout" in xs:
        lora.start_dropout(layer, xs["dropout"])
      x, _, router = layer(x, mask=_of_layer(mask, xs), **options)
      return x, router

    x, router = self.layers.scan(apply, x, xs=xs, remat=remat, unroll=unroll)
    return self.norm(x), router

  def prefill(
    self,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    kernels: Kernels | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs the first T tokens of every row; the cache that comes back has as many slots.

    Args:
      x: [B, T, D]. positions: int [B, T].
      segment_ids: int [B, T]; 0 marks padding, which nobody will see.
      kernels: the backends; None is XLA's.
    """
    T = x.shape[1]
    mask, xs = self._mask(T, segments=segment_ids)
    options = {
      "rotation": rotations(self.rope, positions, self.kv_shape[-1], bound=T),
      "cache": None,
      "kernels": kernels or Kernels(),
      "valid": None,
    }

    def apply(layer: Any, x: jax.Array, state: KeysAndValues, number: Any, xs: dict[str, jax.Array]):
      x, kept, _ = layer(x, mask=_of_layer(mask, xs), **options)
      state = LayerCache(*state, number, jnp.int32(0)).write(*kept)[:2]
      return x, state

    x, layers = self.layers.thread(apply, x, self._empty(x.shape[0], T, x.dtype), xs=xs)
    return self.norm(x), KVCache(layers, segment_ids)

  def extend(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache,
    offset: Int[Array, ""],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    prompt: int | None = None,
    kernels: Kernels | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs the next T tokens of every row against a cache, writing them at slots offset..offset+T-1.

    Args:
      x: [B, T, D]. positions: int [B, T].
      cache: what the rows hold so far.
      offset: scalar int, the slot of the first of these tokens, the same for every row.
      segment_ids: int [B, T]; 0 marks padding, which nobody will see.
      prompt: the segment that all new tokens see besides their own, of models without windows: T answers to one prompt go
        on side by side. None: tokens see their own segment alone.
      kernels: the backends, of which attention's is not used: it is made for long rows, not for a few queries.
    """
    kv_segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, offset, axis=1)
    prompts = {}
    if prompt is not None:
      assert not any(self.windows)
      prompts["parent"] = jnp.full_like(segment_ids, prompt)
      prompts["kv_parent"] = jnp.where(kv_segments == prompt, prompt, 0)
    q_index = offset + jnp.arange(x.shape[1])
    mask, xs = self._mask(
      cache.slots, segments=segment_ids, kv_segments=kv_segments, q_index=q_index, **prompts
    )
    options = {
      "rotation": rotations(self.rope, positions, self.kv_shape[-1], bound=cache.slots),
      "kernels": Kernels(experts=(kernels or Kernels()).experts),
      "valid": None,
    }

    def apply(layer: Any, x: jax.Array, state: KeysAndValues, number: Any, xs: dict[str, jax.Array]):
      x, kept, _ = layer(x, mask=_of_layer(mask, xs), cache=LayerCache(*state, number, offset), **options)
      return x, kept[:2]

    x, layers = self.layers.thread(apply, x, cache.layers, xs=xs)
    return self.norm(x), KVCache(layers, kv_segments)

  def _empty(self, batch: int, slots: int, dtype: jnp.dtype) -> dict[str, KeysAndValues]:
    """Keys and values for `batch` rows of at most `slots` tokens, by the stack's segments."""
    _, heads, width = self.kv_shape

    def empty(layers: int) -> jax.Array:
      return constrain(jnp.zeros((layers, batch, heads, slots, width), dtype), *_CACHED)

    return {name: (empty(count), empty(count)) for name, count in self.layers.sizes.items()}

  def _mask(self, length: int, **options: Any) -> tuple[Mask, dict[str, Any]]:
    """The mask over so many keys, and for the scan an array [L] of windows where layers differ in them."""
    windows = [length if window is None else min(window, length) for window in self.windows]
    # A window that hides nothing is none.
    values = tuple(sorted(set(windows))) if any(window < length for window in windows) else ()
    xs = {"window": np.array(windows, np.int32)} if len(values) > 1 else {}
    return Mask(causal=True, windows=values, **options), xs


def _of_layer(mask: Mask, xs: dict[str, Any]) -> Mask:
  """The mask with the window of one layer."""
  return dataclasses.replace(mask, window=xs["window"]) if "window" in xs else mask


OUTPUT_AXES = ("table", "vocab")
"""Logical axes of the output embedding [D, V]."""


class CausalLM(nnx.Module):
  """A decoder and its output embedding."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    D, V = config.hidden_size, config.vocab_size
    self.model = Decoder(config, rngs=rngs)
    tied = config.tie_word_embeddings
    self.lm_head = None if tied else Linear(D, V, bias=False, axes=OUTPUT_AXES, rngs=rngs)

  @property
  def output_embedding(self) -> Float[Array, "D V"]:
    """The matrix [D, V] from hidden states to scores."""
    if self.lm_head is None:
      return self.model.embed_tokens.embedding[...].T
    return self.lm_head.kernel[...]
