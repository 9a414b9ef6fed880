"""Parts of the optimizer that optax has otherwise: what they need to know of a step comes as keyword arguments of `update`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def clip_by_global_norm(
  inner: optax.GradientTransformation, max_norm: float
) -> optax.GradientTransformationExtraArgs:
  """Clips gradients to a global norm, as `torch.nn.utils.clip_grad_norm_` does, before `inner` gets them.

  Gradients are multiplied by min(1, max_norm / (norm + 1e-6)); optax's own has no 1e-6. `update` takes the norm as `grad_norm`
  (float32 scalar), so that what is logged is what is clipped by. The state is that of `inner`.

  Args:
    inner: what gets the clipped gradients.
    max_norm: 0 leaves the gradients as they are.
  """
  inner = optax.with_extra_args_support(inner)

  def update(
    grads: Any, state: optax.OptState, params: Any = None, *, grad_norm: jax.Array, **extra: Any
  ) -> tuple[Any, optax.OptState]:
    if max_norm > 0:
      scale = jnp.minimum(1.0, max_norm / (grad_norm + 1e-6))
      grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
    return inner.update(grads, state, params, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]


def scale_by_learning_rate(scales: Mapping[str, np.ndarray]) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the learning rate, which `update` takes as `learning_rate` (float32 scalar).

  The rate comes from the host at every step (`learning_rate.make_schedule`), so that what is logged is what is used.

  Args:
    scales: what multiplies the rate of some parameters, by path (`rates.rate_scales`).
  """

  def rate_of(path: str, update: jax.Array, learning_rate: jax.Array) -> jax.Array:
    if path not in scales:
      return learning_rate
    scale = scales[path]
    return learning_rate * scale.reshape(scale.shape + (1,) * (update.ndim - scale.ndim))

  def update(
    updates: Any, state: optax.OptState, params: Any = None, *, learning_rate: jax.Array, **extra: Any
  ) -> tuple[Any, optax.OptState]:
    del params, extra
    return {path: -rate_of(path, leaf, learning_rate) * leaf for path, leaf in updates.items()}, state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)  # pyright: ignore[reportArgumentType]
