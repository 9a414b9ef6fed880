"""The optimizer step: one jitted function of state, frozen weights and batch.

Nothing here depends on the data's values, so every host runs the same program; it is compiled once for each
shape of batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from internvl_jax.batch import Batch, BatchCounts, count
from internvl_jax.models.internvl import Execution
from internvl_jax.objectives import Outcome
from internvl_jax.parallel import rules
from internvl_jax.parallel.rules import StateShardings
from internvl_jax.state import TrainState, opt_state_shardings

OPTIMIZER_SCOPE = "optimizer"
"""Name of the optimizer's part of the traced program."""


class Objective(Protocol):
  """A loss over one micro-batch; see `objectives`."""

  def weights(self, batch: Any) -> Any:
    """Normalized weights of an optimizer batch, each with a leading A."""
    ...

  @property
  def how(self) -> Execution:
    """How its forward passes are computed."""
    ...

  def plain(self) -> "Objective":
    """The same by the plainest code on one shard: what the operations of a step are counted by."""
    ...

  def initial_running(self) -> dict[str, jax.Array]:
    """The statistics that go on from batch to batch, before the first."""
    ...

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: Any,
    weights: Any,
    key: jax.Array,
    running: dict[str, jax.Array],
    *,
    share: float,
  ) -> tuple[jax.Array, Outcome]: ...


class StepMetrics(NamedTuple):
  """Scalars of one optimizer step, over the rows of all hosts.

  Attributes:
    loss: mean over the micro-batches.
    grad_norm: before clipping.
    skipped: loss or gradient was not finite, so that nothing was changed.
    counts: what the batch held.
    terms: what else the objective tells, by name: sums over the micro-batches of what they have weighted.
  """

  loss: jax.Array
  grad_norm: jax.Array
  skipped: jax.Array
  counts: BatchCounts
  terms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
  """Everything an optimizer step is made of; call it under `jax.jit`.

  Attributes:
    objective: the loss.
    optimizer: makes of gradients what is added to the parameters (`optim.optimizer.make_optimizer`).
    seed: of drop path and dropout.
    places: the state's shardings, and with them the mesh; None is one device.
  """

  objective: Objective
  optimizer: optax.GradientTransformationExtraArgs
  seed: int
  places: StateShardings | None = None

  def __call__(
    self, state: TrainState, frozen: dict[str, jax.Array], batch: Batch, learning_rate: jax.Array
  ) -> tuple[TrainState, StepMetrics]:
    """Takes one step; one whose loss or gradient is not finite leaves parameters and moments as they are.

    Args:
      state: its buffers may be donated.
      frozen: parameters that do not train: no gradient is computed for them, nor for what only they need.
      batch: A micro-batches, whose gradients are summed.
      learning_rate: float32 scalar.
    """
    (loss, outcome), grads = self.value_and_grad(state.params, frozen, batch, state.step, state.running)
    norm = optax.tree.norm(grads)
    # Updated in the sharding of the moments, and then resharded as parameters are.
    params = self._place(state.params, "moments")
    with jax.named_scope(OPTIMIZER_SCOPE):
      updates, opt_state = self.optimizer.update(
        grads, state.opt_state, params, grad_norm=norm, learning_rate=learning_rate
      )
    params = jax.tree.map(jnp.add, params, updates)
    if self.places is not None:
      opt_state = jax.lax.with_sharding_constraint(
        opt_state, opt_state_shardings(opt_state, params, self.places)
      )
    # A choice between values, not a branch: hosts cannot part ways, and it costs nothing beside the update.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state, running = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (self._place(params, "params"), opt_state, outcome.running),
      (state.params, state.opt_state, state.running),
    )
    metrics = StepMetrics(loss, norm, ~finite, count(batch), outcome.terms)
    return TrainState(state.step + 1, params, opt_state, running), metrics

  def _place(self, tree: dict[str, jax.Array], kind: Literal["params", "gradients", "moments"]):
    """Reshards a tree by path as the state's arrays of that kind are."""
    if self.places is None:
      return tree
    places = getattr(self.places, kind)
    return {path: jax.lax.with_sharding_constraint(leaf, places[path]) for path, leaf in tree.items()}

  def value_and_grad(
    self,
    params: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    batch: Batch,
    step: jax.Array,
    running: dict[str, jax.Array],
  ) -> tuple[tuple[jax.Array, Outcome], dict[str, jax.Array]]:
    """Loss and outcome of an optimizer batch, and its gradients, summed over micro-batches in float32."""
    with rules.scope(None if self.places is None else self.places.mesh):
      return self._value_and_grad(params, frozen, batch, step, running)

  def _value_and_grad(self, params, frozen, batch, step, running):
    weights = self.objective.weights(batch)
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    A = batch.rows.input_ids.shape[0]

    def loss_of(params, micro, weights, key, running):
      return self.objective.loss({**frozen, **params}, micro, weights, key, running, share=1 / A)

    def value_and_grad(micro, weights, i, running):
      value, grads = jax.value_and_grad(loss_of, has_aux=True)(
        params, micro, weights, jax.random.fold_in(key, i), running
      )
      return value, self._place(grads, "gradients")

    def add(carry, inputs):
      (total, running), (micro, weights, i) = carry, inputs
      (loss, outcome), grads = value_and_grad(micro, weights, i, running)
      return (jax.tree.map(jnp.add, total, (loss, grads)), outcome.running), outcome.terms

    if A == 1:
      first, its_weights = jax.tree.map(lambda leaf: leaf[0], (batch, weights))
      return value_and_grad(first, its_weights, 0, running)
    zero = (jnp.float32(0), self._place(jax.tree.map(jnp.zeros_like, params), "gradients"))
    ((loss, grads), running), terms = jax.lax.scan(add, (zero, running), (batch, weights, jnp.arange(A)))
    return (loss, Outcome(running, jax.tree.map(lambda values: jnp.sum(values, axis=0), terms))), grads
