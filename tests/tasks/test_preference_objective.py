"""The objective of preference optimization: its steps, its reference policy, and the same on meshes and in packed rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.aot import recipe
from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.hf import published
from internvl_jax.losses.preference import LossSettings
from internvl_jax.metrics.flops import count_flops
from internvl_jax.models import functional
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.lora import MARK, LoRASpec
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.setup.step import set_up
from internvl_jax.tasks import open_task
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.objective import PreferenceOptimization
from internvl_jax.tasks.preference.policy import COPIES, ReferencePolicy
from internvl_jax.trees import submodule_of
from tests.support.harness import Harness, toy

LENGTH, PAIRS = 32, 8
MPO = (("sigmoid", 0.8), ("bco_pair", 0.2))
TERMS = (*MPO, ("aot", 0.1), ("ipo", 0.01))
# Pairs of each row, for one shard or two: one shape, so one program, for most tests.
ROWS = (2, 1, 0, 1, 2, 0)
SETTINGS = LossSettings(0.1, 0.0)


def make_pairs(rows=ROWS, seed=0, shards=1, fill=0, share=False):
  """A batch of one micro-batch whose rows hold so many pairs each, every one with a tile that its answers share.

  Args:
    rows: pairs of each row.
    seed: of tokens, lengths and tiles: the n-th pair of a batch is the same however pairs are dealt to rows.
    shards: data shards.
    fill: tiles at the end of pools that belong to nobody.
    share: a pair's prompt stands once, but for its last token.
  """
  shape = (1, len(rows), LENGTH)
  segments, positions, ids = (np.zeros(shape, "i4") for _ in range(3))
  targets, index = np.full(shape, IGNORE_INDEX, "i4"), np.full(shape, NO_IMAGE, "i4")
  pair_index, parent = np.full((1, len(rows), PAIRS), -1, "i4"), np.zeros(shape, "i4")
  answers = np.zeros((*pair_index.shape, 2), "i4")
  per_shard = sum(rows) // shards
  tiles = np.zeros((1, shards, per_shard + fill, 16, 16, 3), "u1")
  number = 0
  for row, count in enumerate(rows):
    place = 0
    for pair in range(count):
      rng = np.random.default_rng([seed, number])
      prompt = rng.integers(0, 40, 5)
      lengths = rng.integers(1, 4, 2)
      shard, local = divmod(number, per_shard)
      tiles[0, shard, local] = rng.integers(0, 256, (16, 16, 3))
      for answer, length in enumerate(lengths):
        tokens = np.concatenate([prompt, rng.integers(0, 40, length)])
        start = 4 if share and answer else 0
        span = slice(place, place + len(tokens) - start)
        ids[0, row, span], segments[0, row, span] = tokens[start:], 2 * pair + answer + 1
        positions[0, row, span] = np.arange(start, len(tokens))
        targets[0, row, span] = np.append(
          np.where(np.arange(len(tokens)) < 5, IGNORE_INDEX, tokens)[1:], IGNORE_INDEX
        )[start:]
        if not start:
          index[0, row, place : place + 4] = 4 * local + np.arange(4)
        if share:
          parent[0, row, place : place + 4 if not answer else span.stop] = 2 * pair + 1
        place = span.stop
      pair_index[0, row, pair] = number
      answers[0, row, pair] = 2 * pair + 1, 2 * pair + 2
      number += 1
  batch = TokenBatch(
    input_ids=ids,
    targets=targets,
    loss_weight=(targets != IGNORE_INDEX).astype("f4"),
    positions=positions,
    segment_ids=segments,
    image_index=index,
    tiles=tiles,
  )
  return PreferenceBatch(
    rows=batch,
    pair_weight=(pair_index >= 0).astype("f4"),
    pair_index=pair_index,
    reference=np.full((*pair_index.shape, 2), np.nan, "f4"),
    answers=answers,
    parent=parent,
  )


def make_step(
  *,
  mesh=None,
  cached=False,
  text=None,
  freeze=None,
  all_gather=True,
  share=False,
  how=None,
):
  """A harness whose step optimizes preferences, its reference being what the policy starts from."""
  config = toy(vision_layers=1, text_layers=1, text=text)
  harness = Harness(config, mesh=mesh, freeze=freeze)
  plain = {path: leaf for path, leaf in harness.model.shapes.items() if MARK not in path}
  bare = (
    functional.define(lambda rngs: InternVL(toy(vision_layers=1, text_layers=1), rngs=rngs))
    if text
    else harness.model
  )
  assert set(bare.shapes) == set(plain)
  shares = not any(submodule_of(path) in ("vision_model", "mlp1") for path in harness.trainable)
  objective = PreferenceOptimization(
    model=harness.model,
    how=how or Execution(),
    normalize_type="imagenet",
    shares_prompts=share,
    shards=harness.shards,
    all_gather=all_gather,
    terms=TERMS,
    settings=SETTINGS,
    rpo_alpha=1.0,
    reference=None if cached else ReferencePolicy(model=bare, shares_features=shares),
  )
  if not cached:
    copied = harness.trainable & set(bare.shapes)
    harness.frozen |= {COPIES + path: jnp.copy(harness.state.params[path]) for path in copied}
  harness.step = dataclasses.replace(harness.step, objective=objective)
  harness.state = dataclasses.replace(harness.state, running=objective.initial_running())
  return harness


def take_steps(harness, batches, rate=2e-2):
  """(loss, gradient norm, terms) of each step."""
  found = []
  for batch in batches:
    harness.state, metrics = harness.program(*harness.inputs(batch, rate))
    assert not metrics.skipped
    found.append((metrics.loss, metrics.grad_norm, metrics.terms))
  return jax.tree.map(np.asarray, found)


@functools.cache
def _compiled_once(cached):
  harness = make_step(cached=cached)
  return harness, harness.state


def on_one_device(cached=False):
  """A harness at its start, whose program is compiled for the first test that takes it."""
  harness, harness.state = _compiled_once(cached)
  return harness


@functools.cache
def steps_of_one_device():
  """Three steps on one device, which several tests compare with."""
  return take_steps(on_one_device(), [make_pairs(seed=seed) for seed in range(3)])


@functools.cache
def answer_logps():
  """(params, micro-batch) -> log-probabilities of answers by a model without adapters."""
  return jax.jit(on_one_device().step.objective.answer_logps)


def assert_equal_steps(found, expected, rtol=1e-5):
  # Before anything has moved, which reward is higher is a matter of rounding.
  found[0][2].pop("rewards/accuracies", None)
  expected[0][2].pop("rewards/accuracies", None)
  for (loss, norm, terms), (loss_, norm_, terms_) in zip(found, expected, strict=True):
    assert terms.keys() == terms_.keys()
    np.testing.assert_allclose(loss, loss_, rtol=0, atol=rtol)
    np.testing.assert_allclose(norm, norm_, rtol=1e-4)
    for name, value in terms_.items():
      np.testing.assert_allclose(terms[name], value, rtol=rtol, atol=rtol, err_msg=name)


def with_reference(harness, batch, program=None):
  """The batch with the policy's log-probabilities of now as the reference's."""
  micro = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
  logps = (program or answer_logps())({**harness.frozen, **harness.state.params}, micro)
  return batch._replace(reference=np.where(batch.pair_weight[..., None] > 0, np.asarray(logps)[None], np.nan))


def test_at_the_start_the_policy_is_the_reference():
  harness, batch = on_one_device(), make_pairs()
  micro = jax.tree.map(lambda leaf: leaf[0], batch)
  loss, drift = jax.jit(harness.step.objective.drift)({**harness.frozen, **harness.state.params}, micro)
  np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
  assert drift < 1e-6
  ((_, _, terms),) = take_steps(harness, [batch])
  np.testing.assert_allclose(terms["losses/sigmoid"], np.log(2), atol=1e-6)
  np.testing.assert_allclose(terms["losses/bco_pair"], 2 * np.log(2), atol=1e-6)
  np.testing.assert_allclose(terms["rewards/margins"], 0, atol=1e-6)
  assert terms["nll_loss"] > 1 and terms["logps/chosen"] < -1


def test_log_probabilities_are_those_of_each_answer_alone():
  """Against logits of one answer in a row of its own."""
  harness, batch = on_one_device(), make_pairs()
  params = {**harness.frozen, **harness.state.params}
  micro = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
  found = np.asarray(answer_logps()(params, micro))
  rows = jax.tree.map(np.asarray, micro.rows)
  answers = [(row, pair, i) for row, count in enumerate(ROWS) for pair in range(count) for i in range(2)]
  ids, index, targets = (np.full((len(answers), 8), fill, "i4") for fill in (0, NO_IMAGE, IGNORE_INDEX))
  for n, (row, pair, i) in enumerate(answers):
    mine = rows.segment_ids[row] == 2 * pair + i + 1
    for alone, packed in ((ids, rows.input_ids), (index, rows.image_index), (targets, rows.targets)):
      alone[n, : mine.sum()] = packed[row][mine]

  @jax.jit
  def every_logp(params):
    model = harness.model.bind(params)
    features = model.extract_features(normalize_tiles(micro.rows.tiles[0], "imagenet"), Execution())
    x = model.embed(ids, index, features.reshape(1, -1, 16), Execution())
    positions = np.broadcast_to(np.arange(8), ids.shape)
    hidden, _ = model.decode(x, Execution(), positions=positions, segment_ids=None)
    return jax.nn.log_softmax(model.logits(hidden))

  logps = np.asarray(every_logp(params))
  for n, answer in enumerate(answers):
    expected = sum(logps[n, i, t] for i, t in enumerate(targets[n]) if t != IGNORE_INDEX)
    np.testing.assert_allclose(found[answer], expected, rtol=1e-5)
  assert found.shape == (len(ROWS), PAIRS, 2) and not found[1, 1:].any()


def test_the_loss_and_its_gradient_are_the_weighted_sum_that_they_say():
  """Put together anew from the answers' log-probabilities, whose own test is above."""
  beta, smoothing, alpha = 0.3, 0.1, 0.7
  terms = (("sigmoid", 0.8), ("bco_pair", 0.2), ("ipo", 0.05))
  harness = on_one_device(cached=True)
  objective = dataclasses.replace(
    harness.step.objective, terms=terms, rpo_alpha=alpha, settings=LossSettings(beta, smoothing)
  )
  params = {**harness.frozen, **harness.state.params}
  batch = with_reference(harness, make_pairs())
  # A reference that the policy has moved away from, and a running mean that is not 0.
  shift = np.random.default_rng(0).normal(size=batch.reference.shape, scale=2).astype("f4")
  batch = batch._replace(reference=batch.reference + shift)
  running = {"reward_sum": jnp.float32(1.5), "batches": jnp.float32(2)}
  weights = objective.weights(batch)
  micro, micro_weights = (jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), x) for x in (batch, weights))
  real = np.asarray(micro.pair_weight) > 0
  tokens = np.zeros((*real.shape, 2))
  for row, pair, answer in np.ndindex(tokens.shape):
    mine = micro.rows.segment_ids[row] == 2 * pair + answer + 1
    tokens[row, pair, answer] = np.sum(np.asarray(micro.rows.targets[row] != IGNORE_INDEX) & np.asarray(mine))

  def ours(params):
    return objective.loss(params, micro, micro_weights, jax.random.key(0), running)[0]

  def anew(params):
    policy = objective.answer_logps(params, micro)[real]
    ratios = policy - micro.reference[real]
    margin = ratios[:, 0] - ratios[:, 1]
    sigmoid = -(1 - smoothing) * jnp.log(jax.nn.sigmoid(beta * margin)) - smoothing * jnp.log(
      jax.nn.sigmoid(-beta * margin)
    )
    mean = (1.5 + jax.lax.stop_gradient(jnp.mean(beta * ratios))) / 3
    bco = -jnp.log(jax.nn.sigmoid(beta * ratios[:, 0] - mean)) - jnp.log(
      jax.nn.sigmoid(mean - beta * ratios[:, 1])
    )
    by_token = ratios / tokens[real]
    ipo = (by_token[:, 0] - by_token[:, 1] - 1 / (2 * beta)) ** 2
    nll = -policy[:, 0].sum() / tokens[real][:, 0].sum()
    return 0.8 * sigmoid.mean() + 0.2 * bco.mean() + 0.05 * ipo.mean() + alpha * nll

  (loss, gradient), (expected, wanted) = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, anew))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  largest = max(float(jnp.abs(value).max()) for value in wanted.values())
  for path, value in wanted.items():
    np.testing.assert_allclose(gradient[path], value, rtol=1e-3, atol=1e-5 * largest, err_msg=path)


def test_the_configuration_reaches_the_objective():
  config = recipe.get_config("mpo")
  config.model.model_name_or_path = published.hub_id("2.5-1b")
  config.preference.beta, config.preference.label_smoothing, config.preference.rpo_alpha = 0.3, 0.05, 0.7
  config.preference.sigmoid_loss_weight = 0.8
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  source = open_shapes(config)
  objective = set_up(config, source, mesh).objective
  assert objective.settings == LossSettings(0.3, 0.05) and objective.rpo_alpha == 0.7
  assert objective.terms == (("sigmoid", 0.8), ("bco_pair", 1.0)) and objective.reference is not None
  config.preference.precompute_reference = True
  assert set_up(config, source, mesh).objective.reference is None


def test_copies_round_what_the_policy_rounds_and_nothing_else():
  config = recipe.get_config("mpo")
  config.model.model_name_or_path = published.hub_id("3.5-30b-a3b")
  source = open_shapes(config)
  trainable = set(source.model.shapes)
  shapes = {path: leaf.update(sharding=None) for path, leaf in source.model.shapes.items()}
  copies = open_task(config, source).abstract_copies(shapes, trainable)
  layers = f"{COPIES}language_model.model.layers.0:48"
  for name in ("input_layernorm.scale", "self_attn.q_norm.scale", "mlp.gate.kernel"):
    assert copies[f"{layers}.{name}"].dtype == jnp.float32, name
  for name in ("self_attn.q_proj.kernel", "mlp.experts.up_proj"):
    assert copies[f"{layers}.{name}"].dtype == jnp.bfloat16, name


def test_packed_equals_unpacked():
  packed = steps_of_one_device()
  assert_equal_steps(packed, take_steps(on_one_device(), [make_pairs([1] * 6, seed) for seed in range(3)]))
  assert abs(packed[-1][2]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
  ("mesh", "backend"),
  [
    (None, "xla"),
    ({"fsdp": 2, "tensor": 2}, "xla"),
    pytest.param(None, "splash_interpret", marks=pytest.mark.slow),
    (None, "triton_interpret"),
  ],
)
def test_shared_prompts_change_nothing(mesh, backend):
  """Also where the prompt's tokens lie on other devices than the answer's, and in the kernels of TPUs and GPUs."""
  batches = [make_pairs(seed=seed, shards=2 if mesh else 1, share=True) for seed in range(3)]
  assert (batches[0].rows.segment_ids > 0).sum() < (make_pairs().rows.segment_ids > 0).sum()
  harness = make_step(mesh=mesh, share=True, how=Execution(kernels=Kernels(attention=backend)))
  assert_equal_steps(take_steps(harness, batches), steps_of_one_device())


def test_a_cache_and_weights_in_memory_give_the_same():
  cached = on_one_device(cached=True)
  # All before the first step: the reference stays what it was.
  filled = [with_reference(cached, make_pairs(seed=seed)) for seed in range(3)]
  assert_equal_steps(take_steps(cached, filled), steps_of_one_device())


def test_adapters_switched_off_are_the_reference():
  lora = {"lora": LoRASpec(rank=2, alpha=4.0)}
  freeze = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "use_llm_lora": 2}
  order = [make_pairs(seed=i % 2) for i in range(4)]
  off = fresh_adapters(make_step(text=lora, freeze=freeze))
  assert not any(path.startswith(COPIES) for path in off.frozen)
  cached = fresh_adapters(make_step(text=lora, freeze=freeze, cached=True))
  logps = jax.jit(cached.step.objective.answer_logps)
  filled = [with_reference(cached, batch, logps) for batch in order]
  found = take_steps(off, order, rate=0.1)
  assert found[-1][2]["rewards/margins"] > 1e-2
  assert_equal_steps(found, take_steps(cached, filled, rate=0.1))


def fresh_adapters(harness):
  """Sets the second factors to zero, as those of adapters just attached are."""
  params = {path: value * (not path.endswith(".b")) for path, value in harness.state.params.items()}
  harness.state = dataclasses.replace(harness.state, params=params)
  return harness


def test_micro_batches_count_alike_and_move_the_running_mean_one_by_one():
  parts = [make_pairs(seed=seed) for seed in range(2)]
  both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  single, harness = on_one_device(), make_step(all_gather=False)
  take_steps(single, [make_pairs(seed=7)])
  harness.state = single.state
  ((loss, _, terms),) = take_steps(harness, [both], rate=0.0)
  # Of one micro-batch on one device, denominators are alike.
  each = take_steps(single, parts, rate=0.0)
  accumulated, alone = harness.state, single.state
  np.testing.assert_allclose(loss, np.mean([e[0] for e in each]), rtol=1e-5)
  for name, value in terms.items():
    np.testing.assert_allclose(value, np.mean([e[2][name] for e in each]), rtol=1e-4, atol=1e-6, err_msg=name)
  assert accumulated.running["batches"] == alone.running["batches"] == 3
  np.testing.assert_allclose(accumulated.running["reward_sum"], alone.running["reward_sum"], rtol=1e-4)


@pytest.mark.parametrize(
  "mesh",
  [
    {"data": 2},
    {"fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_meshes_agree_with_one_device(mesh):
  spread = [make_pairs(seed=seed, shards=2) for seed in range(3)]
  assert_equal_steps(take_steps(make_step(mesh=mesh), spread), steps_of_one_device())


def test_what_is_skipped_leaves_the_running_mean():
  harness, batch = on_one_device(cached=True), make_pairs()
  filled = with_reference(harness, batch)
  take_steps(harness, [filled._replace(reference=filled.reference - 1)])
  before = jax.tree.map(np.asarray, harness.state.running)
  assert before["reward_sum"] == pytest.approx(SETTINGS.beta, rel=1e-4) and before["batches"] == 1
  # Pairs that the cache does not know.
  harness.state, metrics = harness.program(*harness.inputs(batch))
  assert metrics.skipped
  jax.tree.map(np.testing.assert_array_equal, harness.state.running, before)


def test_a_vit_that_does_not_train_runs_once():
  """Counted by the products of the whole step."""
  batch = make_pairs()

  def products_of_the_reference(harness):
    objective = dataclasses.replace(harness.step.objective, reference=None)
    steps = (harness.step, dataclasses.replace(harness.step, objective=objective))
    inputs = (harness.state, harness.frozen, batch, np.float32(0))
    both, policy = (count_flops(step.__call__, *inputs) for step in steps)
    return both - policy

  harness = on_one_device()
  frozen = make_step(freeze={"freeze_backbone": True, "freeze_mlp": True})
  model = harness.model.bind(harness.state.params)
  vision = count_flops(lambda x: model.extract_features(x, Execution()), np.zeros((6, 16, 16, 3), "f4"))
  assert products_of_the_reference(harness) - products_of_the_reference(frozen) == vision
