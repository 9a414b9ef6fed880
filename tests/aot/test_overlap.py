"""Which exchanges are hidden behind products: read off a program, and in what XLA makes of the step for GPUs."""

import os

import jax
import pytest

from internvl_jax.aot import hlo
from internvl_jax.aot.overlap import exchanges, hidden_share
from internvl_jax.aot.program import batch_shape, compile_step, plan_step
from internvl_jax.aot.recipe import get_config
from internvl_jax.aot.target import Target
from internvl_jax.hf import published
from internvl_jax.hf.model import Changes, source_of_config

# --- Reading a program --------------------------------------------------------------------------------------

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.1 = bf16[] add(%a, %b)
}

%gather (piece: bf16[4,32]) -> bf16[16,32] {
  %piece = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,32]{1,0} all-gather(%piece), replica_groups=[1,4]<=[4], dimensions={0}
}

%condition (state: (s32[], bf16[8,16], bf16[4,32])) -> pred[] {
  %state = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%state#0, %limit), direction=LT
}

%body (carried: (s32[], bf16[8,16], bf16[4,32])) -> (s32[], bf16[8,16], bf16[4,32]) {
  %carried = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %gather-start = ((bf16[4,32]{1,0}), bf16[16,32]{1,0}) async-start(%carried#2), calls=%gather
  %square = (bf16[8,8]{1,0}, s8[64]{0}) custom-call(%carried#1, %carried#1), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_\
dimensions":["1"]}}}
  %gather-done = bf16[16,32]{1,0} async-done(%gather-start)
  %again-start = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%carried#2), replica_groups=[1,4]<=[4]
  %again-done = bf16[16,32]{1,0} all-gather-done(%again-start)
  ROOT %tuple.1 = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%carried#0, %carried#1, %carried#2)
}

ENTRY %main (x: bf16[8,16], piece.1: bf16[4,32]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %piece.1 = bf16[4,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %scatter-start = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) reduce-scatter-start(%x), replica_groups=[1,4]<=[4]
  %start = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%zero, %x, %piece.1)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
  %scatter-done = bf16[2,16]{1,0} reduce-scatter-done(%scatter-start)
  %kernel-start = (bf16[8,16]{1,0}, bf16[2,16]{1,0}) reduce-scatter-start(%x), replica_groups=[1,4]<=[4]
  %attention = bf16[8,16]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %kernel-done = bf16[2,16]{1,0} reduce-scatter-done(%kernel-start)
  %all = bf16[8,16]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %out = bf16[8,16]{1,0} copy(%loop#1)
}
"""
SQUARE = 2 * 8 * 8 * 16


def test_what_stands_between_start_and_end_is_counted():
  found = [(e.kind, e.bytes, e.runs, e.flops, e.kernels) for e in exchanges(hlo.parse(PROGRAM))]
  assert sorted(found) == [
    ("all-gather", 16 * 32 * 2, 10, 0, 0),
    ("all-gather", 16 * 32 * 2, 10, SQUARE, 0),
    ("all-reduce", 8 * 16 * 2, 1, 0, 0),
    ("reduce-scatter", 8 * 16 * 2, 1, 0, 1),
    # The loop beside it, all of its turns.
    ("reduce-scatter", 8 * 16 * 2, 1, 10 * SQUARE, 0),
  ]


def test_the_hidden_share_is_of_bytes():
  found = exchanges(hlo.parse(PROGRAM))
  assert hidden_share(found) == (10 * 1024 + 256 + 256) / (20 * 1024 + 3 * 256)
  assert hidden_share([]) == 1


# --- What XLA makes of the step -----------------------------------------------------------------------------

H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def cards():
  """Eight H100 that are only described."""
  pytest.importorskip("jax_cuda13_plugin")
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
  from jax.experimental import topologies

  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  described = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", target_config=H100, topology="1x1x8"
  )
  yield Target(name="h100:8", devices=described.devices, shape=(1, 1, 8))
  jax.config.update("jax_enable_compilation_cache", cache)


def compiled_exchanges(target, *options):
  """Of the whole step of a shallow 8B, by kind; those of single vectors left out."""
  config = get_config()
  config.model.model_name_or_path = published.hub_id("2.5-8b")
  config.runtime.xla_options = options
  size = dict(published.config_of("2.5-8b"))
  size["llm_config"] = {**size["llm_config"], "num_hidden_layers": 4}
  size["vision_config"] = {**size["vision_config"], "num_hidden_layers": 4}
  plan = plan_step(
    config, target, batch_shape(config, tokens=8192, tiles=40), source_of_config(size, Changes())
  )
  found = exchanges(hlo.parse(compile_step(plan, target).hlo))
  layers = [e for e in found if "language_model" in e.op_name and e.bytes > 2**20]
  return {kind: [e for e in layers if e.kind == kind] for kind in ("all-gather", "reduce-scatter")}


@pytest.mark.cuda_aot
def test_weights_and_gradients_travel_beside_products(cards):
  """Of a language model's layers, in a scan, spread over 8 GPUs; without the options, fewer of them."""
  found = compiled_exchanges(cards)
  shares = {kind: hidden_share(of_kind) for kind, of_kind in found.items()}
  print({kind: round(share, 3) for kind, share in shares.items()})
  assert all(len(of_kind) >= 4 and all(e.runs == 4 for e in of_kind) for of_kind in found.values())
  assert shares["all-gather"] >= 0.7 and shares["reduce-scatter"] >= 0.7
  plain = compiled_exchanges(
    cards,
    "xla_gpu_enable_latency_hiding_scheduler=false",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824",
  )
  assert hidden_share(plain["all-gather"]) < 0.5 and hidden_share(plain["reduce-scatter"]) < 0.5
