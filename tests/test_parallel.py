"""Ten optimizer steps agree with one device's, whatever the mesh, and state lies where it should."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from harness import Harness, reshape_batch
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, SFTBatch
from internvl_jax.losses import spread
from internvl_jax.models import attention
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.internvl import Execution, InternVLConfig
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.vit import VisionConfig

ROWS, LENGTH, STEPS, VOCAB = 16, 32, 10, 41
LORA = LoRASpec(rank=2, alpha=4.0)

# What the decoders have in common: 8 heads over 2 of keys, rows of windows, an odd vocabulary.
DENSE = {"num_heads": 8, "num_kv_heads": 2, "qkv_bias": True, "windows": (7, None), "sinks": True}
TEXTS = {
  "dense": DENSE,
  "grouped": {**DENSE, "num_heads": 6, "qkv": "grouped", "qkv_bias": False},
  "fused": {**DENSE, "num_kv_heads": 8, "qkv": "concatenated", "fused_gate_up": True},
  "lora": {**DENSE, "lora": LORA},
  "qwen3_moe": {
    **DENSE,
    "qk_norm": True,
    "experts": MoEConfig(num_experts=8, top_k=3, intermediate_size=16, normalize_top_k=True),
  },
  "gpt_oss": {
    **DENSE,
    "o_bias": True,
    "experts": GptOssMLPConfig(num_experts=8, top_k=3, intermediate_size=16, limit=1.5),
  },
}
OPTIONS = {
  "lora": {"freeze": {"freeze_backbone": True}},
  "qwen3_moe": {"router_loss_coef": 0.1},
  "gpt_oss": {"router_loss_coef": 0.1},
}


def model(name):
  vision = VisionConfig(
    hidden_size=16, intermediate_size=32, num_layers=2, num_heads=1, patch_size=4, image_size=16
  )
  text = DecoderConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_layers=2, head_dim=4, **TEXTS[name]
  )
  return InternVLConfig(vision=vision, text=text)


def packed_batch(seed):
  """Rows of three samples and padding; the first and the last have a tile, whose four tokens stand at their front."""
  rng = np.random.default_rng(seed)
  shape = (1, ROWS, LENGTH)
  segments, positions = np.zeros(shape, "i4"), np.zeros(shape, "i4")
  index = np.full(shape, NO_IMAGE, "i4")
  for row in range(ROWS):
    borders = [0, *(np.array([10, 18, 30]) + rng.integers(-2, 3, 3))]
    for i, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
      segments[0, row, start:stop] = i + 1
      positions[0, row, start:stop] = np.arange(stop - start)
      if i != 1:
        index[0, row, start : start + 4] = 4 * (2 * row + i // 2) + np.arange(4)
  answers = (segments > 0) & (positions >= 5)
  targets = np.where(answers, rng.integers(0, VOCAB, shape), IGNORE_INDEX).astype("i4")
  return SFTBatch(
    input_ids=rng.integers(0, VOCAB, shape).astype("i4"),
    targets=targets,
    loss_weight=np.where(answers, rng.uniform(0.5, 1.5, shape), 0).astype("f4"),
    positions=positions,
    segment_ids=segments,
    image_index=index,
    tiles=rng.integers(0, 256, (1, 1, 2 * ROWS, 16, 16, 3)).astype("u1"),
  )


def run(harness, shards):
  """Loss and gradient norm of each step."""
  program = jax.jit(harness.step.__call__)
  found = []
  for step in range(STEPS):
    batch = reshape_batch(packed_batch(step % 3), accumulation=1, shards=shards)
    harness.state, metrics = program(*harness.inputs(batch, learning_rate=2e-3))
    found.append((float(metrics.loss), float(metrics.grad_norm)))
  return np.array(found)


@functools.cache
def one_device(name, *, shards=1, all_gather=True):
  """The steps on one device, whose rows may be counted as several devices'."""
  harness = Harness(model(name), all_gather=all_gather, **OPTIONS.get(name, {}))
  objective = dataclasses.replace(harness.step.objective, shards=shards)
  harness.step = dataclasses.replace(harness.step, shards=shards, objective=objective)
  return run(harness, shards)


def check(name, mesh, *, all_gather=True, **options):
  """Compares the steps on a mesh with one device's; returns the harness."""
  harness = Harness(model(name), mesh=mesh, all_gather=all_gather, **OPTIONS.get(name, {}), **options)
  found = run(harness, harness.shards)
  # What is normalised or balanced by data shard depends on their number, and on nothing else of the mesh.
  by_shard = not all_gather or "router_loss_coef" in OPTIONS.get(name, {})
  expected = one_device(name, shards=harness.shards if by_shard else 1, all_gather=all_gather)
  np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-4)
  assert expected[-1, 0] < expected[0, 0] - 0.1  # The steps did something.
  return harness


@pytest.mark.parametrize(
  "mesh",
  [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    pytest.param({"sequence": 8}, marks=pytest.mark.slow),
    pytest.param({"expert": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_meshes(mesh):
  check("dense", mesh)


def test_heads_that_do_not_divide(monkeypatch):
  """Six heads on four devices: queries keep their tokens, in blocks, and keys and values are collected."""
  monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
  check("grouped", {"fsdp": 2, "tensor": 4})


@pytest.mark.slow
def test_fused_projections():
  check("fused", {"fsdp": 2, "sequence": 2, "tensor": 2})


def test_lora_beside_a_frozen_vit():
  harness = check("lora", {"fsdp": 2, "tensor": 2})
  layers = "language_model.model.layers.0:2"
  spread = {
    "q_proj.adapter.a": (None, "fsdp", None),
    "q_proj.adapter.b": (None, None, "tensor"),
    "o_proj.adapter.a": (None, "tensor", None),
    "o_proj.adapter.b": (None, None, "fsdp"),
  }
  for name, entries in spread.items():
    sharding = harness.state.params[f"{layers}.self_attn.{name}"].sharding
    assert sharding.is_equivalent_to(jax.NamedSharding(harness.mesh, jax.P(*entries)), 3), name


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("qwen3_moe", {"data": 2, "expert": 4}),
    ("gpt_oss", {"data": 2, "expert": 4}),
    pytest.param("gpt_oss", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", {"fsdp": 2, "expert": 2, "sequence": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_experts(name, mesh):
  check(name, mesh)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_zero(stage):
  harness = check("dense", {"data": 8}, zero_stage=stage)
  path = "language_model.model.layers.0:2.mlp.gate_proj.kernel"
  params, moments = harness.state.params[path], harness.state.opt_state[0].mu[path]
  shares = [array.size // array.addressable_shards[0].data.size for array in (params, moments)]
  assert shares == [8 if stage == 3 else 1, 8]


def test_denominators_by_shard_on_all_axes(monkeypatch):
  """Each data shard has its own denominator, however many devices share its rows; the loss goes by three chunks."""
  monkeypatch.setattr(spread, "CHUNK_LOGITS", 8 * 16 * 8)
  monkeypatch.setattr(spread, "_LANES", 1)
  check("dense", {"fsdp": 2, "sequence": 2, "tensor": 2}, all_gather=False, how=Execution(remat="full"))
