"""Parts of the ViT and the projector by themselves: which branch drop path acts on, and the exact GELU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.models.activations import BACKENDS
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.projector import Projector
from internvl_jax.models.towers.internvit import InternViTConfig, VisionLayer, VisionMLP


def test_drop_path_acts_on_each_branch_and_tile_by_itself():
  config = InternViTConfig(
    hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, patch_size=4, image_size=8
  )
  layer = VisionLayer(config, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (4, 5, 8))
  attention = layer.attn(layer.norm1(x), backend="xla")
  # Of four tiles: neither branch, attention alone, the perceptron alone, both at other scales.
  keep = jnp.array([[0.0, 2.0, 0.0, 0.5], [0.0, 0.0, 1.5, 3.0]])
  found = layer(x, keep, kernels=Kernels())
  middle = x + keep[0, :, None, None] * attention
  expected = middle + keep[1, :, None, None] * layer.mlp(layer.norm2(middle), backend="xla")
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(found[0], x[0])
  np.testing.assert_allclose(
    layer(x, None, kernels=Kernels()), layer(x, jnp.ones((2, 4)), kernels=Kernels()), atol=1e-6
  )


@pytest.mark.parametrize("part", [*(row.name for row in BACKENDS), "projector"])
def test_gelu_is_exact(part):
  """By the error function: its approximation by tanh is off by up to 5e-4."""
  x = np.linspace(-4, 4, 8)[None, None]
  if part != "projector":
    config = InternViTConfig(
      hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, patch_size=4, image_size=8
    )
    mlp = VisionMLP(config, nnx.Rngs(0))
    module = functools.partial(mlp, backend=part)
    first, second, inputs = mlp.fc1, mlp.fc2, x
  else:
    module = Projector(8, 8, rngs=nnx.Rngs(0))
    first, second = module.linear_1, module.linear_2
    inputs = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
  first.kernel[...] = second.kernel[...] = jnp.eye(8)
  expected = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in inputs.ravel()]
  np.testing.assert_allclose(module(jnp.asarray(x, jnp.float32)).ravel(), expected, rtol=0, atol=2e-6)
