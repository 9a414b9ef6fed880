"""Weight decay towards the weights that a run began with, so that it forgets less of them (L2-SP, arXiv:1802.01483)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class StartState(NamedTuple):
  """The state of `decay_to_start`.

  Attributes:
    start: the parameters before the first step, by path, float32. It is in checkpoints, so that a run that goes on is held
      to where it began, whatever has become of the checkpoint it began with.
  """

  start: Any


def decay_to_start(strength: float) -> optax.GradientTransformation:
  """Adds strength * (weights - start) to the updates, which are then multiplied by minus the learning rate.

  With SGD that is the gradient of the paper's penalty, strength / 2 * |weights - start|^2. Adam would divide that gradient
  by the root of its mean squares, so that what has large gradients would be held least; here the penalty is decoupled from
  them, as AdamW's decay is (arXiv:1711.05101), and comes after the optimizer.

  Args:
    strength: Adam's updates are about 1 before the learning rate, so that each weight stays within about 1 / strength.
  """

  def init(params: optax.Params) -> StartState:
    # A copy: the step is given parameters to overwrite.
    return StartState(jax.tree.map(jnp.copy, params))

  def update(
    updates: optax.Updates, state: StartState, params: Any = None
  ) -> tuple[optax.Updates, StartState]:
    pulled = jax.tree.map(
      lambda update, weight, start: update + strength * (weight - start), updates, params, state.start
    )
    return pulled, state

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
