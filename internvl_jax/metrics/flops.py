"""Floating-point operations of a program's matrix products, counted from its jaxpr, before any compiler.

Unlike XLA's `cost_analysis`, the body of a loop counts as often as it runs, and nothing has to be compiled, so
that models of any size can be counted on any machine. Elementwise work is left out: it is bound by memory.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Products:
  """Matrix products of one line of a program.

  Attributes:
    flops: multiplications and additions, of all times that the line runs.
    scope: where in the program the line is: names given by `jax.named_scope`, and JAX's own for what
      differentiation makes, such as "transpose(jvp(decoder))".
    batched: whether the products are a batch of matrices by a batch of matrices, as in attention.
  """

  flops: int
  scope: str
  batched: bool = False


def count_flops(function: Callable, *args: Any) -> int:
  """Multiplications and additions in the matrix products of `function(*args)`; args may be shapes.

  A `while` loop counts once, since how often it runs is not known, and of a `cond` the dearest branch counts.
  """
  return sum(product.flops for product in list_products(function, *args))


def list_products(function: Callable, *args: Any) -> list[Products]:
  """The matrix products that `count_flops` adds up."""
  return list(_products(jax.make_jaxpr(function)(*args).jaxpr, ""))


def _products(jaxpr: core.Jaxpr, scope: str) -> Iterator[Products]:
  # What no output needs is not computed either: autodiff leaves such equations behind.
  needed = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
  for eqn in reversed(jaxpr.eqns):
    if needed.isdisjoint(eqn.outvars) and not eqn.effects:
      continue
    needed.update(var for var in eqn.invars if isinstance(var, core.Var))
    inner = str(eqn.source_info.name_stack)
    yield from _equation(eqn, f"{scope}/{inner}" if scope and inner else scope or inner)


def _equation(eqn: core.JaxprEqn, scope: str) -> Iterator[Products]:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contracting, _), (batch, _) = params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    flops = 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[axis] for axis in contracting)
    yield Products(flops, scope, batched=bool(batch))
  elif name == "ragged_dot_general" or name == "ragged_dot":
    # Every row meets one group's matrix [K, N], forward and in both gradients.
    shapes = [_shape(var) for var in (*eqn.invars[:2], *eqn.outvars)]
    rows = next(shape for shape in shapes if len(shape) == 2)[0]
    matrix = next(shape for shape in shapes if len(shape) == 3)
    yield Products(2 * rows * math.prod(matrix[1:]), scope)
  elif name == "shard_map":
    # Shapes inside are one device's. What several devices compute alike counts for each of them.
    for product in _products(params["jaxpr"], scope):
      yield dataclasses.replace(product, flops=params["mesh"].size * product.flops)
  elif name == "scan":
    for product in _products(params["jaxpr"].jaxpr, scope):
      yield dataclasses.replace(product, flops=params["length"] * product.flops)
  elif name == "cond":
    branches = [list(_products(branch.jaxpr, scope)) for branch in params["branches"]]
    yield from max(branches, key=lambda products: sum(product.flops for product in products))
  else:
    for inner in _inner_jaxprs(params):
      yield from _products(inner, scope)


def _shape(atom: Any) -> tuple[int, ...]:
  return atom.aval.shape


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
  inner = []
  for key, value in params.items():
    if key.startswith(("jvp_", "fwd_", "bwd")):
      continue  # The derivatives of a function that is only called here.
    if isinstance(value, core.ClosedJaxpr):
      inner.append(value.jaxpr)
    elif isinstance(value, core.Jaxpr):
      inner.append(value)
  return inner
