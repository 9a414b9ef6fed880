"""Averages of the weights, as a model is often better with them than with its last weights (arXiv:1803.05407)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from internvl_jax.errors import UserError


class AverageState(NamedTuple):
  """The state of `average_weights`.

  Attributes:
    average: the averages by path, float32. `TrainState.model_params` finds them by this name.
  """

  average: Any


def average_weights(decay: float) -> optax.GradientTransformation:
  """Exponential moving average (EMA) of the weights: a <- decay * a + (1 - decay) * weights, after each step.

  Comes last in a chain: it takes the updates as those that are added to the weights, and leaves them as they are. Before the
  first step the averages are the weights, so that nothing is to be corrected.

  Args:
    decay: 0 is the last weights; 0.999 averages over about 1,000 steps.

  Raises:
    UserError: the decay is not in [0, 1).
  """
  if not 0 <= decay < 1:
    raise UserError(f"training.optim_args: ema_decay={decay:g} must be at least 0 and below 1")

  def init(params: optax.Params) -> AverageState:
    # A copy: the step is given parameters and averages to overwrite, which it is not if they are one buffer.
    return AverageState(jax.tree.map(jnp.copy, params))

  def update(
    updates: optax.Updates, state: AverageState, params: Any = None
  ) -> tuple[optax.Updates, AverageState]:
    weights = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, weights)
    return updates, AverageState(average)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
