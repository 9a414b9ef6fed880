"""Decay towards the start: L2-SP's penalty, decoupled from Adam's mean squares, from a copy that is in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.state import TrainState, parameter_table
from tests.optim.test_optimizer import KERNEL, SHAPES, run_of, updated


def test_with_sgd_it_is_the_gradient_of_the_papers_penalty():
  start, strength = {"a": jnp.array([2.0, -1.0])}, 0.3
  target = jnp.array([0.5, 4.0])

  def loss(params):
    penalty = 0.5 * strength * jnp.sum((params["a"] - start["a"]) ** 2)
    return 0.5 * jnp.sum((params["a"] - target) ** 2) + penalty

  params, grads = start, []
  for _ in range(3):
    grads.append({"a": params["a"] - target})
    params = jax.tree.map(lambda value, grad: value - 0.25 * grad, params, jax.grad(loss)(params))
  ours, _ = updated(start, *grads, optim="sgd", l2_to_start=strength, rate=0.25, max_grad_norm=0)
  np.testing.assert_allclose(ours["a"], params["a"], rtol=1e-6)


def test_with_adam_a_weight_stays_within_one_over_the_strength():
  """Whatever its gradients are: divided by Adam, too, the penalty would be nothing beside those of 100."""
  for size in (0.01, 100.0):
    grads = [{"a": -size}] * 200
    after, _ = updated({"a": 5.0}, *grads, l2_to_start=4.0, rate=0.05, max_grad_norm=0)
    assert float(after["a"]) == pytest.approx(5.0 + 1 / 4, rel=1e-4)
  free, _ = updated({"a": 5.0}, *[{"a": -1.0}] * 200, rate=0.05, max_grad_norm=0)
  assert float(free["a"]) > 14


def test_rates_by_part_scale_it_as_they_scale_weight_decay():
  labels = {"mlp1.a": "mlp1", "vision_model.a": "vision_model"}
  settings = {"optim": "sgd", "l2_to_start": 0.5, "max_grad_norm": 0}
  settings["scales"] = {"vision_model.a": np.float32(0.1)}
  zero, one = dict.fromkeys(labels, 0.0), dict.fromkeys(labels, 1.0)
  after, _ = updated(zero, one, zero, labels=labels, **settings)
  np.testing.assert_allclose(after["mlp1.a"], -1 + 0.5)
  np.testing.assert_allclose(after["vision_model.a"], 0.1 * (-1 + 0.1 * 0.5), rtol=1e-6)


SETTINGS = {"l2_to_start": 2.0, "optim_args": "ema_decay=0.5"}


def test_on_a_mesh_the_start_is_sharded_as_moments_are():
  one, _ = run_of(2, **SETTINGS)
  many, _ = run_of(2, mesh={"fsdp": 2, "data": 2}, **SETTINGS)
  free, _ = run_of(2)
  start = optax.tree.get(many.opt_state, "start")
  assert start[KERNEL].sharding.spec == PartitionSpec(None, "fsdp", "data")
  for path in SHAPES:
    np.testing.assert_allclose(many.params[path], one.params[path], atol=1e-5)
    np.testing.assert_array_equal(start[path], run_of(0)[0].params[path])
    assert np.abs(np.asarray(one.params[path]) - np.asarray(free.params[path])).max() > 1e-3


def test_a_run_goes_on_from_its_checkpoint_with_the_start_of_the_first(tmp_path):
  straight, _ = run_of(3, **SETTINGS)
  state, step = run_of(2, **SETTINGS)
  writer = Checkpointer(tmp_path, keep=1)
  writer.save(state, loader={}, trainer={})
  writer.wait()
  restored, _, _ = writer.restore(TrainState.abstract(state.params, step.optimizer, step.places))
  writer.close()
  after, _ = run_of(1, state=restored, **SETTINGS)
  jax.tree.map(np.testing.assert_array_equal, straight, after)


def test_it_is_counted_and_costs_nothing_where_it_is_off():
  shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
  trains = 4 * sum(map(np.prod, SHAPES.values()))
  for setting, moments in ((0.0, 2), (2.0, 3)):
    state, _ = run_of(0, l2_to_start=setting)
    total = parameter_table(shapes, state).splitlines()[-1].split()[-1]
    assert int(total.replace(",", "")) == moments * trains
    assert (optax.tree.get(state.opt_state, "start") is None) == (setting == 0.0)
