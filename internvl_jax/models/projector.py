"""From patches to the language model's width: pixel shuffle and a two-layer perceptron.

Letters: I tiles, P patches, C ViT width, D language model width.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from internvl_jax.models.layers import LayerNorm, Linear


def pixel_shuffle(x: Float[Array, "I P C"], *, ratio: float, version: str) -> Float[Array, "I new wide"]:
  """Merges square neighborhoods of patches into channels: [I, P, C] -> [I, P * ratio^2, C / ratio^2].

  The patches of one new token come in row-major order, each with all of its channels. Version "v1" (old
  checkpoints) returns the new tokens' grid transposed; "v2" keeps it upright.
  """
  I, P, C = x.shape
  side = round(P**0.5)
  assert side * side == P, f"{P} patches are not a square"
  merge, new = round(1 / ratio), round(side * ratio)
  x = x.reshape(I, new, merge, new, merge, C)
  order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
  return x.transpose(order).reshape(I, new * new, C * merge * merge)


class Projector(nnx.Module):
  """LayerNorm, linear, exact GELU, linear: from `d_in` = C / ratio^2 to `d_out` = D."""

  def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
    self.layer_norm = LayerNorm(d_in, eps=1e-5, axis="patch")
    self.linear_1 = Linear(d_in, d_out, bias=True, axes=("patch", "vision"), over="tiles", rngs=rngs)
    self.linear_2 = Linear(d_out, d_out, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)

  def __call__(self, x: Float[Array, "I P wide"]) -> Float[Array, "I P D"]:
    return self.linear_2(jax.nn.gelu(self.linear_1(self.layer_norm(x)), approximate=False))
