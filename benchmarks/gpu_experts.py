"""Experts alone: the grouped matmul's numbers against `ragged_dot` in float32, and its times at a layer of 30B-A3B.

Letters: M rows (a token for each of its experts), D width, F width of an expert, G experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_attention import add_errors, attempt
from gpu_results import Results
from internvl_jax.models.grouped_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """A grouped matmul: rows [M, D] by matrices [G, D, F]."""

  name: str
  M: int
  D: int
  F: int
  G: int

  def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, matrices and sizes; groups are as uneven as routers make them, and a few rows belong to none."""
    rows, matrices = (
      jax.random.normal(key, shape, jnp.bfloat16)
      for key, shape in zip(
        jax.random.split(jax.random.key(0)), ((self.M, self.D), (self.G, self.D, self.F)), strict=True
      )
    )
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(self.M - self.M // 64, rng.dirichlet(np.full(self.G, 4.0)))
    return rows, matrices / self.D**0.5, jnp.asarray(sizes, jnp.int32)

  def useful_flops(self) -> int:
    """Forward, of the rows that belong to a group; forward and backward need three times that."""
    return 2 * (self.M - self.M // 64) * self.D * self.F


def outputs_and_gradients(backend: str) -> Callable:
  """The jitted function of (rows, matrices, sizes) -> the product, and gradients of a number that all of it changes."""

  def run(rows, matrices, sizes):
    belongs = (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None]
    out = jnp.where(belongs, grouped_matmul(rows, matrices, sizes, backend=backend), 0)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  def both(rows, matrices, sizes):
    (_, out), (by_row, by_matrix) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
      rows, matrices, sizes
    )
    return {"out": out, "drows": by_row, "dmatrices": by_matrix}

  return jax.jit(both)


def compare(results: Results, unit: str, *, toy: bool) -> None:
  """The kernels in bfloat16 against `ragged_dot` in float32 of the same numbers, and in bfloat16 beside them."""
  layer = Layer(name="toy", M=128, D=32, F=48, G=4) if toy else Layer(name="", M=4096, D=2048, F=768, G=16)
  rows, matrices, sizes = layer.inputs()
  with jax.default_matmul_precision("highest"):
    exact = outputs_and_gradients("xla")(*(x.astype(jnp.float32) for x in (rows, matrices)), sizes)
  exact = jax.device_get(exact)
  for backend in ("triton_interpret" if toy else "triton", "xla"):
    case = f"grouped matmul, {layer.M} x {layer.D} by {layer.G} x {layer.F}"
    add_errors(results, unit, case, backend, exact, outputs_and_gradients(backend), rows, matrices, sizes)


def layers(toy: bool) -> list[Layer]:
  """What is timed: the products of a layer of InternVL3.5-30B-A3B for 8,192 tokens, of 8 experts each."""
  if toy:
    return [Layer(name="toy", M=64, D=16, F=32, G=4)]
  sizes = {"M": 8 * 8192, "G": 128}
  return [
    Layer(name="30B-A3B, gate or up", D=2048, F=768, **sizes),
    Layer(name="30B-A3B, down", D=768, F=2048, **sizes),
  ]


def measure(results: Results, unit: str, *, toy: bool) -> None:
  """Times of the products, by each backend."""
  for layer in layers(toy):
    inputs = layer.inputs()
    for backend in ("triton_interpret" if toy else "triton", "xla"):

      def forward(rows, matrices, sizes, backend=backend):
        return grouped_matmul(rows, matrices, sizes, backend=backend)

      flops = layer.useful_flops()
      functions = {
        "forward": (jax.jit(forward), flops),
        "forward and backward": (outputs_and_gradients(backend), 3 * flops),
      }
      for which, (function, needed) in functions.items():
        row: dict[str, Any] = {"case": layer.name, "heads": "", "backend": backend, "pass": which}
        row["mib"] = round(sum(x.nbytes for x in inputs) / 2**20, 1)
        attempt(results, unit, row, function, needed, *inputs)
