"""The TPU's kernels for experts compute what `ragged_dot` does; here they are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.models.functional import define
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.ragged import ragged_product
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules


def both(run):
  return [jax.jit(run, static_argnums=0)(backend) for backend in ("xla", "splash_interpret")]


@pytest.mark.parametrize(
  ("rows", "width", "out", "sizes"),
  [
    (256, 128, 256, [100, 0, 156]),  # A border within a tile, and a group without rows.
    (90, 1100, 24, [10, 30, 20]),  # Rows of no tile, rows of no group, and a width of no whole tiles.
  ],
)
def test_products_and_gradients_agree(rows, width, out, sizes):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(rows, width)).astype("f4"), rng.normal(size=(3, width, out)).astype("f4")
  cotangent = rng.normal(size=(rows, out)).astype("f4")
  used = sum(sizes)

  def run(backend):
    y, pull = jax.vjp(lambda x, w: ragged_product(x, w, jnp.array(sizes), backend=backend)[:used], x, w)
    return y, *pull(cotangent[:used])

  for theirs, ours in zip(*both(run), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def layer_and_inputs(config):
  rng = np.random.default_rng(1)
  layer = define(lambda rngs: config.build(16, rngs))
  params = {
    path: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32) for path, leaf in layer.shapes.items()
  }

  def run(backend, params, x):
    def loss(params, x):
      return jnp.sum(jnp.sin(layer.bind(params)(x, valid=None, backend=backend)[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  return jax.jit(run, static_argnums=0), layer, params, jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)


def assert_equal(ours, theirs):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_layers_agree_on_one_device():
  run, _, *inputs = layer_and_inputs(GptOssMLPConfig(num_experts=4, top_k=2, intermediate_size=24))
  assert_equal(run("splash_interpret", *inputs), run("xla", *inputs))


def test_layers_agree_where_devices_have_a_part_of_the_experts():
  """Rows that other devices compute belong to no group here."""
  run, layer, params, x = layer_and_inputs(
    MoEConfig(num_experts=4, top_k=2, intermediate_size=24, normalize_top_k=True)
  )
  expected = run("xla", params, x)
  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])
  placed = jax.device_put(params, rules.weight_shardings(layer.axes, layer.shapes, mesh))
  assert placed["experts.up_proj"].sharding.spec[0] == "expert"
  with rules.scope(mesh):
    found = run("splash_interpret", placed, x)
  assert_equal(found, expected)
