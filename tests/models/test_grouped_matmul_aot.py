"""Experts' kernels are compiled for NVIDIA's cards, without one: that they compile, and what memory they take."""

import jax
import pytest

from tests.support.cards import apart, compile_for, needs_compiler


def layer_of_30b(backend, dtype):
  """A layer of 30B-A3B's experts, forward and backward, and the shapes that it takes: 65,536 rows."""
  from internvl_jax.models.functional import define
  from internvl_jax.models.kernels import Kernels
  from internvl_jax.models.moe import MoEConfig

  config = MoEConfig(num_experts=128, top_k=8, intermediate_size=768, normalize_top_k=True)
  layer = define(lambda rngs: config.build(2048, rngs))
  x = jax.ShapeDtypeStruct((1, 8192, 2048), dtype)
  params = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in layer.shapes.items()}

  def run(params, x, cotangent):
    kernels = Kernels(experts=backend)
    y, pull = jax.vjp(lambda params, x: layer.bind(params)(x, valid=None, kernels=kernels)[0], params, x)
    return y, pull(cotangent)

  return run, (params, x, x)


def odd_widths(backend, dtype):
  """gpt-oss's widths, of no whole tiles."""
  from internvl_jax.models.grouped_matmul import grouped_matmul

  shapes = (4096, 2880), (32, 2880, 5760), (4096, 5760)
  rows, matrices, cotangent = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

  def run(rows, matrices, sizes, cotangent):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), rows, matrices)
    return y, pull(cotangent)

  return run, (rows, matrices, jax.ShapeDtypeStruct((32,), "int32"), cotangent)


def measure(card, what, dtype):
  function, shapes = {"layer": layer_of_30b, "widths": odd_widths}[what]("triton", dtype)
  compiled = compile_for(card, function, shapes)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  kernels = [line for line in text.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line]
  return {
    "temporaries": memory.temp_size_in_bytes,
    "inputs_and_outputs": memory.argument_size_in_bytes + memory.output_size_in_bytes,
    "dw": sum("grouped_matmul_dw" in line for line in kernels),
    "products": sum("grouped_matmul" in line and "grouped_matmul_dw" not in line for line in kernels),
  }


@pytest.mark.cuda_aot
@needs_compiler
@pytest.mark.parametrize("card", ["a100-80g", "rtx4090", "h100", "b200"])
@pytest.mark.parametrize(
  ("what", "dtype", "times"), [("layer", "bfloat16", 3), ("widths", "bfloat16", 1), ("widths", "float32", 1)]
)
def test_kernels_compile(card, what, dtype, times):
  found = apart("test_grouped_matmul_aot", "measure", card, what, dtype)
  print(card, what, dtype, found)
  # Forward and for the rows' gradient; and for the matrices'.
  assert (found["products"], found["dw"]) == (2 * times, times)
  assert found["temporaries"] <= 0.5 * found["inputs_and_outputs"]
