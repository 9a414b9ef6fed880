"""Frozen weights in fewer bits under adapters: what is stored, where, and that it computes what restored weights do."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from safetensors.numpy import load_file

from internvl_jax.adapters import merge_and_check
from internvl_jax.arguments import MeshConfig
from internvl_jax.config import TrainConfig
from internvl_jax.config_checks import problems
from internvl_jax.hf.model import Changes, open_source
from internvl_jax.models import functional
from internvl_jax.models.base_weights import as_kernels, is_part, quantized_kernels, restored
from internvl_jax.models.internvl import Execution, InternVL
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.weight_formats import FORMATS
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.state import with_dtypes
from tests.support.harness import Harness, make_batch, reshape_batch, toy
from tests.support.toy import CURVE

SPEC = LoRASpec(rank=2, alpha=4.0)
FLAGS = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "use_llm_lora": 2}
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

formats = pytest.mark.parametrize("name", FORMATS)


def adapted(name, *, text=None, **settings):
  """A step over a toy whose language model is of whole blocks."""
  text = {"lora": SPEC, "quantize_base": name, "head_dim": 16, **(text or {})}
  config = toy(vision_layers=1, width=64, text=text)
  return Harness(config, freeze=FLAGS, **settings)


def with_same_kernels(quantized, plain):
  """`plain`, frozen kernels and all, with what is stored in `quantized`, of which all blocks get one scale.

  Other scales are sums of products: a compiler may round them once or twice, and does so by what it fuses them with.
  """
  quantized.frozen = {
    path: jnp.full_like(value, 127) if path.endswith(".scales") and value.dtype == jnp.uint8 else value
    for path, value in quantized.frozen.items()
  }
  plain.frozen = {path: jnp.asarray(value) for path, value in restored(quantized.frozen).items()}
  plain.state = quantized.state
  return plain


def gradients(harness, batch):
  step = harness.step
  found = jax.jit(lambda params, frozen, batch: step.value_and_grad(params, frozen, batch, jnp.int32(0), {}))
  state, frozen, batch, _ = harness.inputs(batch)
  return jax.tree.map(np.asarray, found(state.params, frozen, batch))


EXPERTS = {"experts": MoEConfig(num_experts=4, top_k=2, intermediate_size=64, normalize_top_k=True)}


@pytest.mark.parametrize(("name", "remat"), [("nf4", "full"), ("int8", None)])
def test_gradients_are_those_of_restored_weights(name, remat):
  """Exactly: what is multiplied is the same, forward and backward."""
  how = Execution(remat=remat)
  quantized, batch = adapted(name, how=how), make_batch()
  plain = with_same_kernels(quantized, adapted("none", how=how))
  ours, theirs = gradients(quantized, batch), gradients(plain, batch)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert all(np.abs(g).max() > 0 for path, g in ours[1].items() if path.endswith(".b"))


def test_experts_are_those_of_restored_weights():
  quantized, batch = adapted("nf4", text=EXPERTS), make_batch()
  assert any(path.endswith("experts.down_proj.codes") for path in quantized.frozen)
  plain = with_same_kernels(quantized, adapted("none", text=EXPERTS))
  jax.tree.map(np.testing.assert_array_equal, gradients(quantized, batch), gradients(plain, batch))


@pytest.mark.parametrize(
  ("name", "text", "sizes"),
  [
    ("nf4", {}, {"fsdp": 2, "tensor": 2}),
    ("int8", EXPERTS, {"fsdp": 2, "expert": 2, "tensor": 2}),
    pytest.param("int8", {}, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("nf4", EXPERTS, {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_a_mesh_computes_the_same(name, text, sizes):
  alone, spread = adapted(name, text=text), adapted(name, text=text, mesh=sizes)
  batch = make_batch()
  (loss, _), expected = gradients(alone, batch)
  (found, _), grads = gradients(spread, reshape_batch(batch, 1, spread.shards))
  np.testing.assert_allclose(found, loss, rtol=1e-6)
  for path, grad in expected.items():
    np.testing.assert_allclose(grads[path], grad, rtol=0, atol=1e-5 * np.abs(grad).max(), err_msg=path)


def test_codes_are_sharded_and_travel_as_such():
  harness = adapted("nf4", mesh={"fsdp": 8}, text={"intermediate_size": 512})
  codes = {path: leaf for path, leaf in harness.frozen.items() if path.endswith(".codes")}
  assert codes and all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in codes.values())
  batch = make_batch(rows=16, shards=8)
  text = jax.jit(harness.step.__call__).lower(*harness.inputs(batch)).compile().as_text()
  gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
  assert any(dtype == "u8" and shape.endswith("32,512") for dtype, shape in gathered), gathered
  assert not any(shape.endswith("64,512") for _, shape in gathered), gathered


@pytest.mark.parametrize("remat", [None, "dots"])
def test_nothing_restored_is_kept_for_the_backward_pass(capsys, remat):
  """With and without recomputation: what is kept of a stack of kernels are its codes."""

  def kept(name):
    harness = adapted(name, how=Execution(remat=remat), text={"intermediate_size": 192})
    params, frozen, batch, _ = harness.inputs(make_batch())
    step = harness.step
    print_saved_residuals(
      lambda params: step.objective.loss(
        {**frozen, **params},
        jax.tree.map(lambda leaf: leaf[0], batch),
        jax.tree.map(lambda leaf: leaf[0], step.objective.weights(batch)),
        jax.random.key(0),
        {},
        share=1.0,
      )[0],
      params.params,
    )
    return re.findall(r"(\w+)\[2,(?:1,)?(?:64,192|192,64|32,192|96,64)\]", capsys.readouterr().out)

  assert set(kept("nf4")) <= {"uint8", "u8"}


def test_restoring_stays_inside_the_scan():
  """JAX takes out of a scan what depends on no layer: arrays of a table's values, one for each weight of a matrix."""
  harness = adapted("nf4", how=Execution(remat="full"), text={"intermediate_size": 192})
  program = jax.make_jaxpr(harness.step.__call__)(*harness.inputs(make_batch()))
  outside = [var.aval.shape for equation in program.jaxpr.eqns for var in equation.outvars]
  assert not [shape for shape in outside if shape[-3:] in ((2, 32, 192), (2, 32, 64))]
  assert not [shape for shape in outside if shape[-2:] in ((64, 192), (192, 64), (1, 192), (3, 64))]


def test_what_is_stored():
  config = toy(width=64, text={"lora": SPEC, "quantize_base": "nf4", "head_dim": 16}, lora=SPEC)
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  kernels = {path.split("0:2.")[-1] for path in quantized_kernels(model.shapes)}
  maps = {f"self_attn.{name}_proj.kernel" for name in "qkvo"}
  assert kernels == maps | {f"mlp.{name}_proj.kernel" for name in ("gate", "up", "down")}
  plain = dataclasses.replace(config, text=dataclasses.replace(config.text, quantize_base="none"))
  expected = functional.define(lambda rngs: InternVL(plain, rngs=rngs)).shapes
  assert {path: leaf.shape for path, leaf in as_kernels(model.shapes).items()} == {
    path: leaf.shape for path, leaf in expected.items()
  }
  stored = with_dtypes(model, set(), bf16=True)
  assert {leaf.dtype.name for path, leaf in stored.items() if is_part(path)} == {"uint8", "float32"}
  assert {leaf.dtype.name for path, leaf in stored.items() if not is_part(path)} == {"bfloat16"}
  for path, leaf in stored.items():
    assert len(model.axes[path]) == leaf.ndim, path


def test_columns_that_are_no_whole_blocks_stay():
  config = toy(width=48, text={"lora": SPEC, "quantize_base": "nf4"})
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  assert {path.split("0:2.")[-1] for path in quantized_kernels(model.shapes)} == set()
  eight = dataclasses.replace(config, text=dataclasses.replace(config.text, quantize_base="int8"))
  assert quantized_kernels(functional.define(lambda rngs: InternVL(eight, rngs=rngs)).shapes)


# --- Checkpoints --------------------------------------------------------------------------------------------------


def open_quantized(name, mesh=None, **spec):
  source = open_source(
    CURVE / "init", Changes(text_lora=dataclasses.replace(SPEC, **spec), quantize_base=name)
  )
  shapes = with_dtypes(source.model, set(), bf16=False)
  place = dict.fromkeys(shapes, PLACE)
  if mesh is not None:
    place = rules.weight_shardings(source.model.axes, shapes, mesh)
  return source, source.load(shapes, place, seed=3)


@formats
def test_a_checkpoint_is_read_into_parts(name):
  """As they are on one device, on four, and by quantizing what was read whole."""
  source, params = open_quantized(name)
  whole = open_source(CURVE / "init").lazy(jnp.float32)
  kernels = quantized_kernels(params)
  assert kernels
  for path, parts in kernels.items():
    expected = jax.jit(FORMATS[name].quantize)(np.asarray(whole[path]))
    for part, value in parts.items():
      np.testing.assert_array_equal(value, expected[part], err_msg=f"{path} {part}")
  if name == "int8":
    return
  mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
  _, spread = open_quantized(name, mesh)
  for path, value in spread.items():
    if path.endswith((".scale_offset", ".scale_scales")):
      # A mean of what several devices hold may be rounded otherwise.
      np.testing.assert_allclose(value, params[path], rtol=1e-5, err_msg=path)
    elif not path.endswith(".scales"):
      np.testing.assert_array_equal(value, params[path], err_msg=path)
    else:
      assert np.abs(np.int32(value) - np.int32(params[path])).max() <= 1, path
  assert source.reference_names.keys() == as_kernels(source.model.shapes).keys()


def test_dora_begins_at_the_norms_of_what_is_restored():
  _, params = open_quantized("nf4", use_dora=True)
  kernels = restored(params)
  magnitudes = {path: value for path, value in params.items() if path.endswith("q_proj.adapter.magnitude")}
  assert magnitudes
  for path, value in magnitudes.items():
    kernel = np.asarray(kernels[path.replace("adapter.magnitude", "kernel")])
    np.testing.assert_allclose(value, np.linalg.norm(kernel, axis=-2), rtol=1e-6)


def test_merging_gives_what_was_computed():
  """`merge_and_check` compares logits; the merged kernels are restored ones, with the adapters' part."""
  source, params = open_quantized("nf4")
  rng = np.random.default_rng(0)
  params = {
    path: value + 0.1 * rng.normal(size=value.shape).astype("f4") if path.endswith(".adapter.b") else value
    for path, value in params.items()
  }
  merged, weights = merge_and_check(source, params)
  assert weights.keys() == merged.model.shapes.keys()
  path = next(path for path in weights if path.endswith("up_proj.kernel"))
  adapter = path.replace("kernel", "adapter.")
  kernel = jax.jit(FORMATS["nf4"].restore)(quantized_kernels(params)[path])
  expected = kernel + 2.0 * params[f"{adapter}a"] @ params[f"{adapter}b"]
  np.testing.assert_allclose(np.asarray(weights[path]), expected, rtol=0, atol=1e-6)
  untouched = load_file(CURVE / "init/model.safetensors")["language_model.model.layers.0.mlp.up_proj.weight"]
  assert np.abs(kernel[0].T - untouched).max() > 0


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.use_llm_lora": 16, "runtime.quantize": "int8"}, "lora.quantize_base='nf4' stores weights that"),
    ({}, "lora.quantize_base='nf4' has no effect without model.use_llm_lora"),
    (
      {"model.use_backbone_lora": 4, "model.unfreeze_vit_layers": -2},
      "model.unfreeze_vit_layers=-2 trains layers whose weights",
    ),
    ({"lora.quantize_base": "fp4"}, "lora.quantize_base='fp4' must be 'none' or 'int8' or 'nf4'"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
  config = TrainConfig()
  for path, value in {"lora.quantize_base": "nf4", **changes}.items():
    leaf, name = path.split(".")
    setattr(getattr(config, leaf), name, value)
  assert any(words in line for line in problems(config, "plan")), problems(config, "plan")
