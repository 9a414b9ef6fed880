"""Orbax checkpoints hold the train state bit for bit, and refuse another run's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from harness import on_one_device
from internvl_jax.checkpoint import Checkpointer
from internvl_jax.errors import UserError
from internvl_jax.state import TrainState


def make_state(**params):
  mask = {path: path.endswith("kernel") for path in params}
  optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=mask))
  arrays = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
  return TrainState.create(arrays, optimizer, on_one_device(arrays))


def test_save_and_restore(tmp_path):
  state = make_state(**{"a.0:3.kernel": np.arange(6.0).reshape(3, 2), "b": [1.0, 2.0]})
  state = jax.tree.map(lambda leaf: leaf + 3, state)
  writer = Checkpointer(tmp_path, keep=2)
  writer.save(state, loader={"next_step": 3}, trainer={"log_history": [{"loss": 1.5}]})
  writer.wait()
  writer.close()

  reader = Checkpointer(tmp_path, keep=2)
  assert reader.latest_step == 3
  like = make_state(**{"a.0:3.kernel": np.zeros((3, 2)), "b": [0.0, 0.0]})
  restored, loader, trainer = reader.restore(like)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert loader == {"next_step": 3} and trainer == {"log_history": [{"loss": 1.5}]}
  with pytest.raises(UserError, match=r"first: a\.0:3\.kernel is \(3, 2\) there, None here"):
    reader.restore(make_state(b=[0.0, 0.0]))
  reader.close()
