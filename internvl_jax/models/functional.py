"""A model as a definition and a flat dictionary of parameters (see `internvl_jax.trees`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Key

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef(Generic[M]):
  """A model without its numbers: the NNX graph, and each parameter's path, shape and logical axes."""

  graph: nnx.GraphDef[M]
  variables: tuple[tuple[tuple[Any, ...], nnx.Variable[Any]], ...]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by path."""
    return {_dotted(path): jax.ShapeDtypeStruct(var.shape, var.dtype) for path, var in self.variables}

  @property
  def axes(self) -> dict[str, tuple[str | None, ...]]:
    """Logical axis names of every parameter, by path."""
    return {_dotted(path): var.get_metadata("out_sharding") for path, var in self.variables}

  def bind(self, params: Mapping[str, jax.Array]) -> M:
    """The module with these parameters in it."""
    leaves = [(path, var.replace(params[_dotted(path)])) for path, var in self.variables]
    return nnx.merge(self.graph, nnx.from_flat_state(leaves))


def define(build: Callable[[nnx.Rngs], M]) -> ModelDef[M]:
  """The definition of what `build` makes, without making any array."""
  graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
  return ModelDef(graph, tuple((path, var) for path, var in nnx.to_flat_state(state)))


def initialize(build: Callable[[nnx.Rngs], nnx.Module], key: Key[Array, ""]) -> dict[str, jax.Array]:
  """Fresh parameters by path. Run it under `jax.jit` with `out_shardings` to make them where they belong."""
  _, state = nnx.split(build(nnx.Rngs(key)))
  return {_dotted(path): var[...] for path, var in nnx.to_flat_state(state)}


def _dotted(path: tuple[Any, ...]) -> str:
  # LayerStack keeps its segments in a dictionary of that name, which says nothing in a path.
  return ".".join(str(p) for p in path if p != "segments")
