"""Floating-point operations of a program's matrix products, counted from its jaxpr, before any compiler.

Unlike XLA's `cost_analysis`, the body of a loop counts as often as it runs, and nothing has to be compiled, so
that models of any size can be counted on any machine. Elementwise work is left out: it is bound by memory.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable, *args: Any) -> int:
  """Multiplications and additions in the matrix products of `function(*args)`; args may be shapes.

  A `while` loop counts once, since how often it runs is not known, and of a `cond` the dearest branch counts.
  """
  return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
  # What no output needs is not computed either: autodiff leaves such equations behind.
  needed = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    if needed.isdisjoint(eqn.outvars) and not eqn.effects:
      continue
    needed.update(var for var in eqn.invars if isinstance(var, core.Var))
    total += _equation_flops(eqn)
  return total


def _equation_flops(eqn: core.JaxprEqn) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contracting, _), _ = params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[axis] for axis in contracting)
  if name == "ragged_dot_general" or name == "ragged_dot":
    # Every row meets one group's matrix [K, N], forward and in both gradients.
    shapes = [_shape(var) for var in (*eqn.invars[:2], *eqn.outvars)]
    rows = next(shape for shape in shapes if len(shape) == 2)[0]
    matrix = next(shape for shape in shapes if len(shape) == 3)
    return 2 * rows * math.prod(matrix[1:])
  if name == "shard_map":
    # Shapes inside are one device's. What several devices compute alike counts for each of them.
    return params["mesh"].size * _jaxpr_flops(params["jaxpr"])
  if name == "scan":
    return params["length"] * _jaxpr_flops(params["jaxpr"].jaxpr)
  if name == "cond":
    return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
  return sum(_jaxpr_flops(inner) for inner in _inner_jaxprs(params))


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
