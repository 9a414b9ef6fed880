"""The kernels for TPUs compute what the backend for everything does; here they are interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.arguments import MeshConfig
from internvl_jax.models.attention import attention, backend_for
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules

ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 16


def arrays(length, sinks=False, heads=HEADS, kv_heads=KV_HEADS, rows=ROWS):
  rng = np.random.default_rng(0)
  found = {
    "q": rng.normal(size=(rows, length, heads, WIDTH)),
    "k": rng.normal(size=(rows, length, kv_heads, WIDTH)),
    "v": rng.normal(size=(rows, length, kv_heads, WIDTH)),
  }
  if sinks:
    found["sinks"] = rng.normal(size=heads)
  return {name: value.astype("f4") for name, value in found.items()}


def segments(length, rows=ROWS):
  """Three samples a row and padding, cut elsewhere in each row."""
  cuts = np.array([[length // 4 + 3 * row, length // 2, length - 7] for row in range(rows)])
  return jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1) + 1) % 4


def loss_and_gradients(inputs, backend, **options):
  """A number that all outputs change, and its gradient by every input."""

  def run(inputs):
    out = attention(
      inputs["q"], inputs["k"], inputs["v"], sinks=inputs.get("sinks"), backend=backend, **options
    )
    return jnp.sum(jnp.sin(out) * jnp.arange(1, WIDTH + 1)), out

  return jax.jit(jax.value_and_grad(run, has_aux=True))(inputs)


def compare(inputs, **options):
  expected = loss_and_gradients(inputs, "xla", **options)
  found = loss_and_gradients(inputs, "splash_interpret", **options)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
  ("length", "options"),
  [
    (256, {"causal": True, "segment_ids": segments(256)}),
    (200, {"causal": True, "segment_ids": segments(200)}),  # Padded to whole blocks.
    (128, {"causal": True}),
    (
      145,
      {"causal": False, "over": "tiles"},
    ),  # As a ViT's patches and class token: of no multiple, one segment.
    (256, {"causal": True, "segment_ids": segments(256), "window": 40}),
  ],
)
def test_outputs_and_gradients_agree(length, options):
  compare(arrays(length), **options)


def test_sinks_and_windows_that_differ_by_layer():
  """As in gpt-oss, whose layers are scanned: which window it is, only the running program knows."""
  inputs = arrays(256, sinks=True)
  for window in (40, 256):
    options = {"causal": True, "segment_ids": segments(256), "windows": (40, 256)}
    compare(inputs, window=jnp.asarray(window), **options)


def test_a_window_of_unknown_values_is_refused():
  inputs = arrays(128)
  with pytest.raises(ValueError, match="'xla'"):
    attention(inputs["q"], inputs["k"], inputs["v"], causal=True, window=jnp.asarray(3), backend="splash")


@pytest.mark.parametrize(
  ("axes", "heads"),
  [
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, 4),  # Heads over both; of keys, one for two devices.
    ({"sequence": 4, "data": 2}, 6),  # Four do not divide the heads, so queries are split.
  ],
)
def test_on_a_mesh_under_scan_and_rematerialisation(axes, heads):
  """Layers are scanned and rematerialised around the kernels, which see a device's heads and queries."""
  length, rows = 512, 2
  mesh = meshes.make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[: np.prod(list(axes.values()))])
  inputs = arrays(length, heads=heads, kv_heads=2, rows=rows)
  ids = segments(length, rows)

  def layers(inputs, backend):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, scale):
      q = rules.constrain(x * scale, "rows", "tokens", None, None)
      y = attention(q, inputs["k"], inputs["v"], segment_ids=ids, causal=True, backend=backend)
      return x + y, None

    out, _ = jax.lax.scan(layer, inputs["q"], jnp.array([1.0, 0.5]))
    return jnp.sum(jnp.sin(out))

  expected = jax.jit(jax.value_and_grad(functools.partial(layers, backend="xla")))(inputs)
  placed = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec()))
  with rules.scope(mesh):
    found = jax.jit(jax.value_and_grad(functools.partial(layers, backend="splash_interpret")))(placed)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-4)


def test_auto_is_what_the_platform_has():
  assert [backend_for("auto", platform) for platform in ("tpu", "gpu", "cpu")] == ["splash", "xla", "xla"]
  assert backend_for("xla", "tpu") == "xla"
