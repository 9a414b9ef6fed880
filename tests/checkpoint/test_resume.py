"""Orbax checkpoints hold the train state bit for bit, and refuse another run's parameters."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.checkpoint.manager import NewestAndOne
from internvl_jax.errors import UserError
from internvl_jax.outputs import checkpoint_steps, newest_checkpoint
from internvl_jax.state import TrainState
from tests.support.harness import on_one_device


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


def test_the_newest_is_restored_and_kept(tmp_path):
  """Of steps whose names sort otherwise; the optimizer's numbers and the log are of the same step."""
  state = make_state(b=[1.0, 2.0])
  writer = Checkpointer(tmp_path, keep=2)
  for step in (8, 9, 10):
    later = jax.tree.map(lambda leaf, step=step: leaf + step, state)
    writer.save(later, loader={"next_step": step}, trainer={"log_history": [{"step": step}]})
    writer.wait()
  assert writer.steps == [9, 10] and writer.latest_step == 10
  writer.close()
  assert newest_checkpoint(str(tmp_path)) == 10 and checkpoint_steps(str(tmp_path)) == [10, 9]

  reader = Checkpointer(tmp_path, keep=2)
  assert reader.latest_step == 10
  restored, loader, trainer = reader.restore(state)
  assert loader == {"next_step": 10} and trainer == {"log_history": [{"step": 10}]}
  np.testing.assert_array_equal(restored.params["b"], [11, 12])
  assert [int(leaf.max()) for leaf in jax.tree.leaves(restored.opt_state)] == [10] * 3
  older, _, _ = reader.restore(state, step=9)
  assert int(older.step) == 9
  reader.close()


def test_the_newest_and_the_best_are_kept():
  """Whatever order they are listed in; what is asked for may be among the newest, or nothing."""
  listed = [SimpleNamespace(step=step) for step in (9, 8, 11, 10)]

  def kept(spare):
    preserved = NewestAndOne(2, lambda steps: spare).should_preserve(listed, context=None)
    return {info.step for info, keeps in zip(listed, preserved, strict=True) if keeps}

  assert kept(8) == {8, 10, 11} and kept(11) == kept(None) == {10, 11}


def test_a_checkpoint_has_the_log_of_its_step(tmp_path, monkeypatch):
  """Also where the run has gone on before Orbax's thread writes it."""
  went_on = threading.Event()
  write = ocp.JsonCheckpointHandler._save_fn

  async def write_late(self, item, directory):
    assert went_on.wait(60)
    await write(self, item, directory)

  monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", write_late)
  state = make_state(b=[1.0, 2.0])
  log, loader = {"log_history": [{"step": 0}], "pending": [1.5]}, {"next_step": 0, "rows": {"waiting": [3]}}
  writer = Checkpointer(tmp_path, keep=2)
  writer.save(state, loader=loader, trainer=log)
  log["log_history"].append({"step": 1})
  log["pending"].clear()
  loader["rows"]["waiting"].append(4)
  went_on.set()
  writer.wait()
  _, saved_loader, saved_log = writer.restore(state)
  assert saved_log == {"log_history": [{"step": 0}], "pending": [1.5]}
  assert saved_loader == {"next_step": 0, "rows": {"waiting": [3]}}
  writer.close()
