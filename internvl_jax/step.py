"""The optimizer step: one jitted function of state, frozen weights and batch.

Nothing here depends on the data's values, so every host runs the same program; it is compiled once for each
shape of batch.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from internvl_jax.batch import BatchCounts, SFTBatch, count
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import normalized_weights
from internvl_jax.optim import clip_by_global_norm
from internvl_jax.parallel import rules
from internvl_jax.parallel.rules import StateShardings
from internvl_jax.state import TrainState, opt_state_shardings


class Objective(Protocol):
  """A loss over one micro-batch; see `objectives.SupervisedFineTuning`."""

  def loss(
    self, model: InternVL, batch: SFTBatch, weights: jax.Array, key: jax.Array, *, share: float
  ) -> jax.Array: ...


class StepMetrics(NamedTuple):
  """Scalars of one optimizer step, over the rows of all hosts.

  Attributes:
    loss: mean over the micro-batches.
    grad_norm: before clipping.
    skipped: loss or gradient was not finite, so that nothing was changed.
    counts: what the batch held.
  """

  loss: jax.Array
  grad_norm: jax.Array
  skipped: jax.Array
  counts: BatchCounts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
  """Everything an optimizer step is made of; call it under `jax.jit`.

  Attributes:
    model: the definition that parameters are bound to.
    objective: the loss.
    optimizer: AdamW's direction (`optim.make_optimizer`).
    max_grad_norm: global norm to clip to; 0 is off.
    shards: data shards.
    all_gather: see `objectives.normalized_weights`.
    seed: of drop path and dropout.
    places: where the state lies, and with it the mesh that the work is spread over; None is one device.
  """

  model: ModelDef[InternVL]
  objective: Objective
  optimizer: optax.GradientTransformation
  max_grad_norm: float
  shards: int
  all_gather: bool
  seed: int
  places: StateShardings | None = None

  def __call__(
    self, state: TrainState, frozen: dict[str, jax.Array], batch: SFTBatch, learning_rate: jax.Array
  ) -> tuple[TrainState, StepMetrics]:
    """Takes one step; one whose loss or gradient is not finite leaves parameters and moments as they are.

    Args:
      state: its buffers may be donated.
      frozen: parameters that do not train: no gradient is computed for them, nor for what only they need.
      batch: A micro-batches, whose gradients are summed.
      learning_rate: float32 scalar.
    """
    loss, grads = self.value_and_grad(state.params, frozen, batch, state.step)
    grads, norm = clip_by_global_norm(grads, self.max_grad_norm)
    # Updated where the moments lie, and then put where parameters lie.
    params = self._place(state.params, "moments")
    updates, opt_state = self.optimizer.update(grads, state.opt_state, params)
    params = jax.tree.map(lambda value, update: value - learning_rate * update, params, updates)
    if self.places is not None:
      opt_state = jax.lax.with_sharding_constraint(opt_state, opt_state_shardings(opt_state, self.places))
    # A choice between values, not a branch: hosts cannot part ways, and it costs nothing beside the update.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (self._place(params, "params"), opt_state),
      (state.params, state.opt_state),
    )
    return TrainState(state.step + 1, params, opt_state), StepMetrics(loss, norm, ~finite, count(batch))

  def _place(self, tree: dict[str, jax.Array], kind: Literal["params", "gradients", "moments"]):
    """A tree by path, where the state's arrays of that kind lie."""
    if self.places is None:
      return tree
    places = getattr(self.places, kind)
    return {path: jax.lax.with_sharding_constraint(leaf, places[path]) for path, leaf in tree.items()}

  def value_and_grad(
    self, params: dict[str, jax.Array], frozen: dict[str, jax.Array], batch: SFTBatch, step: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of an optimizer batch and its gradients, summed over micro-batches in float32."""
    with rules.scope(None if self.places is None else self.places.mesh):
      return self._value_and_grad(params, frozen, batch, step)

  def _value_and_grad(self, params, frozen, batch, step):
    weights = normalized_weights(batch.loss_weight, shards=self.shards, all_gather=self.all_gather)
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    A = weights.shape[0]

    def loss_of(params, micro, weights, key):
      return self.objective.loss(self.model.bind({**frozen, **params}), micro, weights, key, share=1 / A)

    def value_and_grad(micro, weights, i):
      loss, grads = jax.value_and_grad(loss_of)(params, micro, weights, jax.random.fold_in(key, i))
      return loss, self._place(grads, "gradients")

    def add(total, inputs):
      micro, weights, i = inputs
      return jax.tree.map(jnp.add, total, value_and_grad(micro, weights, i)), None

    if A == 1:
      first = jax.tree.map(lambda leaf: leaf[0], batch)
      return value_and_grad(first, weights[0], 0)
    zero = (jnp.float32(0), self._place(jax.tree.map(jnp.zeros_like, params), "gradients"))
    total, _ = jax.lax.scan(add, zero, (batch, weights, jnp.arange(A)))
    return total
