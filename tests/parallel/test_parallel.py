"""Ten optimizer steps agree with one device's, whatever the mesh, and state lies where it should."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.errors import UserError
from internvl_jax.losses import vocab_parallel
from internvl_jax.models.attention import xla
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.functional import define
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.internvl import Execution, InternVLConfig
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.towers.internvit import InternViTConfig
from internvl_jax.parallel import batches, rules
from internvl_jax.parallel.mesh import AXES, check_lengths, make_mesh
from internvl_jax.parallel.placement_table import placement_table, placement_warnings
from tests.support.harness import Harness, reshape_batch

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
# Widths that eight devices do not divide, but four do.
WIDTHS = dict.fromkeys(TEXTS, (16, 32)) | {f"{name}, odd": (20, 36) for name in TEXTS}


def model(name):
  widths, name = WIDTHS[name], name.removesuffix(", odd")
  vision = InternViTConfig(
    hidden_size=widths[0], intermediate_size=32, num_layers=2, num_heads=1, patch_size=4, image_size=16
  )
  text = DecoderConfig(
    vocab_size=VOCAB, hidden_size=widths[1], intermediate_size=32, num_layers=2, head_dim=4, **TEXTS[name]
  )
  return InternVLConfig(vision=vision, text=text)


def options_of(name):
  return OPTIONS.get(name.removesuffix(", odd"), {})


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
  return TokenBatch(
    input_ids=rng.integers(0, VOCAB, shape).astype("i4"),
    targets=targets,
    loss_weight=np.where(answers, rng.uniform(0.5, 1.5, shape), 0).astype("f4"),
    positions=positions,
    segment_ids=segments,
    image_index=index,
    tiles=rng.integers(0, 256, (1, 1, 2 * ROWS, 16, 16, 3)).astype("u1"),
  )


def run(harness, shards, accumulation=1):
  """Loss and gradient norm of each step, and the program; its state comes out placed as it goes in."""
  found, program = [], None
  for step in range(STEPS):
    batch = reshape_batch(packed_batch(step % 3), accumulation=accumulation, shards=shards)
    inputs = harness.inputs(batch, learning_rate=2e-3)
    program = program or jax.jit(harness.step.__call__).lower(*inputs).compile()
    harness.state, metrics = program(*inputs)
    found.append((float(metrics.loss), float(metrics.grad_norm)))
  return np.array(found), program


@functools.cache
def one_device(name, *, shards=1, all_gather=True):
  """The steps on one device, whose rows may be counted as several devices'."""
  harness = Harness(model(name), all_gather=all_gather, **options_of(name))
  objective = dataclasses.replace(harness.step.objective, shards=shards)
  harness.step = dataclasses.replace(harness.step, objective=objective)
  return run(harness, shards)[0]


def check(name, mesh, *, all_gather=True, accumulation=1, **options):
  """Compares the steps on a mesh with one device's, of one micro-batch; returns the harness and the program."""
  harness = Harness(model(name), mesh=mesh, all_gather=all_gather, **options_of(name), **options)
  found, program = run(harness, harness.shards, accumulation)
  # What is normalised or balanced by data shard depends on their number, and on nothing else of the mesh.
  by_shard = not all_gather or "router_loss_coef" in options_of(name)
  expected = one_device(name, shards=harness.shards if by_shard else 1, all_gather=all_gather)
  np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-4)
  assert expected[-1, 0] < expected[0, 0] - 0.1  # The steps did something.
  return harness, program


def collectives(program):
  """(kind, dimensions of each array) of the exchanges in a compiled program."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all"
  for shapes, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", program.as_text()):
    yield kind, [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", shapes)]


def test_fsdp_collects_a_layer_at_a_time():
  """Weights travel by layer, never a stack of them nor the embedding tables; activations are not replicated."""
  harness, program = check("dense", {"fsdp": 8})
  shapes = harness.model.shapes.values()
  stacks = {leaf.shape for leaf in shapes if leaf.ndim == 3} | {(VOCAB, 32), (32, VOCAB)}
  found = {dims for kind, arrays in collectives(program) if kind == "all-gather" for dims in arrays}
  assert (32, 32) in found  # One layer's q_proj.
  assert not found & stacks
  assert not any(dims[:2] == (ROWS, LENGTH) and len(dims) > 2 for dims in found)


@pytest.mark.parametrize(
  "mesh",
  [
    {"tensor": 8},
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"sequence": 8}, marks=pytest.mark.slow),
    pytest.param({"expert": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_meshes(mesh):
  check("dense", mesh)


@pytest.mark.parametrize(
  ("name", "gpus"),
  [
    ("dense", True),
    *(
      pytest.param(name, gpus, marks=pytest.mark.slow)
      for name in ("dense", "fused", "qwen3_moe", "gpt_oss")
      for gpus in (False, True)
      if (name, gpus) != ("dense", True)
    ),
  ],
)
def test_widths_that_fsdp_does_not_divide(monkeypatch, name, gpus):
  """Weights of the layers are spread over all devices, two of which share what the width is not divided by."""
  monkeypatch.setattr(rules, "_on_gpus", lambda: gpus)
  harness, _ = check(f"{name}, odd", {"fsdp": 8}, fsdp_groups=2)
  for path, leaf in harness.state.params.items():
    if ".layers." in path and leaf.ndim > 2 and not path.endswith(("bias", "gate.kernel", "router.kernel")):
      assert leaf.size == 8 * leaf.addressable_shards[0].data.size, path


@pytest.mark.parametrize(
  ("name", "mesh"), [("fused", {"fsdp": 8}), ("qwen3_moe", {"fsdp": 4, "expert": 2})], ids=str
)
def test_what_is_collected_by_pieces_is_the_same(monkeypatch, name, mesh):
  """As on GPUs, where the axis that is collected has to be the outermost: outputs of down and o, width of experts."""
  monkeypatch.setattr(rules, "_on_gpus", lambda: True)
  _, program = check(name, mesh)
  # The pieces of a layer's down_proj, or of a device's experts, one after the other.
  pieces = (4, 4, 16, 8) if name == "qwen3_moe" else (8, 32, 4)
  assert pieces in {dims for kind, arrays in collectives(program) if kind == "all-gather" for dims in arrays}


def vision_on(mesh, config, tiles):
  """Shapes, places and gradients (of params and tiles) of a ViT's outputs on the mesh."""
  vit = define(lambda rngs: config.build(rngs=rngs))
  places = rules.weight_shardings(vit.axes, vit.shapes, mesh)
  spread = jax.NamedSharding(mesh, rules.activation_spec(("tiles", None, None, None), tiles, mesh))

  @jax.jit
  def gradients(params, x):
    with rules.scope(mesh):
      return jax.value_and_grad(lambda params, x: (vit.bind(params)(x) ** 2).sum(), argnums=(0, 1))(params, x)

  return vit, places, spread, gradients


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_25_heads_of_the_6b_vit(devices):
  """Tensor parallelism stores its weights in as many parts, though its heads are not split."""
  config = InternViTConfig(
    hidden_size=3200,
    intermediate_size=12800,
    num_layers=1,
    num_heads=25,
    patch_size=14,
    image_size=56,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_normalization=True,
  )
  shape = (8, 56, 56, 3)
  mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
  vit, places, spread, gradients = vision_on(mesh, config, shape)
  params = {path: leaf.update(sharding=places[path]) for path, leaf in vit.shapes.items()}
  x = jax.ShapeDtypeStruct(shape, np.float32, sharding=spread)
  program = gradients.lower(params, x).compile()
  layers = 4 * sum(leaf.size for path, leaf in vit.shapes.items() if "layers" in path)
  others = 4 * sum(leaf.size for path, leaf in vit.shapes.items() if "layers" not in path)
  assert layers > 20 * others
  assert program.memory_analysis().argument_size_in_bytes < 1.01 * layers / devices + others + 4 * x.size


def test_five_heads_on_eight_devices():
  """A ViT whose heads no mesh divides computes what one device does."""
  config = InternViTConfig(
    hidden_size=40,
    intermediate_size=64,
    num_layers=2,
    num_heads=5,
    patch_size=4,
    image_size=16,
    qk_normalization=True,
    norm_type="rms_norm",
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 16, 16, 3)).astype("f4")
  found = []
  for devices in (1, 8):
    mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
    vit, places, spread, gradients = vision_on(mesh, config, x.shape)
    values = np.random.default_rng(1)
    params = {
      path: values.normal(size=leaf.shape).astype("f4") / 6 for path, leaf in sorted(vit.shapes.items())
    }
    found.append(gradients(jax.device_put(params, places), jax.device_put(x, spread)))
  for theirs, ours in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_heads_that_do_not_divide(monkeypatch):
  """Six heads on four devices: queries keep their tokens, in blocks, and keys and values are collected."""
  monkeypatch.setattr(xla, "BLOCK", 8)
  check("grouped", {"fsdp": 2, "tensor": 4})


@pytest.mark.slow
def test_fused_projections():
  check("fused", {"fsdp": 2, "sequence": 2, "tensor": 2})


def test_lora_beside_a_frozen_vit():
  harness, _ = check("lora", {"fsdp": 2, "tensor": 2})
  layers = "language_model.model.layers.0:2"
  placed = {
    "q_proj.adapter.a": (None, "fsdp", None),
    "q_proj.adapter.b": (None, None, "tensor"),
    "o_proj.adapter.a": (None, "tensor", None),
    "o_proj.adapter.b": (None, None, "fsdp"),
  }
  for name, entries in placed.items():
    sharding = harness.state.params[f"{layers}.self_attn.{name}"].sharding
    assert sharding.is_equivalent_to(jax.NamedSharding(harness.mesh, jax.P(*entries)), 3), name


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("gpt_oss", {"data": 2, "expert": 4}),
    pytest.param("qwen3_moe", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", {"fsdp": 2, "expert": 2, "sequence": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_experts(name, mesh):
  check(name, mesh)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_zero(stage):
  """Stage 2 in two micro-batches, whose gradients are added up in parts."""
  harness, _ = check("dense", {"data": 8}, zero_stage=stage, accumulation=2 if stage == 2 else 1)
  path = "language_model.model.layers.0:2.mlp.gate_proj.kernel"
  params, moments = harness.state.params[path], harness.state.opt_state[0].mu[path]
  shares = [array.size // array.addressable_shards[0].data.size for array in (params, moments)]
  assert shares == [8 if stage == 3 else 1, 8]
  part = harness.step.places.gradients[path].shard_shape(params.shape)
  assert params.size // np.prod(part) == (1 if stage == 1 else 8)


def test_a_checkpoint_goes_on_with_another_mesh(tmp_path):
  """Fully sharded there, on an axis that is cut; by ZeRO 1 over three axes here; nothing is in memory twice."""
  there = Harness(model("dense, odd"), mesh={"fsdp": 8}, fsdp_groups=2)
  there.run(reshape_batch(packed_batch(0), accumulation=1, shards=8))
  writer = Checkpointer(tmp_path, keep=None)
  writer.save(there.state, loader={}, trainer={})
  writer.wait()
  here = Harness(model("dense, odd"), mesh={"data": 2, "sequence": 2, "tensor": 2}, zero_stage=1)
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), here.state
  )
  restored, _, _ = writer.restore(like)
  writer.close()
  assert int(restored.step) == 1
  assert jax.tree.structure(restored) == jax.tree.structure(here.state)
  for ours, saved, place in zip(*map(jax.tree.leaves, (restored, there.state, here.state)), strict=True):
    np.testing.assert_array_equal(ours, saved)
    assert ours.sharding.is_equivalent_to(place.sharding, ours.ndim)
  # It trains there.
  here.state = restored
  again = [h.run(reshape_batch(packed_batch(1), accumulation=1, shards=h.shards)).loss for h in (there, here)]
  np.testing.assert_allclose(*map(float, again), rtol=0, atol=1e-5)


def test_denominators_by_shard_on_all_axes(monkeypatch):
  """Each data shard has its own denominator, however many devices share its rows; the loss goes by three chunks."""
  monkeypatch.setattr(vocab_parallel, "CHUNK_LOGITS", 8 * 16 * 8)
  monkeypatch.setattr(vocab_parallel, "_LANES", 1)
  check("dense", {"fsdp": 2, "sequence": 2, "tensor": 2}, all_gather=False, how=Execution(remat="full"))


# --- Where things lie ---------------------------------------------------------------------------------------


def mesh_of(**sizes):
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_activations_take_the_axes_that_divide_them():
  names = ("rows", "tokens", "heads", None)
  mesh = mesh_of(data=2, fsdp=2, sequence=4, tensor=2)
  assert rules.activation_spec(names, (8, 64, 6, 4), mesh) == jax.P(
    ("data", "fsdp"), "sequence", "tensor", None
  )
  # Odd heads leave their axis to the tokens, and odd lengths stay whole.
  assert rules.activation_spec(names, (8, 64, 7, 4), mesh) == jax.P(
    ("data", "fsdp"), ("sequence", "tensor"), None, None
  )
  assert rules.activation_spec(names, (8, 63, 7, 4), mesh) == jax.P(("data", "fsdp"), None, None, None)
  with pytest.raises(AssertionError):
    rules.activation_spec(("row",), (8,), mesh)


def test_pools_of_tiles_are_spread_over_the_devices_that_share_them():
  mesh = jax.make_mesh((1, 2, 1, 2, 2), AXES)
  for tiles, held in ((8, 2), (6, 6), (0, 0)):
    batch = reshape_batch(packed_batch(0), accumulation=1, shards=2)
    batch = batch._replace(tiles=np.zeros((1, 2, tiles, 16, 16, 3), "u1"))
    placed = batches.place_batch(batch, mesh)
    assert {shard.data.shape[:3] for shard in placed.tiles.addressable_shards} == {(1, 1, held)}
    assert {shard.data.shape for shard in placed.targets.addressable_shards} == {(1, ROWS // 2, LENGTH)}
    np.testing.assert_array_equal(placed.targets, batch.targets)


def test_without_a_mesh_nothing_is_constrained():
  jaxpr = str(jax.make_jaxpr(lambda x: rules.constrain(x, "rows", "tokens"))(np.zeros((2, 2))))
  assert "sharding" not in jaxpr


def test_the_table_of_parameters():
  """Full-size tables and an odd one: what it says, and what it warns of."""
  shapes = {
    "language_model.lm_head.kernel": jax.ShapeDtypeStruct((4096, 92553), np.float32),
    "language_model.model.layers.0:32.mlp.up_proj.kernel": jax.ShapeDtypeStruct(
      (32, 4096, 14336), np.float32
    ),
    "language_model.model.layers.0:32.input_layernorm.scale": jax.ShapeDtypeStruct((32, 4096), np.float32),
    "odd": jax.ShapeDtypeStruct((4097, 4099), np.float32),
  }
  axes = {
    "language_model.lm_head.kernel": ("table", "vocab"),
    "language_model.model.layers.0:32.mlp.up_proj.kernel": ("layers", "embed", "mlp"),
    "language_model.model.layers.0:32.input_layernorm.scale": ("layers", "embed"),
    "odd": ("embed", "mlp"),
  }
  mesh = jax.make_mesh((1, 4, 1, 1, 2), AXES)
  places = rules.state_shardings(axes, shapes, set(shapes) - {"odd"}, mesh)
  lines = placement_table(shapes, places)
  assert [line.split("  ")[-1].strip() for line in lines[1:-1]] == [
    "fsdp+tensor, -",
    "-, fsdp, tensor",
    "whole",
    "whole",
  ]
  up = 32 * 4096 * 14336 / 8 * 4 / 2**20
  assert f"{up:.2f}" in lines[2] and f"{2 * up:.2f}" in lines[2]
  (warning,) = placement_warnings(shapes, places)
  assert warning == (
    "1 large parameter(s) (odd is 4097x4099) stay whole on every device and take 0.06 GiB of each with their gradients "
    "and moments: their axes do not divide by the mesh (fsdp=4 tensor=2); make mesh.fsdp a power of two"
  )
  assert not placement_warnings(
    shapes, rules.state_shardings(axes, shapes, (), jax.make_mesh((8, 1, 1, 1, 1), AXES))
  )


def test_lengths_that_do_not_divide_are_refused():
  mesh = jax.make_mesh((1, 2, 1, 2, 2), AXES)
  check_lengths([256, 512], mesh)
  with pytest.raises(UserError, match=r"rows of 250 tokens .* mesh.sequence=2 x mesh.tensor=2 = 4 devices"):
    check_lengths([250, 256], mesh)
