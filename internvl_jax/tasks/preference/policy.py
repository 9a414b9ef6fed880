"""The reference policy in memory: what of the model runs a second time, and the frozen copies that it needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.hf.model import Source
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import InternVL
from internvl_jax.trees import select, submodule_of

COPIES = "reference/"
"""What the paths of parameters begin with that the reference policy has copies of."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReferencePolicy:
  """The policy as it was at the start: copies of what trains, and all else shared with the policy.

  Attributes:
    model: its definition: the policy's, or that without the adapters that were attached for this run.
    shares_features: nothing of the ViT and the projector trains, so that the policy's features are also its own.
  """

  model: ModelDef[InternVL]
  shares_features: bool

  @property
  def parts(self) -> tuple[str, ...]:
    """The parts of the model that it runs."""
    return ("language_model",) if self.shares_features else ("vision_model", "mlp1", "language_model")

  def bind(self, params: Mapping[str, jax.Array]) -> InternVL:
    """The module, from all parameters by path, the copies among them."""
    return self.model.bind(
      {path: params[COPIES + path if COPIES + path in params else path] for path in self.model.shapes}
    )


def reference_policy(source: Source, trainable: set[str]) -> ReferencePolicy:
  """The policy as it is before the first step, without the adapters that are attached for this run.

  Adapters that the checkpoint brings are a part of it.

  Args:
    source: the model.
    trainable: the paths of the parameters that train.
  """
  return ReferencePolicy(
    model=source.without_fresh_adapters(),
    shares_features=not any(submodule_of(path) in ("vision_model", "mlp1") for path in trainable),
  )


def abstract_copies(
  source: Source, params: Mapping[str, Any], trainable: set[str], *, bf16: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of the frozen copies that the reference policy has of what trains.

  Kernels and tables are in the compute dtype, to which the policy's are rounded, too; what the model reads in float32
  (norms, biases, routers) stays so, or the reference would not be the policy that it is a copy of.

  Args:
    source: the model.
    params: all parameters by path, or their shapes, with their shardings.
    trainable: the paths of those that train.
    bf16: the compute dtype is bfloat16.
  """
  copied = select(params, trainable & set(reference_policy(source, trainable).model.shapes))
  half = jnp.bfloat16 if bf16 else jnp.float32

  def dtype(path: str) -> jnp.dtype:
    names = [name for name in source.model.axes[path] if name != "layers"]
    return half if len(names) > 1 and None not in names else jnp.float32

  return {
    COPIES + path: jax.ShapeDtypeStruct(leaf.shape, dtype(path), sharding=leaf.sharding)
    for path, leaf in copied.items()
  }
