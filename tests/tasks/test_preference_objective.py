"""Preference losses against TRL's, and the objective that is made of them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import config_checks
from internvl_jax.aot import recipe
from internvl_jax.arguments import LOSS_WEIGHTS, MeshConfig, PreferenceConfig
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, SFTBatch
from internvl_jax.config import TrainConfig
from internvl_jax.hf import published
from internvl_jax.losses import preference
from internvl_jax.losses.preference import LossSettings, PairLogProbs
from internvl_jax.metrics.flops import count_flops
from internvl_jax.models import functional
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.lora import MARK, LoRASpec
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.setup.step import set_up
from internvl_jax.tasks import open_task
from internvl_jax.tasks.preference import settings
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.objective import PreferenceOptimization
from internvl_jax.tasks.preference.policy import COPIES, ReferencePolicy
from internvl_jax.trees import submodule_of
from tests.support.harness import Harness, toy

RECORDED = json.loads((Path(__file__).parents[1] / "assets" / "dpo_loss.json").read_text())
CASES = RECORDED["cases"]


def case_name(case):
  return f"{case['loss_type']}-{case['label_smoothing']}"


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_are_trls_batch_after_batch(case, padding):
  """Padding between the pairs changes nothing, and the running mean goes on from batch to batch."""
  settings = LossSettings(case["beta"], case["label_smoothing"])
  running = preference.initial_running()
  for values, (losses, chosen, rejected) in zip(RECORDED["batches"], case["results"], strict=True):
    places = np.sort(np.random.default_rng(0).permutation(6 + padding)[:6])
    arrays = np.full((4, 6 + padding), np.nan, np.float32)
    arrays[:, places] = values
    weights = np.zeros(6 + padding, np.float32)
    weights[places] = 1 / 6
    logps = PairLogProbs(*map(jnp.asarray, arrays))
    running = preference.update_running(running, logps, weights, settings.beta)
    found = preference.pair_losses(case["loss_type"], logps, weights, settings, running)
    np.testing.assert_allclose(found[places], losses, rtol=1e-5)
    np.testing.assert_allclose(settings.beta * logps.chosen_ratio[places], chosen, rtol=1e-5)
    np.testing.assert_allclose(settings.beta * logps.rejected_ratio[places], rejected, rtol=1e-5)


def test_losses_of_a_configuration_have_its_weights():
  assert set(LOSS_WEIGHTS) <= set(preference.LOSSES)
  assert PreferenceConfig(loss_type="ipo, bco_pair", ipo_loss_weight=0.8).terms == (
    ("ipo", 0.8),
    ("bco_pair", 1.0),
  )
  assert PreferenceConfig(loss_type="ipo,sppo", loss_weights=(0.5, 2)).terms == (("ipo", 0.5), ("sppo", 2))
  assert PreferenceConfig(loss_type="sppo").terms == (("sppo", 1.0),), "a loss without a field of its own"
  for kind, name in LOSS_WEIGHTS.items():
    assert PreferenceConfig(loss_type=kind, **{name: 3.0}).terms == ((kind, 3.0),)


def test_a_new_loss_is_one_place(monkeypatch):
  """A line in the table: its name is allowed, weighted, smoothed or not, and computed by the objective."""

  def apo_zero(logps, weights, settings, running):
    return (
      1
      - jax.nn.sigmoid(settings.beta * logps.chosen_ratio)
      + jax.nn.sigmoid(settings.beta * logps.rejected_ratio)
    )

  line = preference.PreferenceLoss(function=apo_zero, paper="2408.06266", per_token=True)
  monkeypatch.setitem(preference.LOSSES, "apo_zero", line)
  config = TrainConfig()
  config.preference.loss_type, config.preference.loss_weights = "sigmoid,apo_zero", (0.75, 0.25)
  assert list(settings.SETTINGS.problems(config)) == []
  config.preference.label_smoothing = 0.1
  assert not config_checks.idle_settings(config)
  config.preference.loss_type, config.preference.loss_weights = "apo_zero", ()
  (said,) = config_checks.idle_settings(config)
  assert "label_smoothing" in said and "apo_zero" not in said
  logps = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -6.0, -4.0, -3.0)))
  objective = PreferenceOptimization(
    model=None,
    how=None,
    normalize_type="imagenet",
    terms=(("apo_zero", 0.25),),
    settings=LossSettings(0.5, 0.0),
  )
  total, terms = objective._weighted_losses(
    logps, jnp.array([[2.0, 3.0]]), jnp.ones(1), preference.initial_running()
  )
  expected = 1 - 1 / (1 + np.exp(-0.5 * 1.0)) + 1 / (1 + np.exp(0.5 * 1.0))
  np.testing.assert_allclose([total, terms["losses/apo_zero"]], [0.25 * expected, expected], rtol=1e-6)


def test_an_answer_as_good_as_the_other_is_not_preferred():
  """TRL's accuracy counts pairs whose chosen answer has the higher reward: one of these three."""
  zero = jnp.zeros(3)
  logps = PairLogProbs(jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, 2.0, 1.0]), zero, zero)
  objective = PreferenceOptimization(
    model=None, how=None, normalize_type="imagenet", terms=MPO, settings=LossSettings(0.5, 0.0)
  )
  found = objective._rewards(logps, jnp.full(3, 1 / 3))
  np.testing.assert_allclose(found["rewards/accuracies"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(found["rewards/margins"], 0, atol=1e-6)


# --- The objective ------------------------------------------------------------------------------------------

LENGTH, PAIRS = 32, 8
MPO = (("sigmoid", 0.8), ("bco_pair", 0.2))
SETTINGS = LossSettings(0.1, 0.0)


def make_pairs(rows, seed=0, shards=1, fill=0, share=False):
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
  batch = SFTBatch(
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
  terms=MPO,
  rpo_alpha=1.0,
  cached=False,
  text=None,
  freeze=None,
  all_gather=True,
  share=False,
  how=None,
  settings=SETTINGS,
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
    terms=terms,
    settings=settings,
    rpo_alpha=rpo_alpha,
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
def steps_of_one_device(rows, terms=MPO):
  """Three steps on one device, which several tests compare with."""
  return take_steps(make_step(terms=terms), [make_pairs(rows, seed) for seed in range(3)])


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


def with_reference(harness, batch):
  """The batch with the policy's log-probabilities of now as the reference's."""
  objective = harness.step.objective
  micro = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
  logps = jax.jit(objective.answer_logps)({**harness.frozen, **harness.state.params}, micro)
  return batch._replace(reference=np.where(batch.pair_weight[..., None] > 0, np.asarray(logps)[None], np.nan))


def test_at_the_start_the_policy_is_the_reference():
  harness = make_step()
  batch = make_pairs([2, 1, 2, 0])
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
  harness = make_step()
  batch = make_pairs([2, 1])
  params = {**harness.frozen, **harness.state.params}
  micro = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
  found = np.asarray(jax.jit(harness.step.objective.answer_logps)(params, micro))
  model, rows = harness.model.bind(params), micro.rows
  pixels = normalize_tiles(rows.tiles[0], "imagenet")
  features = model.extract_features(pixels, Execution()).reshape(1, -1, 16)
  for row, pair, answer in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]:
    mine = np.asarray(rows.segment_ids[row] == 2 * pair + answer + 1)
    ids, index, targets = (
      np.asarray(x[row])[mine][None] for x in (rows.input_ids, rows.image_index, rows.targets)
    )
    x = model.embed(ids, index, features, Execution())
    hidden, _ = model.decode(x, Execution(), positions=np.arange(ids.size)[None], segment_ids=None)
    logps = jax.nn.log_softmax(model.logits(hidden))[0]
    expected = sum(logps[i, t] for i, t in enumerate(targets[0]) if t != IGNORE_INDEX)
    np.testing.assert_allclose(found[row, pair, answer], expected, rtol=1e-5)
  assert found.shape == (2, PAIRS, 2) and not found[1, 1:].any()


def test_the_loss_and_its_gradient_are_the_weighted_sum_that_they_say():
  """Put together anew from the answers' log-probabilities, whose own test is above."""
  beta, smoothing, alpha = 0.3, 0.1, 0.7
  terms = (("sigmoid", 0.8), ("bco_pair", 0.2), ("ipo", 0.05))
  harness = make_step(terms=terms, rpo_alpha=alpha, cached=True, settings=LossSettings(beta, smoothing))
  objective, params = harness.step.objective, {**harness.frozen, **harness.state.params}
  batch = with_reference(harness, make_pairs([2, 1, 2, 1]))
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
  batches = [(make_pairs([1] * 6, seed), make_pairs([2, 0, 2, 2], seed)) for seed in range(4)]
  alone, packed = (take_steps(make_step(), [pair[i] for pair in batches]) for i in (0, 1))
  assert_equal_steps(packed, alone)
  assert abs(alone[-1][2]["rewards/margins"]) > 1e-3


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
  shards, rows = 2 if mesh else 1, (2, 1, 1, 2)
  alone = steps_of_one_device(rows)
  batches = [make_pairs(rows, seed, shards=shards, share=True) for seed in range(3)]
  assert (batches[0].rows.segment_ids > 0).sum() < (make_pairs(rows).rows.segment_ids > 0).sum()
  harness = make_step(mesh=mesh, share=True, how=Execution(kernels=Kernels(attention=backend)))
  assert_equal_steps(take_steps(harness, batches), alone)


def test_a_cache_and_weights_in_memory_give_the_same():
  batches = [make_pairs([2, 1, 2, 1], seed) for seed in range(2)]
  cached = make_step(cached=True)
  # All before the first step: the reference stays what it was.
  filled = [with_reference(cached, batches[i % 2]) for i in range(4)]
  assert_equal_steps(take_steps(cached, filled), take_steps(make_step(), [batches[i % 2] for i in range(4)]))


def test_adapters_switched_off_are_the_reference():
  lora = {"lora": LoRASpec(rank=2, alpha=4.0)}
  freeze = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "use_llm_lora": 2}
  batches = [make_pairs([2, 1, 2, 1], seed) for seed in range(2)]
  order = [batches[i % 2] for i in range(4)]
  off = fresh_adapters(make_step(text=lora, freeze=freeze))
  assert not any(path.startswith(COPIES) for path in off.frozen)
  second = fresh_adapters(make_step(text=lora, freeze=freeze))
  second.frozen |= {COPIES + path: jnp.copy(value) for path, value in second.frozen.items()}
  cached = fresh_adapters(make_step(text=lora, freeze=freeze, cached=True))
  filled = [with_reference(cached, batches[i % 2]) for i in range(4)]
  expected = take_steps(second, order, rate=0.1)
  assert expected[-1][2]["rewards/margins"] > 1e-2
  assert_equal_steps(take_steps(off, order, rate=0.1), expected)
  assert_equal_steps(take_steps(cached, filled, rate=0.1), expected)


def fresh_adapters(harness):
  """Sets the second factors to zero, as those of adapters just attached are."""
  params = {path: value * (not path.endswith(".b")) for path, value in harness.state.params.items()}
  harness.state = dataclasses.replace(harness.state, params=params)
  return harness


def test_micro_batches_count_alike_and_move_the_running_mean_one_by_one():
  parts = [make_pairs([2, 1, 2, 1], seed) for seed in range(2)]
  both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  harness = make_step(all_gather=False)
  take_steps(harness, [make_pairs([2, 1, 2, 1], 7)])
  before = harness.state
  ((loss, _, terms),) = take_steps(harness, [both], rate=0.0)
  accumulated, harness.state = harness.state, before
  each = take_steps(harness, parts, rate=0.0)
  alone = harness.state
  np.testing.assert_allclose(loss, np.mean([e[0] for e in each]), rtol=1e-5)
  for name, value in terms.items():
    np.testing.assert_allclose(value, np.mean([e[2][name] for e in each]), rtol=1e-4, atol=1e-6, err_msg=name)
  assert accumulated.running["batches"] == alone.running["batches"] == 3
  np.testing.assert_allclose(accumulated.running["reward_sum"], alone.running["reward_sum"], rtol=1e-4)


@pytest.mark.parametrize(
  "mesh",
  [
    {"data": 4},
    {"fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_meshes_agree_with_one_device(mesh):
  terms = (*MPO, ("aot", 0.1), ("ipo", 0.01))
  shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
  rows = (2, 1, 1, 2, 2, 1, 1, 2)
  alone = steps_of_one_device(rows, terms)
  spread = [make_pairs(rows, seed, shards=shards) for seed in range(3)]
  assert_equal_steps(take_steps(make_step(terms=terms, mesh=mesh), spread), alone)


def test_what_is_skipped_leaves_the_running_mean():
  harness = make_step()
  batch = make_pairs([2, 1, 2, 1])
  take_steps(harness, [batch])
  before = jax.tree.map(np.asarray, harness.state.running)
  cached = dataclasses.replace(
    harness.step, objective=dataclasses.replace(harness.step.objective, reference=None)
  )
  # A pair that the cache does not know.
  harness.state, metrics = jax.jit(cached.__call__)(harness.state, harness.frozen, batch, np.float32(1e-2))
  assert metrics.skipped and before["batches"] == 1
  np.testing.assert_array_equal(harness.state.running["reward_sum"], before["reward_sum"])


def test_a_vit_that_does_not_train_runs_once():
  """Counted by the products of the whole step."""
  kinds = {"all train": {}, "vision frozen": {"freeze_backbone": True, "freeze_mlp": True}}
  batch = make_pairs([2, 1, 2, 1])

  def products(**options):
    harness = make_step(**options)
    return count_flops(harness.step.__call__, harness.state, harness.frozen, batch, np.float32(0))

  harness = make_step()
  model = harness.model.bind(harness.state.params)
  vision = count_flops(lambda x: model.extract_features(x, Execution()), np.zeros((6, 16, 16, 3), "f4"))
  reference = {
    name: products(freeze=freeze) - products(freeze=freeze, cached=True) for name, freeze in kinds.items()
  }
  assert reference["all train"] - reference["vision frozen"] == vision
