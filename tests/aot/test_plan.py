"""What plan says of a step: parts that add up, exchanges by axis, whether it fits; and how it reads programs."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from internvl_jax.aot import report
from internvl_jax.aot.program import batch_shape, compile_step, plan_step
from internvl_jax.aot.recipe import get_config
from internvl_jax.aot.target import open_target
from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import BatchCounts
from internvl_jax.data.load.task import CONVERSATIONS
from internvl_jax.errors import UserError
from internvl_jax.hf import published
from internvl_jax.metrics.mfu import peak_flops, useful_flops
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel import placement_table
from internvl_jax.tasks.sft.objective import SupervisedFineTuning
from internvl_jax.tasks.task import Task
from internvl_jax.trees import count
from tests.support import forked
from tests.support.toy import RECIPE, curve_config

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def tiny_config(tmp_path, **mesh):
  config = curve_config(tmp_path / "out")
  config.mesh = MeshConfig(**(mesh or MESH))
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


def test_how_rows_are_balanced_is_a_line(planned):
  _, found = planned
  assert found.balance is None and "balanced" not in report.render(found)
  balance = {"steps": 64, "tokens_a_tile": 775.2, "tokens_a_pair": 0.00012, "measured": True}
  told = dataclasses.replace(found, balance=balance)
  line = "rows are balanced over 64 steps: by loader.balance_costs, a tile costs 775.2 tokens and a pair of attention 0.00012"
  assert line in report.render(told) and told.as_json()["balance"] == balance


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


def test_what_the_log_of_a_run_warns_of_is_in_the_plan(planned, monkeypatch, tmp_path):
  plan, found = planned
  assert found.warnings == [] and "warning" not in report.render(found)
  monkeypatch.setattr(placement_table, "LARGE", 2**12)
  config = tiny_config(tmp_path, data=1, fsdp=7)
  config.data.max_seq_length = 252
  odd = plan_step(config, open_target("cpu:7"), batch_shape(config, tiles=4), plan.source)
  assert len(odd.warnings) == 1 and "(fsdp=7)" in odd.warnings[0]
  assert f"warning: {odd.warnings[0]}" in report.render(
    dataclasses.replace(found, warnings=list(odd.warnings))
  )


def test_what_does_not_fit_is_said_with_a_remedy(planned):
  _, found = planned
  assert found.fits is False
  assert "does not fit" in report.verdict(found) and "--search" in report.verdict(found)
  roomy = dataclasses.replace(found, limit=2**40, fits=True)
  assert report.verdict(roomy).startswith("fits")
  assert "--hbm" in report.verdict(dataclasses.replace(found, limit=None, fits=None))
  text = report.render(found)
  assert "LLM" in text and "does not fit" in text


SHARD, ROWS, RECOMPUTE = (
  "mesh.data=1, mesh.fsdp=-1",
  "per_device_train_batch_size=1",
  "model.grad_checkpoint=True",
)


@pytest.mark.parametrize(
  ("changes", "said", "unsaid"),
  [
    # All is sharded and recomputed: what is left is the micro-batch.
    ({"mesh": {"fsdp": 16}, "rows": 4, "remat": "full"}, [ROWS, "accumulation_steps=8 "], [SHARD, RECOMPUTE]),
    ({"mesh": {"data": 8, "fsdp": 2}, "rows": 1, "remat": "full"}, [SHARD, "mesh.tensor"], [ROWS, RECOMPUTE]),
    ({"mesh": {"fsdp": 16}, "rows": 2, "remat": None}, [RECOMPUTE, ROWS], [SHARD]),
    ({"mesh": {"fsdp": 16}, "rows": 1, "remat": "dots"}, ["runtime.remat_policy=full"], [SHARD, ROWS]),
    ({"mesh": {"tensor": 16}, "rows": 1, "remat": "full"}, ["more devices"], [SHARD, ROWS, "mesh.tensor"]),
    (
      {"mesh": {"fsdp": 16}, "rows": 4, "remat": None, "state": 3},
      ["more devices"],
      [SHARD, ROWS, RECOMPUTE],
    ),
  ],
)
def test_what_is_advised_is_not_done_yet(planned, changes, said, unsaid):
  _, found = planned
  found = dataclasses.replace(
    found,
    chips=16,
    mesh=dict.fromkeys(found.mesh, 1) | changes["mesh"],
    batch={**found.batch, "rows": changes["rows"], "accumulation": 2},
    execution={**found.execution, "remat": changes["remat"]},
    memory={**found.memory, "optimizer state": changes.get("state", 0) * report.GIB},
    limit=report.GIB,
  )
  words = " or ".join(report.advice(found))
  assert [part for part in said if part not in words] == []
  assert [part for part in unsaid if part in words] == []


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
  flags = [
    "-m",
    "internvl_jax.plan",
    f"--config={recipe}:{tmp_path / 'out'}",
    "--topology=cpu:2",
    "--config.mesh.fsdp=2",
  ]
  flags += ["--config.mesh.data=1", "--tokens=64", "--tiles=1", "--hbm=0.001"]
  flags += [f"--json={tmp_path / 'plan.json'}"]
  done = forked.run(flags, environment=os.environ, folder=tmp_path)
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
  sft = Task(name="sft", data=CONVERSATIONS, make_objective=SupervisedFineTuning)
  assert batch_shape(packed, tokens=5, tiles=0).batch(3, sft).tiles.shape == (1, 3, 0, 448, 448, 3)


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
  source = open_shapes(config)
  assert source.config.tokens_per_tile == 256
  assert set(source.reference_names) == set(source.model.shapes)
  if size in BILLIONS:
    assert count(source.model.shapes) / 1e9 == pytest.approx(BILLIONS[size], rel=4e-3)


def test_hub_ids_of_all_stages_name_a_size():
  assert published.size_of("OpenGVLab/InternVL3-8B-Instruct") == "3-8b"
  assert published.size_of("OpenGVLab/InternVL3_5-30B-A3B-Pretrained-HF") == "3.5-30b-a3b"
  assert published.size_of("OpenGVLab/InternVL2_5-8B@main") == "2.5-8b"
  assert published.size_of("someone/InternVL2_5-8B") is None


# --- With the compiler for TPUs -----------------------------------------------------------------------------


def test_without_the_compiler_the_remedy_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match="pip install"):
    open_target("v5e:2x2")


def test_a_slice_of_tpus_is_compiled_for(tmp_path, monkeypatch):
  """For v6e, whose programs JAX cannot print."""
  pytest.importorskip("libtpu")
  monkeypatch.delenv(
    "XLA_FLAGS", raising=False
  )  # libtpu ends the process at a flag of the CPU's that it does not know.
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


def test_what_the_compiler_refuses_is_a_report_too(tmp_path, monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.delenv(
    "XLA_FLAGS", raising=False
  )  # libtpu ends the process at a flag of the CPU's that it does not know.
  config = get_config()
  config.model.model_name_or_path = published.hub_id("2.5-2b")
  target = open_target("v5e:1x1")
  plan = plan_step(config, target, batch_shape(config, tokens=4096, tiles=8))
  found = report.make_report(plan, compile_step(plan, target), target, limit=target.memory)
  assert found.fits is False and "HBM" in (found.refusal or "")
  assert found.total > target.memory
