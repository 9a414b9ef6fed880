"""The optimizer: one optax transformation."""

import jax.numpy as jnp
import numpy as np

from internvl_jax.arguments import TrainingArguments
from internvl_jax.optim.optimizer import clip_by_global_norm, make_optimizer


def test_adamw_step_by_hand():
  training = TrainingArguments(weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8)
  optimizer = make_optimizer(training, {path: path for path in ("a.kernel", "a.bias")}, "bias")
  params = {"a.kernel": jnp.array([2.0]), "a.bias": jnp.array([2.0])}
  state = optimizer.init(params)
  grads = {"a.kernel": jnp.array([0.5]), "a.bias": jnp.array([0.5])}
  updates, _ = optimizer.update(grads, state, params)
  # The first step's moments, bias-corrected, are the gradient and its square.
  np.testing.assert_allclose(updates["a.kernel"], 0.5 / (0.5 + 1e-8) + 0.1 * 2.0, rtol=1e-6)
  np.testing.assert_allclose(updates["a.bias"], 0.5 / (0.5 + 1e-8), rtol=1e-6)


def test_clipping():
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  clipped, norm = clip_by_global_norm(grads, 1.0)
  assert norm == 5.0
  np.testing.assert_allclose(clipped["b"], 0.8, rtol=1e-6)
  assert clip_by_global_norm(grads, 10.0)[0]["a"] == 3.0
  assert clip_by_global_norm(grads, 0.0)[0]["b"] == 4.0
