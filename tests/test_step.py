"""The optimizer step: what it sums, what it leaves alone, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models import functional
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.gradients import matmul
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import remat_by_name
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.towers.internvit import InternViTConfig
from internvl_jax.objectives import normalized_weights
from internvl_jax.parallel import rules
from tests.support.harness import Harness, make_batch, reshape_batch, toy


@functools.cache
def _compiled_once():
  harness = Harness(toy())
  return harness, harness.state


def plain():
  """The plainest step at its start, whose program is compiled for the first test that takes it."""
  harness, harness.state = _compiled_once()
  return harness


def test_accumulation_equals_one_large_batch():
  batch = make_batch(rows=8)
  one = plain().run(batch)
  four = plain().run(reshape_batch(batch, accumulation=4, shards=1))
  np.testing.assert_allclose(four.loss, one.loss, rtol=1e-6)
  np.testing.assert_allclose(four.grad_norm, one.grad_norm, rtol=1e-5)


@functools.cache
def one_device(all_gather):
  """Two steps. Per-shard denominators on one device: the shards' means are micro-batches' means."""
  batch = reshape_batch(make_batch(rows=16), accumulation=1 if all_gather else 8, shards=1)
  return Harness(toy(), all_gather=all_gather).run(batch, steps=2)


@pytest.mark.parametrize(
  ("mesh", "all_gather"),
  [
    pytest.param({"data": 8}, False, marks=pytest.mark.slow),
    ({"fsdp": 8, "data": 1}, True),
    ({"data": 2, "fsdp": 4}, False),
  ],
)
def test_meshes_agree_with_one_device(mesh, all_gather):
  """All denominators are equal when each shard's micro-batch is normalised by hand into another's weights."""
  one = one_device(all_gather)
  spread = Harness(toy(), mesh=mesh, all_gather=all_gather)
  many = spread.run(reshape_batch(make_batch(rows=16), accumulation=1, shards=8), steps=2)
  np.testing.assert_allclose(many.loss, one.loss, rtol=1e-5)
  np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-4)


def test_fsdp_shards_weights_and_moments():
  harness = Harness(toy(), mesh={"fsdp": 8, "data": 1})
  path = "language_model.model.layers.0:2.mlp.gate_proj.kernel"
  assert harness.state.params[path].addressable_shards[0].data.size * 8 == harness.state.params[path].size
  moment = harness.state.opt_state[0].mu[path]
  assert moment.sharding == harness.state.params[path].sharding


def test_plain_and_fused_loss_agree():
  batch = make_batch()
  logits, fused = Harness(toy(), fused=False).run(batch), plain().run(batch)
  np.testing.assert_allclose(fused.loss, logits.loss, rtol=1e-6)
  np.testing.assert_allclose(fused.grad_norm, logits.grad_norm, rtol=1e-5)


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("dots", 2)])
def test_remat_and_unrolling_change_no_number(remat, unroll):
  batch = make_batch()
  other = Harness(toy(), how=Execution(remat=remat, scan_unroll=unroll)).run(batch)
  kept = plain().run(batch)
  np.testing.assert_allclose(other.loss, kept.loss, rtol=1e-6)
  np.testing.assert_allclose(other.grad_norm, kept.grad_norm, rtol=1e-5)


def test_remat_keeps_what_its_policy_says():
  """Two products and a sine after each: forward, two backward each, and what is computed again."""
  x, w = jnp.ones((2, 4, 8)), jnp.ones((8, 8))
  product = rules.Product(("embed", "embed"))

  def products(policy):
    def layer(x):
      return jnp.sum(jnp.sin(matmul(jnp.sin(matmul(x, w, product)), w, product)))

    layer = layer if policy is None else remat_by_name(policy)(layer)
    return str(jax.make_jaxpr(jax.grad(layer))(x)).count("dot_general[")

  # The weight does not train.
  assert [products(policy) for policy in (None, "dots", "full")] == [4, 4, 6]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters():
  harness = Harness(toy(), how=Execution(dtype=jnp.bfloat16))
  before = plain().run(make_batch())
  after = harness.run(make_batch())
  assert all(value.dtype == jnp.float32 for value in harness.state.params.values())
  assert after.loss != before.loss
  np.testing.assert_allclose(after.loss, before.loss, rtol=2e-2)


def test_drop_path_draws_anew_each_step_and_only_when_asked():
  def losses(rate):
    harness = Harness(toy(vision_layers=4), drop_path=rate)
    weights, batch = dict(harness.state.params), jax.tree.map(jnp.asarray, make_batch())
    loss_of = jax.jit(lambda step: harness.step.value_and_grad(weights, {}, batch, step, {})[0][0])
    return [float(loss_of(step)) for step in range(3)]

  assert len(set(losses(0.0))) == 1
  assert len(set(losses(0.5))) == 3


@pytest.mark.parametrize(
  ("freeze", "part"),
  [("freeze_backbone", "vision_model"), ("freeze_mlp", "mlp1"), ("freeze_llm", "language_model")],
)
def test_a_frozen_part_has_no_state_and_does_not_move(freeze, part):
  harness = Harness(toy(), freeze={freeze: True})
  before = {path: np.asarray(value) for path, value in (harness.frozen | harness.state.params).items()}
  harness.run(make_batch(), steps=2)
  after = harness.frozen | harness.state.params
  for path, value in before.items():
    moved = bool((np.asarray(after[path]) != value).any())
    # A key bias shifts all of a query's scores alike, so it has no gradient, and biases do not decay.
    assert moved == (not path.startswith(part)) or path.endswith("k_proj.bias"), path
  assert not any(path.startswith(part) for path in harness.state.opt_state[0].mu)


def test_the_routers_loss_is_a_mean_over_shards_and_micro_batches():
  """What it adds to the loss does not depend on the language loss, and is the mean of what each part adds."""
  experts = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=True)
  batch = make_batch(rows=8)
  config = toy(text={"experts": experts})

  def added_on(mesh):
    without, harness = (Harness(config, mesh=mesh, router_loss_coef=coef) for coef in (0.0, 0.5))

    @jax.jit
    def difference(params, batch):  # Of losses alone: no gradient is compiled.
      first, second = (h.step.value_and_grad(params, {}, batch, 0, {})[0][0] for h in (without, harness))
      return (second - first) / 0.5

    return lambda batch: float(difference(harness.state.params, harness.inputs(batch)[2]))

  added, added_by_shards = added_on(None), added_on({"data": 2})

  one, two = (reshape_batch(batch, accumulation=2, shards=1) for _ in range(2))
  halves = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], one) for i in range(2)]
  parts = [added(half) for half in halves]
  assert all(2.0 <= part < 4.0 for part in parts)  # k where the load is even, E where one expert takes all
  assert parts[0] != pytest.approx(parts[1], abs=1e-4)
  assert added(two) == pytest.approx(np.mean(parts), abs=1e-5)
  sharded = reshape_batch(batch, accumulation=1, shards=2)
  assert added_by_shards(sharded) == pytest.approx(np.mean(parts), abs=1e-5)


def test_the_program_does_not_grow_with_depth():
  """The same number of equations, whatever the number of layers, forward and backward."""

  def equations(layers):
    harness = Harness(toy(vision_layers=layers, text_layers=layers), how=Execution(remat="full"))
    return str(jax.make_jaxpr(harness.step.__call__)(*harness.inputs(make_batch()))).count(" = ")

  assert equations(24) == equations(4)


def test_layers_after_the_selected_one_do_not_run():
  config = toy(vision_layers=4)
  whole_model = Harness(config)
  model, params = whole_model.model, whole_model.state.params
  earlier = InternVLConfig(vision=config.vision, text=config.text, select_layer=-3)
  cut = functional.define(lambda rngs: InternVL(earlier, rngs=rngs))
  split = {}
  for path in cut.shapes:
    whole = path.replace("layers.0:2.", "layers.0:4.").replace("layers.2:4.", "layers.0:4.")
    span = (
      slice(0, 2)
      if ".encoder.layers.0:2." in path
      else slice(2, 4)
      if ".encoder.layers.2:4." in path
      else None
    )
    split[path] = params[path] if span is None else params[whole][span]
  tiles = jnp.ones((1, 16, 16, 3))
  single = functional.define(lambda rngs: InternVL(toy(vision_layers=1), rngs=rngs))

  @jax.jit
  def by_hand(params):
    """The hidden state after two of four layers."""
    x = model.bind(params).vision_model.embeddings(tiles)
    for layer in range(2):
      prefix = "vision_model.encoder.layers.0:4."
      weights = {
        path.replace("0:4.", "0:1."): value[layer : layer + 1]
        for path, value in params.items()
        if path.startswith(prefix)
      }
      one = single.bind({path: v for path, v in params.items() if not path.startswith(prefix)} | weights)
      x, _ = one.vision_model.encoder.layers.scan(
        lambda module, x, _: (module(x, None, kernels=Kernels()), {}), x
      )
    return x

  found = jax.jit(lambda split: cut.bind(split).vision_model(tiles))(split)
  np.testing.assert_allclose(found, by_hand(params), atol=1e-6)
  with pytest.raises(ValueError, match="vision_select_layer=9"):
    functional.define(
      lambda rngs: InternVL(InternVLConfig(vision=config.vision, text=config.text, select_layer=9), rngs=rngs)
    )


def test_normalized_weights():
  weights = jnp.array([[[1.0, 1, 0], [1, 0, 0]], [[0, 0, 0], [1, 1, 1]]])  # [A=2, R=2, S=3]
  np.testing.assert_allclose(normalized_weights(weights, shards=2, all_gather=True), weights / 6)
  each = normalized_weights(weights, shards=2, all_gather=False)
  np.testing.assert_allclose(each.sum(axis=2), [[0.25, 0.25], [0, 0.25]])
  assert not jnp.isnan(each).any()


@pytest.mark.parametrize(
  ("vision", "text", "parameters"),
  [
    # InternVL2.5-1B: InternViT-300M and Qwen2.5-0.5B with an untied head.
    ((1024, 4096, 24, 16, "layer_norm"), (896, 4864, 24, 14, 2, 151674), 938_193_024),
    # InternVL2.5-78B: InternViT-6B and Qwen2.5-72B.
    ((3200, 12800, 45, 25, "rms_norm"), (8192, 29568, 80, 64, 8, 151674), 78_408_318_336),
  ],
)
def test_full_size_models_are_defined_without_memory(vision, text, parameters):
  width, mlp, layers, heads, norm = vision
  D, F, L, N, K, V = text
  big = norm == "rms_norm"
  config = InternVLConfig(
    vision=InternViTConfig(
      hidden_size=width,
      intermediate_size=mlp,
      num_layers=layers,
      num_heads=heads,
      patch_size=14,
      image_size=448,
      norm_type=norm,
      qkv_bias=not big,
      qk_normalization=big,
    ),
    text=DecoderConfig(
      vocab_size=V,
      hidden_size=D,
      intermediate_size=F,
      num_layers=L,
      num_heads=N,
      num_kv_heads=K,
      head_dim=D // N,
      qkv_bias=True,
    ),
  )
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  assert sum(leaf.size for leaf in model.shapes.values()) == parameters
  assert config.tokens_per_tile == 256


def test_a_step_that_is_not_finite_changes_nothing():
  harness, batch = plain(), make_batch()
  harness.run(batch)
  before = jax.tree.map(np.asarray, harness.state)
  metrics = harness.run(batch._replace(loss_weight=np.where(batch.loss_weight > 0, np.inf, 0).astype("f4")))
  assert metrics.skipped and not np.isfinite(metrics.loss)
  assert int(harness.state.step) == int(before.step) + 1
  after = jax.tree.map(np.asarray, harness.state)
  jax.tree.map(
    np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state)
  )
  metrics = harness.run(batch)
  assert not metrics.skipped and np.isfinite(metrics.loss)
  counts = jax.tree.map(int, metrics.counts)
  real = batch.segment_ids > 0
  assert counts.supervised == (batch.loss_weight > 0).sum() and counts.tokens == real.sum()
  assert counts.image_tokens == (batch.image_index >= 0).sum()
  lengths = real.sum(axis=-1)
  assert counts.pairs == (lengths * (lengths + 1) // 2).sum()
