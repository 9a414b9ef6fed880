"""The dense decoder: one file for every dense family, told apart by data.

Letters: B rows, T tokens, D width, N query heads, K key-value heads, H head width, F mlp width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.attention import attention
from internvl_jax.models.layers import Embed, LayerStack, Linear, RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and switches of a dense decoder."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  qkv_bias: bool = False


class KVCache(nnx.Pytree):
  """Keys and values of the tokens seen so far, for every layer.

  Attributes:
    k, v: [layers, B, S, K, H].
    segment_ids: int [B, S]; 0 marks slots that no query may see.
  """

  def __init__(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array):
    self.k = nnx.data(k)
    self.v = nnx.data(v)
    self.segment_ids = nnx.data(segment_ids)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (arXiv:2104.09864), in float32, on halves as Hugging Face lays them out.

  Args:
    x: [B, T, heads, H].
    positions: int [B, T].
    theta: base of the wavelengths.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DecoderAttention(nnx.Module):
  """Causal self-attention with grouped key-value heads and rotary positions."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    bias = config.qkv_bias
    self.num_heads, self.num_kv_heads, self.head_dim = N, K, H
    self.rope_theta = config.rope_theta
    self.q_proj = Linear(D, N * H, bias=bias, axes=("embed", "heads"), rngs=rngs)
    self.k_proj = Linear(D, K * H, bias=bias, axes=("embed", "kv_heads"), rngs=rngs)
    self.v_proj = Linear(D, K * H, bias=bias, axes=("embed", "kv_heads"), rngs=rngs)
    self.o_proj = Linear(N * H, D, bias=False, axes=("heads", "embed"), rngs=rngs)

  def __call__(self, x, *, positions, segment_ids, kv_segment_ids, cache, offset, backend):
    """Attends over x [B, T, D]; with a cache (k, v) over what it holds, x's own keys written at `offset`."""
    B, T, _ = x.shape
    q = rope(self.q_proj(x).reshape(B, T, self.num_heads, self.head_dim), positions, self.rope_theta)
    k = rope(self.k_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim), positions, self.rope_theta)
    v = self.v_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
    q_index = None
    if cache is not None:
      k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), offset, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), offset, axis=1)
      q_index = offset + jnp.arange(T)
    out = attention(
      q,
      k,
      v,
      segment_ids=segment_ids,
      kv_segment_ids=kv_segment_ids,
      q_index=q_index,
      causal=True,
      backend=backend,
    )
    return self.o_proj(out.reshape(B, T, -1)), (k, v)


class DecoderMLP(nnx.Module):
  """SwiGLU (arXiv:2002.05202)."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, F = config.hidden_size, config.intermediate_size
    self.gate_proj = Linear(D, F, bias=False, axes=("embed", "mlp"), rngs=rngs)
    self.up_proj = Linear(D, F, bias=False, axes=("embed", "mlp"), rngs=rngs)
    self.down_proj = Linear(F, D, bias=False, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
  """One pre-norm block."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    D, eps = config.hidden_size, config.rms_norm_eps
    self.self_attn = DecoderAttention(config, rngs)
    self.mlp = DecoderMLP(config, rngs)
    self.input_layernorm = RMSNorm(D, eps=eps)
    self.post_attention_layernorm = RMSNorm(D, eps=eps)

  def __call__(self, x: jax.Array, **attend) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y, kv = self.self_attn(self.input_layernorm(x), **attend)
    x = x + y
    return x + self.mlp(self.post_attention_layernorm(x)), kv


class Decoder(nnx.Module):
  """Embedding table, blocks and final norm."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.kv_shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
    self.layers = LayerStack(lambda r: DecoderLayer(config, r), bounds=(0, config.num_layers), rngs=rngs)
    self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

  def __call__(
    self,
    x: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    backend: str = "auto",
    remat: Callable | None = None,
    unroll: int = 1,
  ) -> jax.Array:
    """Runs embeddings x [B, T, D] to normalised hidden states [B, T, D].

    Args:
      x: token embeddings with image features in place, in the compute dtype.
      positions: int [B, T], for the rotary embedding.
      segment_ids, kv_segment_ids, backend: see `attention`.
      remat, unroll: see `LayerStack.scan`.
    """

    def apply(layer, x, _):
      x, _ = layer(
        x,
        positions=positions,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        cache=None,
        offset=None,
        backend=backend,
      )
      return x, {}

    x, _ = self.layers.scan(apply, x, remat=remat, unroll=unroll)
    return self.norm(x)

  def extend(
    self, x: jax.Array, cache: KVCache, offset: jax.Array, *, positions: jax.Array, segment_ids: jax.Array
  ) -> tuple[jax.Array, KVCache]:
    """Runs the next T tokens of every row against a cache, writing them at slots offset..offset+T-1.

    Args:
      x: [B, T, D]. positions: int [B, T].
      cache: what the rows hold so far.
      offset: scalar int, the slot of the first of these tokens, the same for every row.
      segment_ids: int [B, T]; 0 marks padding, which nobody will see.
    """
    kv_segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, offset, axis=1)

    def apply(layer, x, xs):
      x, (k, v) = layer(
        x,
        positions=positions,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segments,
        cache=(xs["k"], xs["v"]),
        offset=offset,
        backend="auto",
      )
      return x, {"k": k, "v": v}

    x, kv = self.layers.scan(apply, x, xs={"k": cache.k, "v": cache.v})
    return self.norm(x), KVCache(kv["k"], kv["v"], kv_segments)

  def make_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    layers, heads, width = self.kv_shape
    shape = (layers, batch, length, heads, width)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32))


class CausalLM(nnx.Module):
  """A decoder and its output embedding, untied."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.model = Decoder(config, rngs=rngs)
    self.lm_head = Linear(
      config.hidden_size, config.vocab_size, bias=False, axes=("embed", "vocab"), rngs=rngs
    )
