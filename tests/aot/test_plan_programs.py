"""How plan reads programs that compilers print: loops, exchanges, operations, traffic, and what lies in memory."""

import pytest

from internvl_jax.aot import collectives, costs, hlo, operations, traffic
from internvl_jax.aot.peak import peak

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (x: bf16[8,64]) -> bf16[4,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %all-reduce.9 = bf16[8,64]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %dynamic-slice.1 = bf16[4,64]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,64}
}

%product (p: bf16[8,16], q: bf16[16,32]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[16,32]{1,0} parameter(1)
  ROOT %convolution.2 = bf16[8,32]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}

%slice_of (whole: f32[100,16], at: s32[]) -> f32[1,16] {
  %whole = f32[100,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %dynamic-slice.2 = f32[1,16]{1,0} dynamic-slice(%whole, %at, %at), dynamic_slice_sizes={1,16}
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %state = (s32[], bf16[8,16]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (carried: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %carried = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=1
  %gathered = bf16[16,32]{1,0} all-gather(%y), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, \
metadata={op_name="jit(step)/transpose(jvp(language_model))/while/body/mul"}
  %fusion.1 = bf16[8,32]{1,0} fusion(%y, %gathered), kind=kOutput, calls=%product
  %scattered = bf16[4,64]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %tuple.1 = (s32[], bf16[8,16]{1,0}) tuple(%next, %y)
}

ENTRY %main (arg: bf16[8,16], table: f32[100,16]) -> bf16[8,16] {
  %arg = bf16[8,16]{1,0} parameter(0)
  %table = f32[100,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %arg)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %row = f32[1,16]{1,0:S(1)} fusion(%table, %zero), kind=kLoop, calls=%slice_of
  %permuted = f32[1,16]{1,0} collective-permute(%row), source_target_pairs={{0,2},{2,4},{4,6},{1,3},{3,5},{5,7}}
  %everywhere = f32[1,16]{1,0} all-reduce(%permuted), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) \
{'b'}, to_apply=%sum
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
AXES = {"data": 1, "fsdp": 4, "tensor": 2}


def test_exchanges_of_a_program():
  module = hlo.parse(PROGRAM)
  found = {c.kind: c for c in collectives.find(module, 8)}
  assert set(found) == {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}
  # The loop counts by twos to ten.
  assert (found["all-gather"].runs, found["reduce-scatter"].runs, found["all-reduce"].runs) == (5, 5, 1)
  assert found["all-gather"].axes(AXES) == ("fsdp",)
  assert found["all-gather"].bytes == 4 * 8 * 16 * 2
  assert found["reduce-scatter"].axes(AXES) == ("tensor",)
  assert found["collective-permute"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
  # The compiler's own mesh has its devices in another order: 'b' runs over 0, 2, 4, 6.
  assert found["all-reduce"].groups[0] == (0, 2, 4, 6)
  scope = found["all-gather"].op_name
  assert (costs.part_of_scope(scope), costs.phase_of(scope)) == ("LLM", "backward")


def test_operations_and_traffic_of_a_program():
  module = hlo.parse(PROGRAM)
  assert operations.flops(module) == 5 * 2 * 8 * 16 * 32
  y, gathered, product, scattered = 8 * 16 * 2, 16 * 32 * 2, 8 * 32 * 2, 4 * 64 * 2
  loop = (y + gathered) + (y + gathered + product) + (product + scattered) + 3 * 4
  # A row is read from the table to the chip's own memory, sent on from there, and summed.
  rest = 64 + 64 + 2 * 64
  assert traffic.bytes_moved(module) == pytest.approx(5 * loop + rest, abs=64)


def test_a_loop_of_unknown_length_is_named():
  """One whose bound is computed: counted once, and said so."""
  assert not hlo.parse(PROGRAM).uncounted_loops
  module = hlo.parse(
    PROGRAM.replace("%limit = s32[]{:T(128)} constant(10)", "%limit = s32[] multiply(%counter, %counter)")
  )
  assert module.uncounted_loops == ["loop"]
  assert operations.flops(module) == 2 * 8 * 16 * 32


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    # A batch of products is written as a window over an input spread out by zeros.
    (
      "convolution(%l, %r), window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf",
      2 * 4 * 2 * 17 * 17 * 128,
    ),
    ("convolution(%l, %r), window={size=1}, dim_labels=0bf_io0->0bf", 2 * 4 * 17 * 512 * 128),
  ],
)
def test_products_written_as_convolutions(line, expected):
  batched = "lhs_dilate" in line
  l, r = ("4,2,17,128", "4,2,17,128") if batched else ("4,17,128", "128,512,1")
  out = "4,2,17,17" if batched else "4,17,512"
  module = hlo.parse(
    f"ENTRY %main () -> f32[] {{\n  %l = bf16[{l}] parameter(0)\n  %r = bf16[{r}] parameter(1)\n"
    f"  ROOT %c = f32[{out}] {line}\n}}\n"
  )
  assert operations.flops(module) == expected


def test_kernels_count_what_their_masks_leave():
  def kernel(name, rows, integers, blocks):
    operands = [f"s8[1,{blocks}]", f"bf16[4,{rows},128]", "bf16[2,1024,128]", "bf16[2,1024,128]"]
    operands += ["s32[8,128]"] * integers
    lines = [f"  %o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%o{i}" for i in range(len(operands)))
    call = f'  ROOT %splash_mha_{name}.1 = bf16[4,{rows},128] custom-call({names}), custom_call_target="tpu_custom_call"'
    return operations.kernel_flops(hlo.parse("\n".join(["ENTRY %main () -> f32[] {", *lines, call, "}"])))

  square = 2 * 4 * 1024 * 1024 * 128
  assert kernel("fwd_residuals", 1024, 2, "2,2") == 2 * square
  assert kernel("dkv_no_residuals", 1024, 3, "2,2") == 4 * square * 3 / 4  # Three of four blocks.
  assert kernel("dq_no_residuals", 1024, 3, "8,2") == 3 * square * 2 / 8  # A window: two blocks of eight.
  assert (
    kernel("fwd_residuals", 512, 3, "1,2") == 2 * square / 2
  )  # The last half of the queries see all keys.


def test_kernels_of_experts_count_an_even_load():
  operands = ["s32[]", "s32[17]", "bf16[4096,512]", "bf16[16,512,256]"]
  lines = [f"  %o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
  target = 'custom_call_target="tpu_custom_call"'
  lines += [f"  %gmm.3 = bf16[4096,256] custom-call(%o0, %o1, %o2, %o3), {target}"]
  lines += [f"  ROOT %tgmm.1 = bf16[16,512,256] custom-call(%o0, %o1, %o2, %gmm.3), {target}"]
  module = hlo.parse("\n".join(["ENTRY %main () -> f32[] {", *lines, "}"]))
  assert operations.kernel_flops(module) == 2 * 2 * 4096 * 512 * 256
  assert operations.kernel_flops(module, 8) == 2 * 2 * 4096 * 512 * 256 / 8


CARDS = """\
HloModule jit_step, is_scheduled=true

%product (p: bf16[2,8,16], q: bf16[2,16,32]) -> (bf16[2,8,32], s8[4194304]) {
  %p = bf16[2,8,16]{2,1,0} parameter(0)
  %q = bf16[2,16,32]{2,1,0} parameter(1)
  ROOT %custom-call.6 = (bf16[2,8,32]{2,1,0}, s8[4194304]{0}) custom-call(%p, %q), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],\
"lhs_contracting_dimensions":["2"],"rhs_batch_dimensions":["0"],"rhs_contracting_dimensions":["1"]}}}
}

%apart (x: bf16[4,64]) -> bf16[32,64] {
  %x = bf16[4,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,64]{1,0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, \
dimensions={0}, metadata={op_name="jit(step)/jvp(language_model)/while/body/sharding_constraint"}
}

%condition (state: (s32[], bf16[4,64])) -> pred[] {
  %state = (s32[], bf16[4,64]{1,0}) parameter(0)
  ROOT %compare = pred[] fusion(%state#0), kind=kLoop, calls=%less
}

%body (carried: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %carried = (s32[], bf16[4,64]{1,0}) parameter(0)
  %gather-start = ((bf16[4,64]{1,0}), bf16[32,64]{1,0}) async-start(%carried#1), calls=%apart
  %gather-done = bf16[32,64]{1,0} async-done(%gather-start)
  %matmul = (bf16[4,32]{1,0}, s8[1024]{0}) custom-call(%carried#1, %gather-done), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"]}}}
  ROOT %tuple.1 = (s32[], bf16[4,64]{1,0}) tuple(%carried#0, %carried#1)
}

ENTRY %main (arg: bf16[4,64], a: bf16[2,8,16], b: bf16[2,16,32]) -> bf16[4,64] {
  %arg = bf16[4,64]{1,0} parameter(0)
  %a = bf16[2,8,16]{2,1,0} parameter(1)
  %b = bf16[2,16,32]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,64]{1,0}) tuple(%zero, %arg)
  %loop = (s32[], bf16[4,64]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"6"}}
  %products = (bf16[2,8,32]{2,1,0}, s8[4194304]{0}) fusion(%a, %b), kind=kCustom, calls=%product
  ROOT %out = bf16[4,64]{1,0} get-tuple-element(%loop), index=1
}
"""
"""As XLA writes for GPUs: products by cuBLAS, exchanges in computations of their own, elements of tuples in short."""


def test_exchanges_operations_and_traffic_of_a_program_for_gpus():
  module = hlo.parse(CARDS)
  assert not module.uncounted_loops
  (gather,) = collectives.find(module, 16)
  assert (gather.kind, gather.runs, gather.bytes) == ("all-gather", 6, 8 * 4 * 64 * 2)
  assert gather.groups == (tuple(range(8)), tuple(range(8, 16)))
  assert operations.flops(module) == 6 * 2 * 4 * 32 * 64 + 2 * 2 * 8 * 16 * 32
  carried, gathered, product = 4 * 64 * 2, 32 * 64 * 2, 4 * 32 * 2
  turn = (carried + gathered) + (carried + gathered + product)
  # What cuBLAS works in is not moved.
  once = (2 * 8 * 16 + 2 * 16 * 32 + 2 * 8 * 32) * 2
  assert traffic.bytes_moved(module) == 6 * turn + once


@pytest.mark.parametrize(
  ("name", "operands", "out", "expected"),
  [
    (
      "attention_fwd",
      ("bf16[1,512,8,64]", "bf16[1,1024,2,64]"),
      "bf16[1,512,8,64]",
      2 * 2 * 512 * 8 * 64 * 1024,
    ),
    (
      "attention_fwd_causal",
      ("bf16[1,512,8,64]", "bf16[1,512,2,64]"),
      "bf16[1,512,8,64]",
      2 * 512 * 8 * 64 * 512,
    ),
    (
      "attention_dq",
      ("bf16[1,512,8,64]", "bf16[1,512,2,64]"),
      "bf16[1,512,8,64]",
      3 * 2 * 512 * 8 * 64 * 512,
    ),
    (
      "attention_dkv",
      ("bf16[1,512,8,64]", "bf16[1,512,2,64]"),
      "bf16[1,512,2,64]",
      4 * 2 * 512 * 8 * 64 * 512,
    ),
    ("grouped_matmul", ("s32[9]", "bf16[256,128]", "bf16[8,128,64]"), "bf16[256,64]", 2 * 256 * 128 * 64),
    ("grouped_matmul_dw", ("s32[8]", "bf16[256,128]", "bf16[256,64]"), "bf16[8,128,64]", 2 * 256 * 128 * 64),
    ("something_else", ("bf16[256,128]", "bf16[256,64]"), "bf16[128,64]", 0),
  ],
)
def test_kernels_of_gpus_are_known_by_the_scope_that_they_are_called_in(name, operands, out, expected):
  lines = [f"  %o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
  called = ", ".join(f"%o{i}" for i in range(len(operands)))
  call = f'  ROOT %pallas_call.3 = {out} custom-call({called}), custom_call_target="__gpu$xla.gpu.triton", '
  call += (
    f'metadata={{op_name="jit(step)/jvp(language_model)/shard_map/{name}/pallas_call" stack_frame_id=5}}'
  )
  module = hlo.parse("\n".join(["ENTRY %main () -> f32[] {", *lines, call, "}"]))
  assert operations.kernel_flops(module) == expected


def test_what_lies_in_memory_at_the_peak():
  module = hlo.parse(PROGRAM)
  assignment = (
    "BufferAssignment:\n"
    "allocation 0: size 256, page 0, parameter 0, shape |bf16[8,16]| at ShapeIndex {}:\n"
    " value: <1 arg @0> (size=256,offset=0): bf16[8,16]\n"
    "allocation 1: size 4096, page 0, preallocated-temp:\n"
    " value: <2 gathered @0> (size=1024,offset=0): bf16[16,32]\n"
    " value: <3 fusion.1 @0> (size=512,offset=1024): bf16[8,32]\n"
    " value: <4 zero @0> (size=512,offset=2048): s32[]\n"
    " value: <5 permuted @0> (size=1536,offset=0): f32[1,16]\n"
  )
  ranges = (
    "  BufferLiveRange:\n    gathered{}:4-5\n    fusion.1{}:5-6\n    zero{}:0-2\n    carried{0}:3-7\n    loop{0}:8-9\n"
    "    permuted{}:10-11\n  Live ranges at 5 (peak):\n"
  )
  # What the loop carries, under the names of its body and of its result, is where it was before the loop.
  assert [(place[0], size) for place, size in peak(module, assignment, ranges)] == [
    ("gathered", 1024),
    ("fusion.1", 512),
    ("zero", 512),
  ]
  assert peak(module, "", "") == []
