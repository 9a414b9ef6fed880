"""Products in int8 and fp8: as near to the exact ones as the formats allow, on one device and on many."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.aot import cuda
from internvl_jax.arguments import MeshConfig
from internvl_jax.chips import GPUS
from internvl_jax.compiler import compiler_options
from internvl_jax.errors import UserError
from internvl_jax.models.functional import define, initialize
from internvl_jax.models.gradients import matmul
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.layers import LayerStack, Linear, remat_by_name
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.quantized import FORMATS, quantize, rounded
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.parallel.rules import Product
from internvl_jax.setup.step import check_quantize
from tests.support.cards import apart, needs_compiler
from tests.support.harness import Harness, make_batch, toy
from tests.support.toy import CURVE, log_history, run_training

PRODUCT = Product(("embed", "mlp"))
B, T, D, F = 2, 24, 48, 32

# Half a unit in the last place: relative to the number for floats, and to the scale below their normal numbers.
_HALF_ULP = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17), "int8": (0.0, 0.5)}

formats = pytest.mark.parametrize("name", FORMATS)


def operands(dtype="f4"):
  rng = np.random.default_rng(0)
  x, w, g = (rng.standard_normal(shape).astype(dtype) for shape in ((B, T, D), (D, F), (B, T, F)))
  # Features and tokens of very different size, as in language models.
  x[..., 5] *= 30
  return x, w / np.sqrt(D, dtype=dtype), g * np.exp(2 * rng.standard_normal((B, T, 1))).astype(dtype)


def with_gradients(multiply, x, w, g, product=PRODUCT):
  y, pull = jax.vjp(lambda x, w: multiply(x, w, product), x, w)
  return [np.asarray(a, np.float64) for a in (y, *pull(jnp.asarray(g, y.dtype)))]


def rounding(x, dtype, axis):
  """What rounding x may change each of its numbers by."""
  relative, absolute = _HALF_ULP[dtype.name]
  largest = float((jnp.iinfo if dtype.kind == "i" else jnp.finfo)(dtype).max)
  scale = np.max(np.abs(x), axis=axis, keepdims=True) / largest
  return np.maximum(relative * np.abs(x), absolute * scale)


def bound(a, b, a_off, b_off):
  """What the product of a and b may be off by, float32's own rounding included."""
  a, b = np.abs(a), np.abs(b)
  return a_off @ b + a @ b_off + a_off @ b_off + 1e-5 * (a @ b)


@formats
def test_products_are_as_near_as_their_operands(name):
  form = FORMATS[name]
  x, w, g = operands()
  y, dx, dw = with_gradients(form.matmul, x, w, g)
  x, w, g = (a.reshape(-1, a.shape[-1]).astype("f8") for a in (x, w, g))
  x_off, w_off = rounding(x, form.values, 1), rounding(w, form.values, 0)
  assert np.all(np.abs(y.reshape(-1, F) - x @ w) <= bound(x, w, x_off, w_off))
  # The scales of what is summed over are rounded with the gradient.
  w_scale, x_scale = (
    np.asarray(rounded(jnp.asarray(a), form.values, [i])[1], "f8") for a, i in ((w, 0), (x, 1))
  )
  g_off = rounding(g * w_scale, form.gradients, 1) / w_scale
  assert np.all(np.abs(dx.reshape(-1, D) - g @ w.T) <= bound(g, w.T, g_off, w_off.T))
  g_off = rounding(g * x_scale, form.gradients, 0) / x_scale
  off = bound(x.T, g, x_off.T, g_off) if form.for_weights else 1e-5 * (np.abs(x.T) @ np.abs(g))
  assert np.all(np.abs(dw - x.T @ g) <= off)


@formats
def test_gradients_point_where_the_exact_ones_do(name):
  """Rounding errors r of both operands that know nothing of each other turn a product by their root sum of squares."""
  form = FORMATS[name]
  x, w, g = operands()
  exact = with_gradients(matmul, x, w, g)
  angle = (
    2.0**-3 * np.sqrt(2 / 3) if name == "fp8" else 8 / 127 / np.sqrt(6)
  )  # 8: the largest over the usual.
  for ours, theirs in zip(with_gradients(form.matmul, x, w, g), exact, strict=True):
    cosine = np.sum(ours * theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine >= np.cos(angle), cosine


@formats
def test_zeros_stay_zeros(name):
  x, w, g = operands()
  x[0, 3], w[:, 7], g[1, 2], g[..., 9] = 0, 0, 0, 0
  y, dx, dw = with_gradients(FORMATS[name].matmul, x, w, g)
  assert all(np.isfinite(a).all() for a in (y, dx, dw))
  assert not y[0, 3].any() and not y[..., 7].any() and not dx[1, 2].any() and not dw[:, 9].any()
  assert np.count_nonzero(dw[:, 7]) == D


@formats
@pytest.mark.parametrize("value", [1e4, np.nan, np.inf])
def test_a_token_changes_no_other(name, value):
  """Outliers and what is not finite stay in their row, where they are seen."""
  x, w, g = operands()
  y, dx, _ = with_gradients(FORMATS[name].matmul, x, w, g)
  x[1, 4, 2] = g[1, 4, 2] = value
  others = np.ones((B, T), bool)
  others[1, 4] = False
  found_y, found_dx, dw = with_gradients(FORMATS[name].matmul, x, w, g)
  np.testing.assert_array_equal(found_y[others], y[others])
  np.testing.assert_array_equal(found_dx[others], dx[others])
  assert np.isfinite(found_y[1, 4]).all() == np.isfinite(value) == np.isfinite(found_dx[1, 4]).all()
  assert np.isfinite(dw).all() == np.isfinite(value)


def products(jaxpr):
  """The dtypes of the operands of all products in a program, those in its parts included."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(tuple(v.aval.dtype.name for v in equation.invars))
    for part in jax.tree.leaves(
      equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
    ):
      if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
        found += products(getattr(part, "jaxpr", part))
  return found


@pytest.mark.parametrize(
  ("name", "trained", "expected"),
  [
    ("int8", "x", [("int8", "int8")] * 2),
    ("int8", "w", [("int8", "int8"), ("bfloat16", "bfloat16")]),
    ("fp8", "x", [("float8_e4m3fn", "float8_e4m3fn"), ("float8_e5m2", "float8_e4m3fn")]),
    ("fp8", "w", [("float8_e4m3fn", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e5m2")]),
  ],
)
def test_what_is_frozen_gets_no_product(name, trained, expected):
  x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in operands())

  def loss(x, w):
    return jnp.sum(FORMATS[name].matmul(x, w, PRODUCT).astype(jnp.float32))

  program = jax.make_jaxpr(jax.grad(loss, argnums="xw".index(trained)))(x, w)
  assert products(program.jaxpr) == expected


class Tower(nnx.Module):
  """Three scanned layers of one product each."""

  def __init__(self, name, rngs, width=D):
    class MLP(nnx.Module):
      def __init__(self, rngs):
        self.fc1 = Linear(width, width, bias=True, axes=("embed", "mlp"), rngs=rngs)

    class Layer(nnx.Module):
      def __init__(self, rngs):
        self.mlp = MLP(rngs)

    self.layers = LayerStack(Layer, bounds=(0, 3), rngs=rngs)
    if name is not None:
      quantize(self, name)


def tower_loss(model, remat, mesh=None):
  """The function of parameters and inputs that is differentiated."""

  def apply(layer, x, xs):
    return x + jnp.tanh(layer.mlp.fc1(x)), {}

  def loss(params, x):
    with rules.scope(mesh):
      y, _ = model.bind(params).layers.scan(apply, x, remat=remat_by_name(remat))
      return jnp.mean(jnp.square(y.astype(jnp.float32)))

  return jax.value_and_grad(loss, argnums=(0, 1))


def tower_gradients(name, remat, mesh=None):
  """Loss and gradients, and the program's text."""

  def build(rngs):
    return Tower(name, rngs)

  model, params = define(build), initialize(build, jax.random.key(0))
  x = jnp.asarray(operands()[0])
  if mesh is not None:
    params = jax.device_put(params, rules.weight_shardings(model.axes, model.shapes, mesh))
  program = jax.jit(tower_loss(model, remat, mesh)).lower(params, x).compile()
  return program(params, x), program.as_text()


def relative(ours, theirs):
  ours, theirs = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]) for tree in (ours, theirs))
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@formats
def test_scanned_layers_rematerialised_or_not(name):
  (loss, gradients), _ = tower_gradients(name, None)
  for remat in ("full", "dots"):
    (again, others), _ = tower_gradients(name, remat)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    # A number on the border between two steps may fall to either side: one step in 127, or in 4, of one number.
    assert relative(others, gradients) < 1e-3
  (_, exact), _ = tower_gradients(None, None)
  assert 1e-3 < relative(gradients, exact) < 0.15


@formats
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "sequence": 2, "tensor": 2}])
def test_spread_products_are_those_of_one_device(name, sizes):
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[:8])
  x, w, g = operands()
  x, g = np.concatenate([x] * 4), np.concatenate([g] * 4)
  form = FORMATS[name]
  expected = with_gradients(form.matmul, x, w, g)
  places = NamedSharding(mesh, PartitionSpec(*rules.weight_entries(PRODUCT.axes, w.shape, mesh)))

  @jax.jit
  def spread(x, w, g):
    with rules.scope(mesh):
      y, pull = jax.vjp(lambda x, w: form.matmul(x, w, PRODUCT), x, w)
      return y, *pull(g)

  y, dx, dw = spread(x, jax.device_put(w, places), g)
  assert dw.sharding.is_equivalent_to(places, 2)
  for ours, theirs in zip((y, dx, dw), expected, strict=True):
    if name == "int8" and ours is not dw:
      np.testing.assert_array_equal(ours, theirs)  # Integers have one sum.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_weights_travel_in_eight_bits():
  mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()[:8])
  _, text = tower_gradients("int8", "full", mesh)
  gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
  weights = [dtype for dtype, shape in gathered if shape.endswith(f"{D},{D}")]
  assert weights and set(weights) == {"s8"}, gathered


def linears(config):
  """The linear maps of a model: path -> whether it multiplies otherwise."""
  model = nnx.eval_shape(lambda: InternVL(config, rngs=nnx.Rngs(0)))
  return {
    ".".join(map(str, path)): module.multiply is not matmul
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear)
  }


def test_the_layers_linear_maps_are_meant():
  lora = LoRASpec(rank=2, alpha=4.0)
  config = dataclasses.replace(toy(text={"lora": lora}), quantize="int8")
  found = linears(config)
  assert {path.rpartition(".")[2] for path, changed in found.items() if changed} == {
    *("qkv", "proj", "fc1", "fc2"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
  }
  assert {path for path, changed in found.items() if not changed} == {
    *("mlp1.linear_1", "mlp1.linear_2", "language_model.lm_head"),
  }
  experts = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=True)
  found = linears(dataclasses.replace(toy(text={"experts": experts}), quantize="fp8"))
  assert not found["language_model.model.layers.segments.0:2.mlp.gate"]


@pytest.mark.parametrize("name", ["none", *FORMATS])
def test_a_step_has_such_products_where_they_are_asked_for(name):
  harness = Harness(dataclasses.replace(toy(), quantize=name))
  found = products(jax.make_jaxpr(harness.step.__call__)(*harness.inputs(make_batch())).jaxpr)
  eight_bits = [kinds for kinds in found if kinds[0] in ("int8", "float8_e4m3fn", "float8_e5m2")]
  # Layers of 4 and of 7 maps: forward and the gradient of the input, in fp8 of the weight, too.
  assert len(eight_bits) == {"none": 0, "int8": 22, "fp8": 33}[name]


def gpu(kind, capability):
  return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


def test_devices_without_such_products_are_refused():
  a100, h100, amd = gpu("NVIDIA A100", "8.0"), gpu("NVIDIA H100", "9.0"), gpu("MI300X", "gfx942")
  v4, v5e = (SimpleNamespace(platform="tpu", device_kind=kind) for kind in ("TPU v4", "TPU v5 lite"))
  for name, device in (("int8", a100), ("int8", v5e), ("fp8", h100), ("fp8", gpu("RTX 4090", "8.9"))):
    check_quantize(name, device)
  check_quantize("none", amd)
  check_quantize("fp8", jax.devices("cpu")[0])
  for name, device in (("fp8", a100), ("int8", amd), ("int8", v4), ("fp8", v5e)):
    with pytest.raises(UserError, match=rf"runtime.quantize='{name}': {device.device_kind}.*'none'"):
      check_quantize(name, device)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "unit"), [("int8", 4 / 127 / 2), ("fp8", 2.0**-4)])
def test_follows_the_recorded_curve(tmp_path, setting, unit):
  """As near as bfloat16, by how much more is rounded: half a unit of the usual number, in int8 a quarter of the largest."""
  recorded = np.array([entry["loss"] for entry in json.loads((CURVE / "expected.json").read_text())["log"]])

  def distance(name, *overrides):
    done = run_training(tmp_path, tmp_path / name, *overrides)
    assert done.returncode == 0, done.stderr
    losses = [entry["loss"] for entry in log_history(tmp_path / name)]
    assert len(losses) == len(recorded)
    return np.max(np.abs(losses - recorded))

  ours = distance("ours", f"runtime.quantize={setting}")
  assert 1e-4 < ours <= distance("bf16", "training.bf16=True") * unit / 2.0**-8


def compiled_for(card, name, cards=1):
  """The text of the tower's program, compiled for cards that are only described."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=cards), cuda.compile_only_devices(GPUS[card], 1, cards))
  model = define(lambda rngs: Tower(name, rngs, width=1024))
  places = rules.weight_shardings(model.axes, model.shapes, mesh)
  params = {path: leaf.update(sharding=places[path]) for path, leaf in model.shapes.items()}
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  x = jax.ShapeDtypeStruct((cards, 2048, 1024), jnp.bfloat16, sharding=rows)
  lowered = jax.jit(tower_loss(model, "full", mesh)).lower(params, x)
  return lowered.compile(compiler_options=dict(compiler_options("gpu", compile_only=True))).as_text()


def library_products(text):
  """The calls of cuBLAS in a program: the kind of product and the dtype of its result."""
  found = re.findall(r"= \((\w+)\[[\d,]*\].* custom_call_target=\"__cublas\$lt\$matmul(\$f8)?\"", text)
  return sorted([kind or "plain", dtype] for dtype, kind in found)


@pytest.mark.cuda_aot
@needs_compiler
@pytest.mark.parametrize(
  ("card", "name", "expected"),
  [
    ("h100", None, [["plain", "bf16"]] * 4),
    # Forward, forward again, gradient of the input; in fp8 that of the weight, too.
    ("h100", "int8", [["plain", "bf16"]] + [["plain", "s32"]] * 3),
    ("a100-80g", "int8", [["plain", "bf16"]] + [["plain", "s32"]] * 3),
    ("h100", "fp8", [["$f8", "bf16"]] * 4),
    # What `check_quantize` refuses such cards for.
    ("a100-80g", "fp8", [["plain", "bf16"]] * 4),
  ],
)
def test_cards_multiply_in_eight_bits(card, name, expected):
  assert apart("test_quantized", "products_for", card, name) == expected


def products_for(card, name):
  return library_products(compiled_for(card, name))


@pytest.mark.cuda_aot
@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), [("int8", "s8"), ("fp8", "f8e4m3fn")])
def test_between_cards_weights_travel_in_eight_bits(name, dtype):
  assert apart("test_quantized", "gathered_for", name) == [dtype]


def gathered_for(name):
  lines = [line for line in compiled_for("h100", name, cards=8).splitlines() if " all-gather-start(" in line]
  return sorted({kind for line in lines for kind in re.findall(r"(\w+)\[(?:\d+,)*1024,1024\]", line)})
