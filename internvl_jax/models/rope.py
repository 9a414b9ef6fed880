"""Rotary position embedding (arXiv:2104.09864) and the ways to stretch it beyond the trained length.

Letters: B rows, T tokens, N heads, H head width.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """The plain embedding: pair i of H/2 turns by `theta ** (-2i / H)` radians a position.

  Attributes:
    theta: base of the wavelengths.
  """

  theta: float = 10000.0

  @property
  def scale(self) -> float:
    """Factor of cos and sin."""
    return 1.0

  @property
  def fixed_up_to(self) -> int | None:
    """Length up to which frequencies do not depend on the row's length; None: they never do."""
    return None

  def frequencies(
    self, dim: int, length: Int[Array, "*rows"] | int
  ) -> Float[Array, "*rows half"] | Float[np.ndarray, " half"]:
    """Radians a position: [..., dim/2] for rows of so many positions (`length` [...])."""
    del length
    return _inverse_frequencies(self.theta, dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
  """Positions divided by `factor` (arXiv:2306.15595)."""

  factor: float

  def frequencies(
    self, dim: int, length: Int[Array, "*rows"] | int
  ) -> Float[Array, "*rows half"] | Float[np.ndarray, " half"]:
    del length
    return _inverse_frequencies(self.theta, dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRope(Rope):
  """Dynamic NTK: the base grows with rows longer than the trained length.

  base = theta * (factor * length / trained_length - (factor - 1)) ** (H / (H - 2))
  """

  factor: float
  trained_length: int

  @property
  def fixed_up_to(self) -> int | None:
    return self.trained_length

  def frequencies(self, dim: int, length: Int[Array, "*rows"] | int) -> Float[Array, "*rows half"]:
    stretched = jnp.maximum(jnp.asarray(length, jnp.float32), self.trained_length) / self.trained_length
    base = self.theta * (self.factor * stretched - (self.factor - 1)) ** (dim / (dim - 2))
    return base[..., None] ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
  """Llama 3.1's: long wavelengths are divided by `factor`, short ones stay, those between are blended."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  trained_length: int

  def frequencies(self, dim: int, length: Int[Array, "*rows"] | int) -> Float[np.ndarray, " half"]:
    del length
    plain = _inverse_frequencies(self.theta, dim)
    turns = self.trained_length * plain / (2 * math.pi)  # within the trained length
    blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * plain / self.factor + blend * plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
  """Searched factors for every pair, one list for rows within the trained length and one for longer ones.

  Source: arXiv:2402.13753; Phi-3 calls it "su" or "longrope".

  Attributes:
    short_factors, long_factors: divisors of the frequencies, dim/2 each.
    trained_length: rows longer than this take the long list.
    stretch: the longest length supported over the trained one; it fixes the scale.
    attention_factor: the scale, where it is stated.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  trained_length: int
  stretch: float
  attention_factor: float | None = None

  @property
  def scale(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    return math.sqrt(1 + math.log(self.stretch) / math.log(self.trained_length)) if self.stretch > 1 else 1.0

  @property
  def fixed_up_to(self) -> int | None:
    return self.trained_length

  def frequencies(self, dim: int, length: Int[Array, "*rows"] | int) -> Float[Array, "*rows half"]:
    plain = _inverse_frequencies(self.theta, dim)
    is_long = jnp.asarray(length)[..., None] > self.trained_length
    return jnp.where(is_long, plain / np.array(self.long_factors), plain / np.array(self.short_factors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
  """YaRN (arXiv:2309.00071): pairs that turn less than `beta_slow` times are interpolated, more than `beta_fast` not.

  `truncate` rounds the borders to whole pairs.
  """

  factor: float
  trained_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None

  @property
  def scale(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

  def frequencies(self, dim: int, length: Int[Array, "*rows"] | int) -> Float[np.ndarray, " half"]:
    del length
    plain = _inverse_frequencies(self.theta, dim)

    def pair_of(turns: float) -> float:
      """The pair that makes so many turns within the trained length."""
      return dim * math.log(self.trained_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Equal borders would divide by zero; a small width makes a step of the ramp.
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / self.factor * ramp + plain * (1 - ramp)


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
  return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def rotations(
  rope: Rope, positions: Int[Array, "B T"], dim: int, *, bound: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
  """Cosines and sines [B, T, dim/2] in float32 for positions [B, T].

  Where frequencies depend on the length, a row's is its largest position plus one, so that rows do not depend
  on each other. The reference takes the padded length of the whole batch; both are the same up to the trained
  length.

  Args:
    rope: the embedding.
    positions: int [B, T].
    dim: head width.
    bound: a length that no row exceeds.
  """
  depends = rope.fixed_up_to is not None and bound > rope.fixed_up_to
  length = jnp.max(positions, axis=1) + 1 if depends else bound
  frequencies = jnp.asarray(rope.frequencies(dim, length), jnp.float32)
  frequencies = frequencies[:, None] if depends else frequencies
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(
  x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
  """Turns x [B, T, N, H] in float32, pairing element i with i + H/2 as Hugging Face's checkpoints do."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
