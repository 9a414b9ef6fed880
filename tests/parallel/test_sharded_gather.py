"""Features come from their rows' own pool, and vectors of weights stay whole."""

import jax
import jax.numpy as jnp
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.parallel.sharded_gather import take_features


@pytest.mark.parametrize("devices", [1, 2])
def test_rows_read_the_pool_of_their_shard(devices):
  """Two shards of two rows each, on one device and on one for each."""
  features = jnp.arange(6.0).reshape(2, 3, 1)
  index = jnp.array(
    [[0, 2], [1, 9], [0, 2], [1, -1]]
  )  # Places outside are clipped; what is there is not used.
  mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
  with rules.scope(mesh):
    found = jax.jit(take_features)(*jax.device_put((features, index), rules.replicated(mesh)))
  assert found[:, :, 0].tolist() == [[0, 2], [1, 2], [3, 5], [4, 3]]


def test_vectors_stay_whole_and_matrices_are_sharded():
  mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
  assert rules.weight_entries(("embed",), (16,), mesh) == [()]
  assert rules.weight_entries(("layers", "embed"), (4, 16), mesh) == [(), ()]
  assert any(rules.weight_entries(("embed", "mlp"), (16, 32), mesh))
