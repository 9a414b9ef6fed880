"""Cards that are not there: what is said of them, and, with XLA's compiler for them, what it makes of a step."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from internvl_jax.aot import cuda, recipe
from internvl_jax.aot.price import price
from internvl_jax.aot.report import Roofline
from internvl_jax.aot.target import Target, open_target
from internvl_jax.chips import GPUS
from internvl_jax.errors import UserError
from tests.support.toy import RECIPE, REPOSITORY

GIB = 2**30


# --- What is said of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("card", GPUS.values(), ids=GPUS)
def test_the_compiler_is_told_what_a_card_is(card):
  text = cuda.target_config(card)
  assert text.count("{") == text.count("}") == 4
  said = dict(re.findall(r"(\w+): (\S+)", text))
  assert int(said["core_count"]) == card.cores and float(said["clock_rate_ghz"]) == card.clock
  assert int(said["memory_bandwidth"]) == card.memory_bandwidth
  # Of a card that it does not see, XLA plans for four fifths.
  assert int(said["device_memory_size"]) * 0.8 == pytest.approx(card.usable)
  assert int(said["shared_memory_per_block_optin"]) == int(said["shared_memory_per_core"]) - 1024
  assert f'device_description_str: "{card.generation.known_as}"' in text
  assert re.fullmatch(card.kinds, card.kind)


@pytest.mark.parametrize(
  ("name", "capability", "shared"),
  [
    ("a100-40g", "8.0", 164),
    ("l40s", "8.9", 100),
    ("h20", "9.0", 228),
    ("b200", "10.0", 228),
    ("rtx5090", "12.0", 100),
  ],
)
def test_generations_of_cards(name, capability, shared):
  text = cuda.target_config(GPUS[name])
  major, minor = capability.split(".")
  assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
  assert f"shared_memory_per_core: {1024 * shared}\n" in text


def test_a_program_may_use_less_than_a_card_has():
  """92 % of what is left when the driver has its part."""
  assert GPUS["h100"].usable == pytest.approx(0.92 * (79.09 - 0.75) * GIB, rel=1e-6)
  for card in GPUS.values():
    left = card.memory - card.usable
    assert 2 * GIB < left < 16 * GIB, card.name


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("h100", "write h100:8 for a host's cards, h100:2x8"),
    ("h100:", "say how many"),
    ("h100:16", "1 to 8 cards; write h100:8"),
    ("h100:2x9", "1 to 8 cards"),
    ("h100:1x2x4", "1 to 8 cards"),
    ("h100:0x8", "1 to 8 cards"),
    ("H100:8", "did you mean h100"),
    ("a100:8", "did you mean a100-40g or a100-80g"),
    ("rtx-4090:1", "did you mean rtx4090"),
    ("v5e", "say how many; write v5e:2x2"),
    ("v6:2x2", "did you mean v6e"),
  ],
)
def test_cards_that_there_are_not(name, words):
  with pytest.raises(UserError, match=words):
    open_target(name)


def test_without_the_compiler_for_cards_the_remedy_is_said(monkeypatch):
  monkeypatch.setattr(cuda, "_PLUGINS", ("no_such_plugins.xla_cuda13",))
  with pytest.raises(UserError, match=re.escape("pip install 'internvl_jax[plan-gpu]'")):
    cuda.check_compiler()


# --- Prices -------------------------------------------------------------------------------------------------


def report_of(batch, *, chips=8, flops=0.0, bound=0.7):
  return SimpleNamespace(
    batch=batch,
    chips=chips,
    flops={"LLM": {"forward": flops / 3, "backward": flops * 2 / 3}},
    roofline=Roofline(compute=1.0, memory=1.0, links=1.0, step=1.0, mfu=bound),
  )


def test_a_million_tokens_cost_what_their_hours_do():
  """Steps of 2 x 8 rows of 5,000 tokens: half a second at 40 % of 989 TFLOP/s, on eight cards at 3 an hour."""
  batch = {"accumulation": 2, "shards": 8, "rows": 1, "tokens": 5000}
  target = Target(name="h100:8", devices=[], chip=GPUS["h100"], shape=(1, 8))
  report = report_of(batch, flops=0.5 * 0.4 * 989e12)
  found = price(report, target, hour=3.0, utilisation=0.4, supervised=0.25)
  assert found.seconds == pytest.approx(0.5)
  assert found.million == pytest.approx(8 * 3.0 * 0.5 / 3600 / 80_000 * 1e6)
  assert found.million_supervised == pytest.approx(4 * found.million)
  assert "40%" in str(found) and "25%" in str(found) and "cannot" not in str(found)
  # Without a share, nothing is said of supervised tokens but how to know.
  plain = price(report, target, hour=3.0, utilisation=0.8, supervised=None)
  assert plain.million == pytest.approx(found.million / 2) and plain.million_supervised is None
  assert "--supervised" in str(plain) and "cannot be more than 70%" in str(plain)


def test_devices_without_a_data_sheet_have_no_price():
  with pytest.raises(UserError, match="h100:8"):
    price(report_of({}), Target(name="cpu:8", devices=[]), hour=1.0, utilisation=0.4, supervised=None)


# --- With the compiler for cards ----------------------------------------------------------------------------


def environment():
  """That of a shell: what tests set for the CPU's compiler would be asked of this one, too."""
  paths = str(REPOSITORY)
  return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": paths}


def planned(folder, topology, *options):
  """What the command reports of a tiny model on those cards, and its output."""
  file = folder / "recipe.py"
  file.write_text(RECIPE)
  command = [sys.executable, "-m", "internvl_jax.plan", f"--config={file}:{folder / 'out'}"]
  command += [
    f"--topology={topology}",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--tokens=512",
    "--tiles=4",
  ]
  command += ["--config.training.bf16=True", f"--json={folder / 'plan.json'}", *options]
  done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((folder / "plan.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def compiler():
  try:
    cuda.check_compiler()
  except UserError as error:
    pytest.skip(str(error))


@pytest.mark.cuda_aot
@pytest.mark.parametrize("topology", ["h100:2x4", "a100-80g:8", "b200:4", "rtx4090:1"])
def test_a_step_is_compiled_for_cards(compiler, tmp_path, topology):
  found, text = planned(tmp_path, topology, "--cost=2", f"--dump={tmp_path / 'dump'}")
  card = GPUS[topology.partition(":")[0]]
  assert found["fits"] and found["limit"] == card.usable and "fits" in text
  assert found["total"] == sum(found["memory"].values()) and min(found["memory"].values()) >= 0
  model = sum(sum(entry.values()) for entry in found["flops"].values())
  assert found["compiled_flops"] > model > 0 and found["uncounted_loops"] == 0
  assert 0 < found["roofline"]["mfu"] < 1 and found["roofline"]["compute"] == pytest.approx(
    found["compiled_flops"] / card.flops
  )
  assert found["peak"] and sum(buffer["bytes"] for buffer in found["peak"]) <= 1.1 * (
    found["memory"]["activations and temporaries"] + found["memory"]["gradients"] + GIB / 1024
  )
  assert found["price"]["utilisation"] == 0.4 and "supposed" in text
  if found["chips"] > 1:
    gathers = next(row for row in found["exchanges"] if (row["kind"], row["axes"]) == ("all-gather", "fsdp"))
    # Weights are collected in every layer of both stacks, forward and backward, in bfloat16.
    assert 0 < found["hidden"] < 1 and "have products beside them" in text
    assert gathers["dtype"] == "bf16" and gathers["count"] >= 2 * 2 * 4 and gathers["seconds"] > 0
  assert not copies_of_weights(tmp_path / "dump")


def copies_of_weights(dump):
  """Weights of all layers that the program transposes before it begins."""
  program = max(dump.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()
  entry = program[program.index("\nENTRY") :]
  return re.findall(r"transpose\S* = f32\[\d+,\d+,\d+\]\S* fusion\(%param\.\d+\)", entry)


KERNEL = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec as P
from internvl_jax.aot import hlo, operations
from internvl_jax.aot.target import open_target
from internvl_jax.compiler import compiler_options
from internvl_jax.arguments import MeshConfig
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh

target = open_target("h100:2")
mesh = make_mesh(MeshConfig(data=1, fsdp=2), target.devices)

def kernel(a, b, out):
  out[...] = plgpu.load(a.at[:, :]) @ plgpu.load(b.at[:, :])

def product(a, b):
  out = jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), a.dtype)
  return pl.pallas_call(kernel, out_shape=out, name="grouped_matmul")(a, b)

def step(a, b):
  with rules.scope(mesh):
    return jax.shard_map(product, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False)(a, b)

a = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
b = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
compiled = jax.jit(step).lower(a, b).compile(compiler_options=dict(compiler_options("gpu", compile_only=True)))
print("operations", operations.kernel_flops(hlo.parse(compiled.as_text())))
"""


@pytest.mark.cuda_aot
def test_kernels_are_compiled_and_counted(compiler):
  """Traced under the mesh of cards that are only described, which says what they are."""
  done = subprocess.run(
    [sys.executable, "-c", KERNEL],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert f"operations {2 * 128 * 64 * 32}" in done.stdout


@pytest.mark.cuda_aot
def test_a_search_ends_at_the_fewest_cards(compiler, tmp_path):
  found, text = planned(tmp_path, "l40s:4", "--search")
  assert [attempt["topology"] for attempt in found["attempts"]] == ["l40s:1"]
  assert "the smallest that fits is l40s:1" in text


PUBLISHED = [
  # Size, recipe's variant, cards, and GiB of a card that it may take; None: as many as the card has.
  ("2.5-8b", "", "h100:8", 21),
  ("2.5-8b", "", "a100-80g:8", 21),
  ("2.5-8b", "", "b200:8", 21),
  ("2.5-78b", "", "h100:4x8", None),
  ("2.5-8b", ":lora", "h100:1", None),
  ("2.5-8b", ":lora", "rtx4090:1", None),
  ("2.5-1b", "", "h100:1", None),
  ("2.5-2b", "", "h100:1", None),
  ("3.5-30b-a3b", "", "h100:8", None),
  ("3.5-20b-a4b", "", "h100:8", None),
]


@pytest.mark.cuda_aot
@pytest.mark.parametrize(("size", "variant", "topology", "most"), PUBLISHED)
def test_published_sizes_fit(compiler, tmp_path, size, variant, topology, most):
  """Whole steps of packed rows of 8,192 tokens and 40 tiles, by the kernels that are made for cards."""
  report = tmp_path / "plan.json"
  options = [
    f"--config={recipe.__file__}{variant}",
    f"--size={size}",
    f"--topology={topology}",
    f"--json={report}",
  ]
  done = subprocess.run(
    [sys.executable, "-m", "internvl_jax.plan", *options],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(report.read_text())
  seconds = found["lower_seconds"] + found["compile_seconds"]
  print(
    f"{size}{variant} {topology}: {found['total'] / GIB:.2f} GiB of {found['limit'] / GIB:.2f}, {seconds:.0f} s"
  )
  assert found["fits"] and (most is None or found["total"] <= most * GIB)
  assert found["execution"]["attention"] == "triton"
  assert found["execution"]["experts"] == ("triton" if size.startswith(("3.5-30b", "3.5-20b")) else None)
  # Not for the quality of the compiler, but for a plan to be worth asking for.
  assert seconds <= 120
