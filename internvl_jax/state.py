"""What a run changes, and what it only reads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from internvl_jax.models.functional import ModelDef
from internvl_jax.parallel.rules import StateShardings, replicated
from internvl_jax.trees import count, submodule_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """The part of a run that an optimizer step changes; this is what a checkpoint holds.

  Attributes:
    step: int32, optimizer steps taken.
    params: the trainable parameters by path, float32.
    opt_state: the optimizer's moments, for the trainable parameters alone.
    running: the objective's statistics that go on from batch to batch: float32 scalars by name, or none.
  """

  step: jax.Array
  params: dict[str, jax.Array]
  opt_state: optax.OptState
  running: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @classmethod
  def create(
    cls,
    params: dict[str, jax.Array],
    optimizer: optax.GradientTransformation,
    places: StateShardings,
    initial_running: Callable[[], dict[str, jax.Array]] = dict,
  ) -> "TrainState":
    """The state before the first step.

    Args:
      params: the trainable parameters, where they lie.
      optimizer: what makes the moments.
      places: where everything lies.
      initial_running: what makes the objective's statistics.
    """
    # Made on the devices: of a number that comes from the hosts, JAX would ask all of them whether it is the same.
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated(places.mesh))()
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_state_shardings(shapes, places))(params)
    return cls(step, params, opt_state, jax.jit(initial_running, out_shardings=replicated(places.mesh))())

  @classmethod
  def abstract(
    cls,
    params: Mapping[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    places: StateShardings,
    initial_running: Callable[[], dict[str, jax.Array]] = dict,
  ) -> Any:
    """The shapes of what `create` makes, and where they lie."""
    opt_state: Any = jax.eval_shape(optimizer.init, dict(params))
    opt_state = jax.tree.map(
      lambda leaf, place: leaf.update(sharding=place), opt_state, opt_state_shardings(opt_state, places)
    )
    whole = replicated(places.mesh)
    step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    running: Any = jax.tree.map(lambda leaf: leaf.update(sharding=whole), jax.eval_shape(initial_running))
    return cls(step, dict(params), opt_state, running)  # pyright: ignore[reportArgumentType]


def opt_state_shardings(opt_state: optax.OptState, places: StateShardings) -> optax.OptState:
  """Where the arrays of an optimizer's state lie: moments as `places` says, the rest on every device."""

  def place(keys: tuple, leaf: Any) -> NamedSharding:
    del leaf
    return places.moments.get(str(getattr(keys[-1], "key", "")), replicated(places.mesh))

  return jax.tree_util.tree_map_with_path(place, opt_state)


def with_dtypes(model: ModelDef, trainable: set[str], *, bf16: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """Storage of every parameter: float32 where it trains, else the compute dtype."""
  frozen = jnp.bfloat16 if bf16 else jnp.float32
  return {
    path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if path in trainable else frozen)
    for path, leaf in model.shapes.items()
  }


def parameter_table(params: Mapping[str, Any], trainable: set[str]) -> str:
  """A table of the model's parts: parameters, those that train, bytes of optimizer state."""
  lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}{'optimizer bytes':>18}"]
  parts = list(dict.fromkeys(submodule_of(path) for path in params))
  for part in [*parts, "total"]:
    inside = {p: leaf for p, leaf in params.items() if part in (submodule_of(p), "total")}
    training = count({p: leaf for p, leaf in inside.items() if p in trainable})
    moments = 2 * training * np.dtype(np.float32).itemsize
    lines.append(f"{part:<16}{count(inside):>16,}{training:>16,}{moments:>18,}")
  return "\n".join(lines)
