"""Sampled answers by the step's own forward pass: how probable their tokens are, and which it would have drawn.

Letters: A micro-batches, R rows, S tokens of a row, G answers of a prompt, L the longest answer, E width.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from internvl_jax.parallel import rules
from internvl_jax.parallel.rules import constrain
from internvl_jax.tasks.grpo.batch import GrpoBatch
from internvl_jax.tasks.grpo.draws import Draws
from internvl_jax.tasks.grpo.objective import GroupRelativePolicy


class Told(NamedTuple):
  """What the forward pass tells of answers; of places behind an answer's end it means nothing.

  Attributes:
    logps: float32 [A, R, G, L], log-probabilities of the tokens at the temperature.
    tokens: int32 [A, R, G, L], what is drawn at each place by the logits there; the answers' own where nothing is.
  """

  logps: Any
  tokens: Any


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AnswerForward:
  """The forward pass of rows with answers, one program on the devices.

  Attributes:
    objective: whose forward pass it is.
    mesh: the devices.
    draws: how tokens are drawn; None: they are not.
  """

  objective: GroupRelativePolicy
  mesh: jax.sharding.Mesh | None
  draws: Draws | None = None

  def __call__(
    self, params: Mapping[str, jax.Array], batch: GrpoBatch, index: Int[Array, "A R"], step: int
  ) -> Told:
    """What the forward pass tells of the answers in a batch.

    Args:
      params: all parameters by path.
      batch: on the devices; of its arrays, those of tokens count.
      index: of the prompts, on the devices.
      step: whose answers they are.
    """
    return self.program(dict(params), batch, index, jnp.int32(step))

  @functools.cached_property
  def program(self) -> Callable[..., Any]:
    """The program, compiled once for every shape of rows."""
    return jax.jit(self.compute)

  def compute(
    self, params: dict[str, jax.Array], batch: GrpoBatch, index: Int[Array, "A R"], step: Int[Array, ""]
  ) -> Told:
    """What `__call__` returns; under `jax.jit`."""
    told = functools.partial(self._told, params, step)
    with rules.scope(self.mesh):
      if index.shape[0] > 1:
        return jax.lax.map(lambda one: told(*one), (batch, index))
      # As the step, which then has no loop.
      return jax.tree.map(lambda x: x[None], told(*jax.tree.map(lambda x: x[0], (batch, index))))

  def _told(
    self, params: dict[str, jax.Array], step: Int[Array, ""], batch: GrpoBatch, index: Int[Array, " R"]
  ) -> Told:
    """Of a micro-batch."""
    hidden, logps = self.objective.forward(params, batch)
    places = _places(batch, self.objective.generations, self.objective.longest)
    of_answers = functools.partial(_taken, places)
    if self.draws is None:
      return Told(of_answers(logps), of_answers(batch.rows.targets))
    draws, model = self.draws, self.objective.model.bind(params)
    keys = draws.keys(index, step)

    def draw(one: tuple[jax.Array, jax.Array]) -> jax.Array:
      hidden, place = one
      return draws.token(model.logits(hidden), keys, place)

    at_places = jnp.moveaxis(of_answers(constrain(hidden, "rows", None, None)), 2, 0)
    tokens = jax.lax.map(draw, (at_places, jnp.arange(len(at_places))))
    return Told(of_answers(logps), jnp.moveaxis(tokens, 0, 2))


def _places(batch: GrpoBatch, answers: int, longest: int) -> Int[Array, "R G L"]:
  """Where in its row the token is that predicts each token of each answer; 0 where there is none."""
  owner, positions = batch.owner, batch.rows.positions
  R, S = owner.shape
  # All answers to a prompt begin at one position.
  first = jnp.min(jnp.where(owner > 0, positions, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
  slot = jnp.where(owner > 0, (owner - 1) * longest + positions - first, answers * longest)
  found = jnp.zeros((R, answers * longest + 1), jnp.int32)
  found = found.at[jnp.arange(R)[:, None], slot].set(jnp.arange(S, dtype=jnp.int32))
  return found[:, :-1].reshape(R, answers, longest)


def _taken(places: jax.Array, values: jax.Array) -> jax.Array:
  """Values [R, S, ...] at places [R, G, L]."""
  flat = places.reshape(*places.shape[:1], -1, *[1] * (values.ndim - 2))
  return jnp.take_along_axis(values, flat, axis=1).reshape(*places.shape, *values.shape[2:])
