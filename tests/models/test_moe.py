"""Feed-forwards of experts agree with a plain loop, with transformers' classes, and cost what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from internvl_jax.models.functional import define
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.moe import MoEConfig, load_balancing_loss

B, T, D, E, F, K = 3, 7, 24, 6, 10, 3

CONFIGS = {
  "normalized": MoEConfig(num_experts=E, top_k=K, intermediate_size=F, normalize_top_k=True),
  "plain": MoEConfig(num_experts=E, top_k=K, intermediate_size=F, normalize_top_k=False),
  # A limit and a slope of its own, so that some gates and ups are clamped and both settings are heard.
  "gpt_oss": GptOssMLPConfig(num_experts=E, top_k=K, intermediate_size=F, limit=1.5, alpha=1.3),
}

SIZES = {"hidden_size": D, "num_experts_per_tok": K}


@functools.cache
def model(name):
  return define(lambda rngs: CONFIGS[name].build(D, rngs))


@functools.cache
def params(name):
  """Numbers of the order of one for every parameter, biases included."""
  rng = np.random.default_rng(1)
  return {
    path: jnp.asarray(rng.normal(size=shape.shape) / np.sqrt(D), jnp.float32)
    for path, shape in model(name).shapes.items()
  }


@functools.cache
def inputs():
  rng = np.random.default_rng(2)
  x, cotangent = rng.normal(size=(2, B, T, D)).astype("f4")
  # The last row is padded.
  valid = np.ones((B, T), bool)
  valid[-1, 4:] = False
  return x, cotangent, valid


def forward(name, params, x, valid=None):
  return model(name).bind(params)(x, valid=valid)


@functools.cache
def results(name):
  """Outputs, statistics and gradients on `inputs`."""

  @jax.jit
  def run(params, x, cotangent, valid):
    (y, statistics), pull = jax.vjp(lambda params, x: forward(name, params, x, valid), params, x)
    zero = jax.tree.map(jnp.zeros_like, statistics)
    return y, statistics, *pull((cotangent, zero))

  return run(params(name), *inputs())


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def loop(name, p, x):
  """Output and router's softmax of one token x [D], in float64."""
  if name == "gpt_oss":
    scores = x @ p["router.kernel"] + p["router.bias"]
  else:
    scores = x @ p["gate.kernel"]
  chosen = np.argsort(-scores)[:K]
  weights = softmax(scores)[chosen] if name == "plain" else softmax(scores[chosen])
  y = np.zeros(D)
  for e, weight in zip(chosen, weights, strict=True):
    if name == "gpt_oss":
      h = x @ p["experts.gate_up_proj"][e] + p["experts.gate_up_proj_bias"][e]
      gate, up = np.minimum(h[0::2], 1.5), np.clip(h[1::2], -1.5, 1.5)
      h = (up + 1) * gate * sigmoid(1.3 * gate)
      y += weight * (h @ p["experts.down_proj"][e] + p["experts.down_proj_bias"][e])
    else:
      gate, up = x @ p["experts.gate_proj"][e], x @ p["experts.up_proj"][e]
      y += weight * ((gate * sigmoid(gate) * up) @ p["experts.down_proj"][e])
  return y, softmax(scores), chosen


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_tokens_and_experts(name):
  p = {path: np.asarray(value, np.float64) for path, value in params(name).items()}
  x, _, valid = inputs()
  y, statistics, *_ = results(name)
  load, prob = np.zeros((B, E)), np.zeros((B, E))
  for b, t in np.ndindex(B, T):
    expected, probs, chosen = loop(name, p, x[b, t].astype(np.float64))
    np.testing.assert_allclose(y[b, t], expected, rtol=0, atol=1e-5)
    if valid[b, t]:
      load[b, chosen] += 1
      prob[b] += probs
  np.testing.assert_array_equal(statistics["router_load"], load)
  np.testing.assert_allclose(statistics["router_prob"], prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "gpt_oss"])
def test_a_row_does_not_depend_on_its_neighbours(name):
  x, _, valid = inputs()
  y, statistics, *_ = results(name)
  # All tokens of the neighbours are the same, and crowd onto the same experts.
  crowded = np.where(np.arange(B)[:, None, None] == 1, x, x[0, 0])
  run = jax.jit(functools.partial(forward, name))
  other, other_statistics = run(params(name), crowded, valid)
  np.testing.assert_allclose(other[1], y[1], rtol=0, atol=1e-6)
  for key, value in statistics.items():
    np.testing.assert_allclose(other_statistics[key][1], value[1], rtol=1e-6)
  # With all rows like this, other experts have no tokens at all.
  same, _ = run(params(name), np.broadcast_to(x[0, 0], x.shape), valid)
  np.testing.assert_allclose(same, np.broadcast_to(y[0, 0], x.shape), rtol=0, atol=1e-6)


def primitives(jaxpr):
  """Names of the operations of a program, those of inner ones included."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name, [var.aval for var in eqn.outvars]
    for inner in jaxprs_in_params(eqn.params):
      yield from primitives(inner)


@pytest.mark.parametrize(("name", "products"), [("plain", 3), ("gpt_oss", 2)])
def test_frozen_experts_have_no_weight_gradients(name, products):
  x, *_ = inputs()

  def loss(train, frozen, x):
    return jnp.sum(forward(name, {**frozen, **train}, x)[0])

  def count(train):
    frozen = {path: value for path, value in params(name).items() if path not in train}
    grad = jax.make_jaxpr(jax.grad(loss, argnums=(0, 2)))(train, frozen, x)
    found = list(primitives(grad.jaxpr))
    # Float numbers are never added by scattering, except the k scores of each token in its own row.
    scattered = [avals[0] for name, avals in found if name == "scatter-add"]
    assert all(aval.shape == (B, T, E) for aval in scattered if jnp.issubdtype(aval.dtype, jnp.floating))
    return sum(name.startswith("ragged_dot") for name, _ in found)

  router = {path: value for path, value in params(name).items() if not path.startswith("experts.")}
  # One product forward and one for the rows' gradient; a third for the weight's.
  assert count({}) == count(router) == 2 * products
  assert count(params(name)) == 3 * products


def test_bfloat16():
  """Dtypes in and out, and a router that is not rounded: it chooses as in float32."""
  x, _, valid = inputs()
  x = jnp.asarray(x, jnp.bfloat16)
  for name in ("plain", "gpt_oss"):
    run = jax.jit(functools.partial(forward, name))
    y, statistics = run(params(name), x, valid)
    exact, exact_statistics = run(params(name), x.astype(jnp.float32), valid)
    assert y.dtype == jnp.bfloat16
    assert {value.dtype for value in statistics.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(statistics["router_load"], exact_statistics["router_load"])
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0, atol=0.03)


def test_full_size():
  """The layers of Qwen3-235B-A22B and gpt-oss-20b, as shapes."""
  qwen = MoEConfig(num_experts=128, top_k=8, intermediate_size=1536, normalize_top_k=True)
  layer = define(lambda rngs: qwen.build(4096, rngs))
  assert {path: shape.shape for path, shape in layer.shapes.items()} == {
    "gate.kernel": (4096, 128),
    "experts.gate_proj": (128, 4096, 1536),
    "experts.up_proj": (128, 4096, 1536),
    "experts.down_proj": (128, 1536, 4096),
  }
  assert layer.axes == {
    "gate.kernel": ("embed", None),
    "experts.gate_proj": ("expert", "embed", "mlp"),
    "experts.up_proj": ("expert", "embed", "mlp"),
    "experts.down_proj": ("expert", "mlp", "embed"),
  }
  oss = GptOssMLPConfig(num_experts=32, top_k=4, intermediate_size=2880)
  other = define(lambda rngs: oss.build(2880, rngs))
  assert {path: shape.shape for path, shape in other.shapes.items()} == {
    "router.kernel": (2880, 32),
    "router.bias": (32,),
    "experts.gate_up_proj": (32, 2880, 5760),
    "experts.gate_up_proj_bias": (32, 5760),
    "experts.down_proj": (32, 2880, 2880),
    "experts.down_proj_bias": (32, 2880),
  }
  assert {path: len(axes) for path, axes in other.axes.items()} == {
    path: len(shape.shape) for path, shape in other.shapes.items()
  }
  for definition, width, experts in ((layer, 4096, 128), (other, 2880, 32)):
    x = jax.ShapeDtypeStruct((2, 4096, width), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((2, 4096), bool)
    y, statistics = jax.eval_shape(
      lambda p, x, valid, d=definition: d.bind(p)(x, valid=valid), definition.shapes, x, valid
    )
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert {value.shape for value in statistics.values()} == {(2, experts)}


def test_an_even_load_costs_top_k():
  """A shard of padding counts as 0, and gradients stay finite."""
  load, prob = jnp.full((2, 4, E), K * T / E), jnp.full((2, 4, E), T / E)
  np.testing.assert_allclose(load_balancing_loss(load, prob, jnp.full(4, T), shards=2), K, rtol=1e-6)
  empty = jnp.array([1, 1, 0, 0])[None, :, None]
  tokens = jnp.array([T, T, 0, 0])
  value, grad = jax.value_and_grad(load_balancing_loss, argnums=1)(
    load * empty, prob * empty, tokens, shards=2
  )
  np.testing.assert_allclose(value, K / 2, rtol=1e-6)
  assert np.isfinite(grad).all()


def reference(name):
  """transformers' module with the same parameters, and what makes ours of its gradients."""
  torch = pytest.importorskip("torch")
  p = {path: torch.tensor(np.asarray(value)) for path, value in params(name).items()}
  if name == "gpt_oss":
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    config = GptOssConfig(
      **SIZES, num_local_experts=E, intermediate_size=F, swiglu_limit=1.5, swiglu_alpha=1.3
    )
    state = {path: value for path, value in p.items() if path.startswith("experts.")}
    state |= {"router.weight": p["router.kernel"].T, "router.bias": p["router.bias"]}
    make = GptOssMLP
  else:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
      **SIZES, num_experts=E, moe_intermediate_size=F, norm_topk_prob=name == "normalized"
    )
    gate_up = torch.cat([p["experts.gate_proj"], p["experts.up_proj"]], dim=-1)
    state = {
      "gate.weight": p["gate.kernel"].T,
      "experts.gate_up_proj": gate_up.mT,
      "experts.down_proj": p["experts.down_proj"].mT,
    }
    make = Qwen3MoeSparseMoeBlock
  config._experts_implementation = "eager"
  module = make(config)
  module.load_state_dict(state)

  def ours(grads):
    if name == "gpt_oss":
      kernel = grads.pop("router.weight").T
      return {**grads, "router.kernel": kernel}
    gate, up = np.split(grads["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
    down = grads["experts.down_proj"].swapaxes(1, 2)
    return {
      "gate.kernel": grads["gate.weight"].T,
      "experts.gate_proj": gate,
      "experts.up_proj": up,
      "experts.down_proj": down,
    }

  return module, ours


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name):
  torch = pytest.importorskip("torch")
  module, ours = reference(name)
  x, cotangent, _ = inputs()
  y, _, grads, x_grad = results(name)
  tensor = torch.tensor(x, requires_grad=True)
  out = module(tensor)
  out = out[0] if isinstance(out, tuple) else out
  out.backward(torch.tensor(cotangent))
  np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=1e-5)
  expected = ours({path: value.grad.numpy() for path, value in module.named_parameters()})
  assert expected.keys() == grads.keys()
  for path, theirs in {**expected, "x": tensor.grad.numpy()}.items():
    mine = x_grad if path == "x" else grads[path]
    error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
    assert error < 1e-4, (path, error)


@pytest.mark.torch
def test_load_balancing_equals_transformers():
  torch = pytest.importorskip("torch")
  from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

  L, R, shards = 2, 4, 2
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(L, R, T, D)), jnp.float32)
  mask = np.arange(T) < np.array([7, 2, 5, 4])[:, None]
  kernel = np.asarray(params("plain")["gate.kernel"])

  def loss(kernel):
    def layer(x):
      return forward("plain", {**params("plain"), "gate.kernel": kernel}, x, mask)[1]

    statistics = jax.lax.map(layer, x)
    tokens = mask.sum(axis=1)
    return load_balancing_loss(statistics["router_load"], statistics["router_prob"], tokens, shards=shards)

  value, grad = jax.jit(jax.value_and_grad(loss))(kernel)

  weight = torch.tensor(kernel, requires_grad=True)
  losses = []
  for rows in np.split(np.arange(R), shards):
    logits = tuple((torch.tensor(np.asarray(x[i, rows])) @ weight).reshape(-1, E) for i in range(L))
    losses.append(load_balancing_loss_func(logits, E, K, torch.tensor(mask[rows])))
  expected = sum(losses) / shards
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
  error = np.linalg.norm(grad - weight.grad.numpy()) / np.linalg.norm(weight.grad.numpy())
  assert error < 1e-4
