"""Experts' kernels are compiled for NVIDIA's cards, without one: that they compile, and what memory they take."""

import json
import os
import subprocess
import sys

import jax
import pytest

CARDS = {
  # Name: compute capability, multiprocessors, KiB of shared memory that one has, and one program may ask for.
  "NVIDIA A100-SXM4-80GB": ((8, 0), 108, 164, 163),
  "NVIDIA GeForce RTX 4090": ((8, 9), 128, 100, 99),
  "NVIDIA H100 80GB HBM3": ((9, 0), 132, 228, 227),
  "NVIDIA B200": ((10, 0), 148, 228, 227),
}

_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {core_bytes}
  shared_memory_per_block_optin: {program_bytes}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000
  l2_cache_size: 41943040
  clock_rate_ghz: 1.4
  device_memory_size: 85899345920
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""

# The compiler asks for no card, and takes tiles for other products that it need not time.
_WITHOUT_A_CARD = {
  "JAX_PLATFORMS": "cpu",
  "CUDA_VISIBLE_DEVICES": "-1",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0",
}


def compile_for(card, function, *shapes):
  """The function, traced and compiled for one card that is only described."""
  from jax.experimental import topologies
  from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

  (major, minor), cores, core, program = CARDS[card]
  shared = {"core_bytes": core * 1024, "program_bytes": program * 1024}
  text = _DESCRIPTION.format(name=card, major=major, minor=minor, cores=cores, **shared)
  topology = topologies.get_topology_desc(
    platform="cuda", topology_name="card", target_config=text, topology="1x1x1"
  )
  place = SingleDeviceSharding(topology.devices[0])
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
  device = AbstractDevice(device_kind=card, num_cores=cores, platform="gpu")
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    lowered = jax.jit(function).lower(*shapes)
  return lowered.compile()


def layer_of_30b(backend, dtype):
  """A layer of 30B-A3B's experts, forward and backward, and the shapes that it takes: 65,536 rows."""
  from internvl_jax.models.functional import define
  from internvl_jax.models.moe import MoEConfig

  config = MoEConfig(num_experts=128, top_k=8, intermediate_size=768, normalize_top_k=True)
  layer = define(lambda rngs: config.build(2048, rngs))
  x = jax.ShapeDtypeStruct((1, 8192, 2048), dtype)
  params = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in layer.shapes.items()}

  def run(params, x, cotangent):
    y, pull = jax.vjp(lambda params, x: layer.bind(params)(x, valid=None, backend=backend)[0], params, x)
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


def _has_compiler() -> bool:
  try:
    import jax_plugins.xla_cuda13  # noqa: F401
  except ImportError:
    return False
  return True


def measure(card, what, dtype):
  function, shapes = {"layer": layer_of_30b, "widths": odd_widths}[what]("triton", dtype)
  compiled = compile_for(card, function, *shapes)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  kernels = [line for line in text.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line]
  return {
    "temporaries": memory.temp_size_in_bytes,
    "inputs_and_outputs": memory.argument_size_in_bytes + memory.output_size_in_bytes,
    "dw": sum("grouped_matmul_dw" in line for line in kernels),
    "products": sum("grouped_matmul" in line and "grouped_matmul_dw" not in line for line in kernels),
  }


@pytest.mark.cuda_aot
@pytest.mark.skipif(not _has_compiler(), reason="needs the compiler of jax[cuda13]")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
  ("what", "dtype", "times"), [("layer", "bfloat16", 3), ("widths", "bfloat16", 1), ("widths", "float32", 1)]
)
def test_kernels_compile(card, what, dtype, times):
  command = [sys.executable, __file__, card, what, dtype]
  ran = subprocess.run(
    command, env={**os.environ, **_WITHOUT_A_CARD}, capture_output=True, text=True, check=False
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  found = json.loads(ran.stdout.splitlines()[-1])
  print(card, what, dtype, found)
  # Forward and for the rows' gradient; and for the matrices'.
  assert (found["products"], found["dw"]) == (2 * times, times)
  assert found["temporaries"] <= 0.5 * found["inputs_and_outputs"]


if __name__ == "__main__":
  print(json.dumps(measure(*sys.argv[1:])))
