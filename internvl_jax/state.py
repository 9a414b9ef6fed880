"""What a run changes, and what it only reads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.models.base_weights import as_kernels, is_part
from internvl_jax.models.functional import ModelDef
from internvl_jax.parallel.rules import StateShardings, device_count, replicated
from internvl_jax.trees import count, submodule_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """The part of a run that an optimizer step changes; this is what a checkpoint holds.

  Attributes:
    step: int32, optimizer steps taken.
    params: the trainable parameters by path, float32.
    opt_state: the optimizer's state, for the trainable parameters alone.
    running: the objective's statistics that go on from batch to batch: float32 arrays by name, or none.
  """

  step: jax.Array
  params: dict[str, jax.Array]
  opt_state: optax.OptState
  running: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @property
  def keeps_average(self) -> bool:
    """Whether the optimizer keeps averages of the weights; see `model_params`."""
    return optax.tree.get(self.opt_state, "average") is not None

  def model_params(self, *, average: bool = True) -> dict[str, jax.Array]:
    """The parameters by which the model is scored and exported: the optimizer's averages, where it keeps some.

    Averages are arrays by path under the name `average` in the optimizer's state; see `optim.average`. They are sharded as
    the parameters are.

    Args:
      average: False takes the parameters themselves (`checkpoint.export_average`).
    """
    if not average or not self.keeps_average:
      return self.params
    averages: Any = optax.tree.get(self.opt_state, "average")
    shardings = {path: self.params[path].sharding for path in averages}
    return {**self.params, **jax.jit(lambda tree: tree, out_shardings=shardings)(averages)}

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
      params: the trainable parameters, sharded.
      optimizer: what makes the moments.
      places: the shardings of the state.
      initial_running: what makes the objective's statistics.
    """
    # Made on the devices: of a number that comes from the hosts, JAX would ask all of them whether it is the same.
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated(places.mesh))()
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_state_shardings(shapes, params, places))(params)
    return cls(step, params, opt_state, jax.jit(initial_running, out_shardings=replicated(places.mesh))())

  @classmethod
  def abstract(
    cls,
    params: Mapping[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    places: StateShardings,
    initial_running: Callable[[], dict[str, jax.Array]] = dict,
  ) -> Any:
    """The shapes and shardings of what `create` makes."""
    opt_state: Any = jax.eval_shape(optimizer.init, dict(params))
    opt_state = jax.tree.map(
      lambda leaf, place: leaf.update(sharding=place),
      opt_state,
      opt_state_shardings(opt_state, params, places),
    )
    whole = replicated(places.mesh)
    step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    running: Any = jax.tree.map(lambda leaf: leaf.update(sharding=whole), jax.eval_shape(initial_running))
    return cls(step, dict(params), opt_state, running)  # pyright: ignore[reportArgumentType]


def opt_state_shardings(
  opt_state: optax.OptState, params: Mapping[str, Any], places: StateShardings
) -> optax.OptState:
  """The shardings of an optimizer's state, by the shapes of its arrays.

  An array of a parameter's shape is sharded as `places.moments` says. One that lacks an axis of it (Adafactor's mean squares
  by row and by column) is sharded along the others, and one with an axis of blocks of it (the scales of moments of eight
  bits) along that axis as well, if its devices divide the blocks. All else is replicated.

  Args:
    opt_state: arrays or shapes.
    params: the parameters by path, or their shapes.
    places: where moments are.
  """
  whole = replicated(places.mesh)

  def place(keys: tuple, leaf: Any) -> NamedSharding:
    path = parameter_of(keys, params)
    return whole if path is None else _reduced(leaf.shape, params[path].shape, places.moments[path])

  return jax.tree_util.tree_map_with_path(place, opt_state)


def parameter_of(keys: tuple, params: Mapping[str, Any]) -> str | None:
  """The parameter that an array of an optimizer's state belongs to; None: to all of them."""
  names = [str(getattr(key, "key", "")) for key in keys]
  return next((name for name in reversed(names) if name in params), None)


def _reduced(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
  """The sharding of an array of that shape beside one of the shape `whole`; replicated if their shapes do not agree."""
  if shape == whole:
    return sharding
  entries = [*sharding.spec, *[None] * (len(whole) - len(sharding.spec))]
  if len(shape) == len(whole) > 1 and all(
    size % blocks == 0 for size, blocks in zip(whole, shape, strict=True)
  ):
    kept = [
      entry if blocks % device_count(_axes_of(entry), sharding.mesh) == 0 else None
      for entry, blocks in zip(entries, shape, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
  for axis in range(len(whole)):
    if shape == whole[:axis] + whole[axis + 1 :]:
      return NamedSharding(sharding.mesh, PartitionSpec(*entries[:axis], *entries[axis + 1 :]))
  return replicated(sharding.mesh)  # pyright: ignore[reportArgumentType]


def _axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The axes of the mesh in an entry of a spec."""
  return (entry,) if isinstance(entry, str) else entry or ()


def with_dtypes(model: ModelDef, trainable: set[str], *, bf16: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """Storage of every parameter: float32 where it trains, else the compute dtype; parts of quantized ones have their own."""
  frozen = jnp.bfloat16 if bf16 else jnp.float32

  def dtype(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    return leaf.dtype if is_part(path) else jnp.float32 if path in trainable else frozen

  return {path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf)) for path, leaf in model.shapes.items()}


def parameter_table(params: Mapping[str, Any], state: TrainState) -> str:
  """A table of the model's parts: parameters, those that train, bytes of optimizer state.

  Args:
    params: all parameters by path, or their shapes.
    state: of those that train: shapes suffice.
  """
  held: dict[str, int] = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    if (path := parameter_of(keys, state.params)) is not None:
      held[path] = held.get(path, 0) + leaf.size * leaf.dtype.itemsize
  params = as_kernels(params)
  lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}{'optimizer bytes':>18}"]
  for part in [*dict.fromkeys(submodule_of(path) for path in params), "total"]:
    inside = {path: leaf for path, leaf in params.items() if part in (submodule_of(path), "total")}
    training = count({path: leaf for path, leaf in inside.items() if path in state.params})
    size = sum(held.get(path, 0) for path in inside)
    lines.append(f"{part:<16}{count(inside):>16,}{training:>16,}{size:>18,}")
  return "\n".join(lines)
