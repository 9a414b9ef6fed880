"""The kernels for experts compute what `ragged_dot` does; here they are interpreted."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.models.functional import define
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.grouped_matmul import BACKENDS, grouped_matmul, triton
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.moe import MoEConfig
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules

INTERPRETED = [row.name for row in BACKENDS if row.interpret]


def arrays(rows, width, out, groups, dtype="f4"):
  rng = np.random.default_rng(0)
  shapes = (rows, width), (groups, width, out), (rows, out)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def products(backend, sizes, x, w, cotangent):
  """A product and its gradients, where rows of no group count for nothing."""
  belongs = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]

  def run(x, w):
    return jnp.where(belongs, grouped_matmul(x, w, sizes, backend=backend), 0)

  y, pull = jax.vjp(run, x, w)
  return y, *pull(cotangent)


def assert_near(ours, theirs, *, relative=0.0):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    one, other = np.asarray(one, "f8"), np.asarray(other, "f8")
    np.testing.assert_allclose(one, other, rtol=relative, atol=1e-5 * max(np.abs(other).max(), 1e-6))


SHAPES = [
  (256, 128, 256, [100, 0, 156]),  # A border within a tile, and a group without rows.
  (90, 1100, 24, [10, 30, 20]),  # Rows of no tile, rows of no group, and a width of no whole tiles.
]
SMALL = [
  (60, 24, 136, [0, 60, 0, 0]),  # One group has everything.
  (200, 40, 72, [0, 130, 1, 0, 50]),  # More tiles than one, widths of no whole tiles.
  (20, 16, 16, [0, 0]),  # No group has anything.
  (7, 16, 16, [3, 4]),  # Fewer rows than a tile.
]


@pytest.mark.parametrize(
  ("backend", "shape"),
  [(backend, shape) for backend in INTERPRETED for shape in SHAPES]
  + [("triton_interpret", shape) for shape in SMALL],
)
def test_products_and_gradients_agree(backend, shape):
  *lengths, sizes = shape
  inputs = jnp.array(sizes), *arrays(*lengths, len(sizes))
  assert_near(products(backend, *inputs), products("xla", *inputs))


def test_bfloat16_is_rounded_once():
  sizes = jnp.array([50, 0, 21, 100])
  inputs = arrays(180, 200, 72, 4, jnp.bfloat16)
  ours = products("triton_interpret", sizes, *inputs)
  assert {y.dtype for y in ours} == {jnp.dtype(jnp.bfloat16)}
  # Half of the last of eight bits, and the order of the sums.
  assert_near(ours, products("xla", sizes, *(x.astype("f4") for x in inputs)), relative=2**-8)


def test_a_group_does_not_depend_on_what_others_hold():
  sizes = jnp.array([21, 30, 25])
  x, w, cotangent = arrays(90, 40, 24, 3)
  own = slice(21, 51)
  mine = (jnp.arange(90) >= own.start) & (jnp.arange(90) < own.stop)
  y, dx, dw = products("triton_interpret", sizes, x, w, cotangent)
  spoilt = [jnp.where(mine[:, None], a, jnp.nan) for a in (x, cotangent)]
  other_w = jnp.full_like(w, jnp.nan).at[1].set(w[1])
  found = products("triton_interpret", sizes, spoilt[0], other_w, spoilt[1])
  for one, other in zip((y[own], dx[own], dw[1]), (found[0][own], found[1][own], found[2][1]), strict=True):
    np.testing.assert_array_equal(one, other)


def test_in_loops_that_compute_again():
  x, w, _ = arrays(60, 32, 32, 3)
  matrices = jnp.stack([w, w[::-1]]) / 6

  def run(backend, x, matrices, sizes):
    @jax.checkpoint
    def layer(x, w):
      return jnp.sin(x + grouped_matmul(x, w, sizes, backend=backend)), None

    def loss(x, matrices):
      return jnp.sum(jax.lax.scan(layer, x, matrices)[0] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, matrices)

  run = jax.jit(run, static_argnums=0)
  sizes = jnp.array([20, 0, 40])
  assert_near(run("triton_interpret", x, matrices, sizes), run("xla", x, matrices, sizes))


def test_programs_may_run_in_any_order(monkeypatch):
  """Interpreted ones run in turns, and a later one would hide that an earlier one wrote into its rows."""
  sizes, inputs = jnp.array([20, 0, 40]), arrays(90, 24, 16, 3)
  expected = products("triton_interpret", sizes, *inputs)
  cut = triton.cut
  monkeypatch.setattr(triton, "cut", lambda *a: triton.Slots(*(part[::-1] for part in cut(*a))))
  backwards = jax.jit(lambda *a: products.__wrapped__("triton_interpret", *a))(sizes, *inputs)
  for one, other in zip(backwards, expected, strict=True):
    np.testing.assert_array_equal(one, other)


# --- What the grid of programs covers -----------------------------------------------------------------------


@pytest.mark.parametrize("height", [16, 128])
def test_slots_cover_each_row_once(height):
  rng = np.random.default_rng(2)
  cases = [rng.multinomial(rows, rng.dirichlet(np.full(9, alpha))) for rows in (5, 700) for alpha in (0.1, 9)]
  for *sizes, _ in cases:
    rows = 705
    group, first, end = (np.asarray(a) for a in triton.cut(jnp.array(sizes, jnp.int32), rows, height))
    covered = np.concatenate([np.arange(a, min(a + height, b)) for a, b in zip(first, end, strict=True)])
    np.testing.assert_array_equal(np.sort(covered), np.arange(rows))
    expected = np.repeat(np.arange(9), [*sizes, rows - sum(sizes)])
    for g, a, b in zip(group, first, end, strict=True):
      assert set(expected[a : min(a + height, b)]) <= {g}
    # Work in proportion to the rows: those of other groups are in nobody's tile.
    assert np.sum(first < end) <= rows / height + len(sizes) + 1


def test_slots_of_a_layer_of_30b():
  """A quarter more than the rows fill, whatever each of 128 experts gets; a dense product takes 128 times the rows."""
  assert triton.count_slots(65_536, 128, 128) == 640
  assert triton.count_slots(65_536, 128, 128) * 128 == 1.25 * 65_536


def test_float32_is_multiplied_as_precision_asks():
  sizes, inputs = jnp.array([8, 8]), arrays(16, 16, 16, 2)

  def precisions():
    # A function of its own for each trace, or the first is found again.
    run = lambda *a: products.__wrapped__("triton_interpret", *a)  # noqa: E731
    kernels = str(jax.make_jaxpr(run)(sizes, *inputs))
    return kernels.count("dot_general["), kernels.count("HIGHEST")

  # Said in both cases: another file's fixture may have left a process that computes in float32.
  with jax.default_matmul_precision("default"):
    assert precisions() == (3, 0)
  with jax.default_matmul_precision("highest"):
    dots, highest = precisions()
  assert dots == 3 and highest >= dots


# --- Names --------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_refused():
  with pytest.raises(ValueError, match="unknown backend 'cutlass': use one of megablox, triton"):
    grouped_matmul(*arrays(4, 4, 4, 1)[:2], jnp.array([4]), backend="cutlass")


def test_kernels_are_imported_when_they_are_used():
  script = "import sys, internvl_jax.models.moe; print(*(name for name in sys.modules if 'pallas.' in name))"
  found = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  ).stdout.split()
  assert not [name for name in found if name.startswith("jax.experimental.pallas.")]


# --- Layers -------------------------------------------------------------------------------------------------


def layer_and_inputs(config):
  rng = np.random.default_rng(1)
  layer = define(lambda rngs: config.build(16, rngs))
  params = {
    path: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32) for path, leaf in layer.shapes.items()
  }

  def run(backend, params, x):
    def loss(params, x):
      return jnp.sum(jnp.sin(layer.bind(params)(x, valid=None, kernels=Kernels(experts=backend))[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

  return jax.jit(run, static_argnums=0), layer, params, jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)


@pytest.mark.parametrize("backend", INTERPRETED)
def test_layers_agree_on_one_device(backend):
  run, _, *inputs = layer_and_inputs(GptOssMLPConfig(num_experts=4, top_k=2, intermediate_size=24))
  assert_near(run(backend, *inputs), run("xla", *inputs))


@pytest.mark.parametrize("backend", INTERPRETED)
def test_layers_agree_where_devices_have_a_part_of_the_experts(backend):
  """Rows that other devices compute belong to no group here."""
  run, layer, params, x = layer_and_inputs(
    MoEConfig(num_experts=4, top_k=2, intermediate_size=24, normalize_top_k=True)
  )
  expected = run("xla", params, x)
  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])
  placed = jax.device_put(params, rules.weight_shardings(layer.axes, layer.shapes, mesh))
  assert placed["experts.up_proj"].sharding.spec[0] == "expert"
  with rules.scope(mesh):
    found = run(backend, placed, x)
  assert_near(found, expected)
