"""What plan says of a step: parts that add up, exchanges by axis, whether it fits; and how it reads programs."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from internvl_jax.aot import collectives, costs, hlo, links, operations, report, search, traffic
from internvl_jax.aot.peak import peak
from internvl_jax.aot.program import batch_shape, compile_step, plan_step
from internvl_jax.aot.recipe import get_config
from internvl_jax.aot.target import Target, open_target
from internvl_jax.arguments import MeshConfig
from internvl_jax.assembly import describe_model
from internvl_jax.batch import BatchCounts
from internvl_jax.chips import TPUS
from internvl_jax.errors import UserError
from internvl_jax.hf import published
from internvl_jax.mfu import peak_flops, useful_flops
from internvl_jax.trees import count
from toy import RECIPE, REPOSITORY, curve_config

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def tiny_config(tmp_path, **mesh):
  config = curve_config(tmp_path / "out")
  config.mesh = MeshConfig(**(mesh or MESH))
  config.model.use_liger = True
  config.data.max_seq_length = 256
  return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """A tiny model's step, compiled for eight devices of the CPU."""
  config = tiny_config(tmp_path_factory.mktemp("plan"))
  target = open_target("cpu:8")
  plan = plan_step(config, target, batch_shape(config, tiles=4))
  compiled = compile_step(plan, target)
  return plan, report.make_report(plan, compiled, target, limit=1)


# --- The report ---------------------------------------------------------------------------------------------


def test_memory_adds_up_to_what_the_arrays_take(planned):
  plan, found = planned
  assert found.total == sum(found.memory.values())
  assert all(size >= 0 for size in found.memory.values())
  sharded = sum(leaf.size * 4 // shards(leaf) for leaf in plan.state.params.values())
  assert found.memory["parameters that train"] == sharded
  # Two moments of each, and a counter.
  assert found.memory["optimizer state"] == 2 * sharded + 4
  assert found.trainable == found.parameters == count(plan.source.model.shapes)


def shards(leaf):
  return leaf.size // np.prod(leaf.sharding.shard_shape(leaf.shape))


def test_exchanges_are_found_by_axis(planned):
  _, found = planned
  rows = {(row.kind, row.axes): row for row in found.exchanges if row.dtype == "f32"}
  assert any("tensor" in axes for _, axes in rows)
  assert {axis for _, axes in rows for axis in axes.split("+")} <= {"fsdp", "tensor"}
  # Weights are collected in every layer of both stacks, forward and backward.
  assert rows["all-gather", "fsdp"].count > 2 * 2 * 4
  assert all(sum(row.parts.values()) == row.bytes for row in found.exchanges)


def test_what_does_not_fit_is_said_with_a_remedy(planned):
  _, found = planned
  assert found.fits is False
  assert "does not fit" in report.verdict(found) and "--search" in report.verdict(found)
  roomy = dataclasses.replace(found, limit=2**40, fits=True)
  assert report.verdict(roomy).startswith("fits")
  assert "--hbm" in report.verdict(dataclasses.replace(found, limit=None, fits=None))
  text = report.render(found)
  assert "LLM" in text and "does not fit" in text


def test_operations_are_those_of_the_model(planned):
  """Of the shapes, twice as many backward as forward, and no more for being recomputed."""
  plan, found = planned
  config, shape = plan.source.config, plan.shape
  text, rows, tokens = config.text, shape.rows, shape.tokens
  width = text.hidden_size
  attention = text.num_heads * text.head_dim
  layer = width * (attention + 2 * text.num_kv_heads * text.head_dim) + attention * width
  layer += 3 * width * text.intermediate_size
  # A causal mask leaves half of the square, the diagonal included.
  square = 2 * 2 * attention * tokens * (tokens + 1) // 2
  forward = rows * text.num_layers * (2 * tokens * layer + square)
  sharing = 2
  assert found.flops["LLM"]["forward"] == pytest.approx(forward / sharing, rel=1e-6)
  # Gradients of norms and biases are sums, written as products.
  assert found.flops["LLM"]["backward"] == pytest.approx(2 * forward / sharing, rel=0.02)
  head = 2 * rows * tokens * width * text.vocab_size / sharing
  assert found.flops["head"] == {"forward": pytest.approx(head), "backward": pytest.approx(2 * head)}
  assert found.compiled_flops > sum(sum(part.values()) for part in found.flops.values())


def test_operations_agree_with_what_runs_count(planned):
  """MFU's own formula, for a row that is one sample, and pools without padding."""
  plan, found = planned
  useful = useful_flops(plan.source.config, plan.source.model.shapes, set(plan.state.params))
  shape = plan.shape
  pairs = shape.tokens * (shape.tokens + 1) // 2
  counts = BatchCounts(
    tokens=shape.rows * shape.tokens,
    image_tokens=shape.rows * shape.tiles * plan.source.config.tokens_per_tile,
    pairs=shape.rows * pairs,
    **dict.fromkeys(set(BatchCounts._fields) - {"tokens", "image_tokens", "pairs"}, 0),
  )
  ours = 2 * sum(sum(entry.values()) for entry in found.flops.values())
  # Beyond it, gradients of biases and norms are sums, written as products.
  assert 0 <= ours / useful.of(counts) - 1 < 0.03


def test_the_command_writes_all_of_it(tmp_path):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(RECIPE)
  command = [sys.executable, "-m", "internvl_jax.plan", f"--config={recipe}:{tmp_path / 'out'}"]
  command += ["--topology=cpu:2", "--config.mesh.fsdp=2", "--config.mesh.data=1", "--tokens=64", "--tiles=1"]
  command += ["--hbm=0.001", f"--json={tmp_path / 'plan.json'}"]
  paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
  done = subprocess.run(
    command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert "does not fit" in done.stdout
  written = json.loads((tmp_path / "plan.json").read_text())
  assert written["mesh"]["fsdp"] == 2 and written["chips"] == 2
  assert written["total"] == sum(written["memory"].values())
  assert written["batch"]["tokens"] == 64


# --- What is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "words"),
  [("v5e:4x4x4", "2 dimensions"), ("v9:2x2", "v5e:4x4"), ("nonsense", "v5e:4x4"), ("cpu:9", "8 CPU devices")],
)
def test_topologies_that_there_are_not(name, words):
  jax.devices()
  with pytest.raises(UserError, match=words):
    open_target(name)


def test_batches_are_the_largest_that_the_data_make(tmp_path):
  config = tiny_config(tmp_path)
  config.data.max_dynamic_patch, config.data.use_thumbnail = 6, True
  assert (batch_shape(config).tokens, batch_shape(config).tiles) == (256, 7)
  config.data.dynamic_image_size = False
  assert batch_shape(config).tiles == 1
  packed = get_config()
  assert (batch_shape(packed).tokens, batch_shape(packed).tiles) == (8192, 40)
  assert batch_shape(packed, tokens=5, tiles=0).batch(shards=3).tiles.shape == (1, 3, 0, 448, 448, 3)


# --- Published sizes ----------------------------------------------------------------------------------------

# Billions of parameters, as the model cards have them.
BILLIONS = {
  "2.5-1b": 0.94,
  "2.5-2b": 2.21,
  "2.5-4b": 3.71,
  "2.5-8b": 8.08,
  "2.5-26b": 25.5,
  "2.5-38b": 38.4,
  "2.5-78b": 78.4,
  "2-40b": 40.1,
  "2-76b": 76.3,
  "3-9b": 9.14,
  "3-14b": 15.1,
  "3.5-1b": 1.06,
  "3.5-8b": 8.53,
  "3.5-20b-a4b": 21.2,
  "3.5-30b-a3b": 30.8,
  "3.5-241b-a28b": 240.7,
}


@pytest.mark.parametrize("size", published.SIZES)
def test_published_sizes_are_described_without_a_checkpoint(size):
  config = get_config()
  config.model.model_name_or_path = published.hub_id(size)
  source = describe_model(config)
  assert source.config.tokens_per_tile == 256
  assert set(source.reference_names) == set(source.model.shapes)
  if size in BILLIONS:
    assert count(source.model.shapes) / 1e9 == pytest.approx(BILLIONS[size], rel=4e-3)


def test_hub_ids_of_all_stages_name_a_size():
  assert published.size_of("OpenGVLab/InternVL3-8B-Instruct") == "3-8b"
  assert published.size_of("OpenGVLab/InternVL3_5-30B-A3B-Pretrained-HF") == "3.5-30b-a3b"
  assert published.size_of("OpenGVLab/InternVL2_5-8B@main") == "2.5-8b"
  assert published.size_of("someone/InternVL2_5-8B") is None


# --- Reading programs ---------------------------------------------------------------------------------------

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
  assert (costs.part_of(scope), costs.phase_of(scope)) == ("LLM", "backward")


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


# --- Times --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
  """A chip of a slice as far as a mesh asks for it."""

  id: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU"
  core_on_chip: int = 0
  process_index: int = 0


def slice_of(kind, *shape):
  devices = [Device(i, (*place, 0, 0)[:3]) for i, place in enumerate(np.ndindex(*shape))]
  return Target(name="", devices=devices, chip=TPUS[kind], memory=TPUS[kind].hbm, shape=shape)


@pytest.mark.parametrize(
  ("kind", "target", "group", "seconds"),
  [
    # Corners of an open grid have two links of 50 GB/s.
    ("all-gather", ("v5e", 4, 4), range(16), 15 / 16 / 100e9),
    ("all-reduce", ("v5e", 4, 4), range(16), 2 * 15 / 16 / 100e9),
    # A line of four: its ends have one link within the group.
    ("reduce-scatter", ("v5e", 4, 4), range(4), 3 / 4 / 50e9),
    # Rings of sixteen: two links each way.
    ("all-gather", ("v5e", 16, 16), range(256), 255 / 256 / 200e9),
    # A quarter of what each of four has crosses the middle of their ring of four.
    ("all-to-all", ("v5p", 4, 4, 4), range(4), 4 / 4 / 2 / 100e9),
    ("collective-permute", ("v6e", 2, 4), (0, 1), 1 / 100e9),
  ],
)
def test_links_bound_exchanges(kind, target, group, seconds):
  collective = collectives.Collective(kind, "bf16", 1_000_000, (tuple(group),), 1, "")
  assert links.exchange_seconds(collective, slice_of(*target)) == pytest.approx(1e6 * seconds)
  assert links.total_seconds([collective] * 3, slice_of(*target)) == pytest.approx(3e6 * seconds)


# --- Searching ----------------------------------------------------------------------------------------------


def test_slices_are_those_that_there_are():
  assert search.slices("v5e:2x4") == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
  assert search.slices("v5p")[0] == "v5p:2x2x1"
  with pytest.raises(UserError, match="the slices of v5e are"):
    search.slices("v5e:3x3")
  with pytest.raises(UserError, match="name one of them"):
    search.slices("cpu")


GIB = 2**30


def looked_for(monkeypatch, name, beyond, levels=None):
  """A search for 2.5-8b, with steps that take so many GiB beyond the arithmetic; what was compiled, and attempts."""
  config = get_config()
  config.model.model_name_or_path = published.hub_id("2.5-8b")
  compiled = []

  def pretend(plan, target, **options):
    compiled.append((target.name, plan.mesh.shape["tensor"], plan.step.objective.how.remat))
    total = search.lower_bound(plan) + round(beyond(plan) * GIB)
    if levels is None:
      return total
    levels.append(options["optimization_level"])
    return total if levels[-1] == "O0" else round(1.04 * total)

  @dataclasses.dataclass
  class Report:
    total: int
    fits: bool
    roofline = None

  monkeypatch.setattr(search, "compile_step", pretend)
  monkeypatch.setattr(
    search, "make_report", lambda plan, total, target, limit: Report(total=total, fits=total <= limit)
  )

  def slice_named(name):
    kind, _, shape = name.partition(":")
    return dataclasses.replace(slice_of(kind, *map(int, shape.split("x"))), name=name)

  monkeypatch.setattr(search, "open_target", slice_named)
  return compiled, search.search(config, name, batch_shape(config))


def test_a_search_compiles_only_where_arithmetic_leaves_room(monkeypatch):
  """8B: parameters and moments alone are 90 GiB, so slices of up to four chips of 15.75 GiB cannot hold it."""
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 2.0)
  # By arithmetic 15.6 GiB on eight chips that share a row: that it does not fit is seen by compiling it.
  assert compiled == [("v5e:2x4", 8, "full"), ("v5e:4x4", 1, "full")]
  found = attempts[-1]
  assert found.fits and (found.topology, found.mesh["fsdp"], found.remat) == ("v5e:4x4", 16, "full")
  assert {attempt.outcome for attempt in attempts[:-1] if not attempt.compiled} == {"cannot fit"}
  assert all("at least" in str(attempt) for attempt in attempts if not attempt.compiled)


def test_a_search_goes_by_what_was_compiled_and_does_not_fit(monkeypatch):
  """13.3 GiB by arithmetic with four chips that share a row: compiled to see that eight of 4x4's may as well."""
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 8.0 / plan.mesh.shape["tensor"])
  assert compiled == [("v5e:2x4", 8, "full"), ("v5e:4x4", 1, "full"), ("v5e:4x4", 2, "full")]
  assert [attempt.mesh["tensor"] for attempt in attempts if attempt.fits] == [2]
  # Beyond the arithmetic alike, however rows are shared: 4x4 is compiled only where that leaves much less.
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 8.0)
  assert ("v5e:4x4", 1, "full") not in compiled and compiled[-1] == ("v5e:4x8", 1, "full")
  assert "cannot fit, by what another took" in {attempt.outcome for attempt in attempts}


def test_a_search_compiles_what_fits_narrowly_as_a_run_will(monkeypatch):
  """15.3 of 15.75 GiB, of which a run would take 4 % more: it takes twice the chips."""
  levels = []
  compiled, attempts = looked_for(monkeypatch, "v5e:4x8", lambda plan: 3.9, levels)
  tried = list(zip(compiled, levels, strict=True))
  narrow = ("v5e:4x4", 1, "full")
  assert tried[tried.index((narrow, "O0")) + 1] == (narrow, "default")
  assert attempts[-1].fits and attempts[-1].bytes < 0.96 * 15.75 * GIB


def test_a_search_recomputes_less_where_there_is_room(monkeypatch):
  compiled, attempts = looked_for(monkeypatch, "v5p", lambda plan: 2.0)
  assert compiled == [("v5p:2x2x1", 1, "dots")]
  assert attempts[-1].fits and attempts[-1].remat == "dots"
  # Where less is kept after all, all is recomputed.
  compiled, attempts = looked_for(
    monkeypatch, "v5p", lambda plan: 60.0 if plan.step.objective.how.remat == "dots" else 2.0
  )
  assert compiled == [("v5p:2x2x1", 1, "dots"), ("v5p:2x2x1", 1, "full")]
  assert attempts[-1].fits and attempts[-1].remat == "full"


def test_axes_that_are_set_stay():
  config = get_config()
  config.mesh.sequence = 2
  (mesh,) = search.meshes(config, 8)
  assert (mesh.fsdp, mesh.sequence) == (-1, 2)


# --- With the compiler for TPUs -----------------------------------------------------------------------------


def test_without_the_compiler_the_remedy_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match="pip install"):
    open_target("v5e:2x2")


def test_a_slice_of_tpus_is_compiled_for(tmp_path):
  """For v6e, whose programs JAX cannot print."""
  pytest.importorskip("libtpu")
  config = tiny_config(tmp_path)
  config.training.bf16 = True
  config.data.max_seq_length = 512
  target = open_target("v6e:2x4")
  assert target.chip and peak_flops(target.devices) == 8 * target.chip.flops
  plan = plan_step(config, target, batch_shape(config, tiles=4))
  found = report.make_report(plan, compile_step(plan, target), target, limit=target.memory)
  assert found.fits and found.execution["attention"] == "splash"
  assert found.roofline and 0 < found.roofline.mfu < 1
  assert found.kernel_flops > 0 and found.peak
  assert (
    sum(buffer.bytes for buffer in found.peak) <= found.memory["activations and temporaries"] * 1.1 + 2**20
  )


def test_what_the_compiler_refuses_is_a_report_too(tmp_path):
  pytest.importorskip("libtpu")
  config = get_config()
  config.model.model_name_or_path = published.hub_id("2.5-2b")
  target = open_target("v5e:1x1")
  plan = plan_step(config, target, batch_shape(config, tokens=4096, tiles=8))
  found = report.make_report(plan, compile_step(plan, target), target, limit=target.memory)
  assert found.fits is False and "HBM" in (found.refusal or "")
  assert found.total > target.memory
