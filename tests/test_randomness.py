"""What is drawn at random: its scale, that no two draws share their randomness, and that seeds tell runs apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from internvl_jax.models import lora
from internvl_jax.models.functional import initialize
from internvl_jax.models.layers import Embed, Linear
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.towers import tower
from internvl_jax.models.towers.internvit import InternViTConfig, VisionEmbeddings
from internvl_jax.objectives import Outcome
from internvl_jax.step import TrainStep
from tests.support.harness import Harness, make_batch, toy

DROPPING = LoRASpec(rank=2, alpha=4.0, dropout=0.25)


def linear_map(d_in, d_out, seed=0):
  return Linear(d_in, d_out, bias=False, axes=("embed", "mlp"), rngs=nnx.Rngs(seed))


# --- Keys ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn_keys():
  """The keys of all Bernoulli draws of two steps, by step: two micro-batches, with drop path and adapters' dropout."""
  found = []
  bernoulli = jax.random.bernoulli

  def recorded(key, *arguments):
    jax.debug.callback(lambda data: found.append(tuple(data.tolist())), jax.random.key_data(key))
    return bernoulli(key, *arguments)

  config = toy(text={"lora": DROPPING}, lora=DROPPING)
  freeze = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True}
  harness = Harness(
    config, drop_path=0.5, dropout=True, freeze=freeze | {"use_llm_lora": 2, "use_backbone_lora": 2}
  )
  batch = jax.tree.map(jnp.asarray, make_batch(rows=4, accumulation=2))
  steps = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.random, "bernoulli", recorded)
    run = jax.jit(
      lambda step: harness.step.value_and_grad(harness.state.params, harness.frozen, batch, step, {})
    )
    for step in range(2):
      found.clear()
      jax.block_until_ready(run(step))
      jax.effects_barrier()
      steps.append(list(found))
  return steps


def test_no_two_draws_of_a_run_share_a_key(drawn_keys):
  """Of steps, micro-batches, layers and adapters of a layer: 2 x (drop path + 2 layers x 4 maps + 2 layers x 7 maps)."""
  assert [len(keys) for keys in drawn_keys] == 2 * [2 * (1 + 2 * 4 + 2 * 7)]
  every = [key for keys in drawn_keys for key in keys]
  assert len(set(every)) == len(every)


class Drawing:
  """An objective that is a number drawn from its key."""

  def weights(self, batch):
    return batch.loss_weight

  def loss(self, params, batch, weights, key, running, *, share):
    return jnp.sum(params["x"]) * jax.random.uniform(key), Outcome(running, {})


def test_the_seed_and_the_step_tell_draws_apart():
  def loss(seed, number):
    step = TrainStep(objective=Drawing(), optimizer=optax.identity(), seed=seed)
    (drawn, _), _ = step.value_and_grad({"x": jnp.ones(1)}, {}, make_batch(rows=2), jnp.int32(number), {})
    return float(drawn)

  assert loss(1, 0) == loss(1, 0)
  assert len({loss(seed, number) for seed in (1, 2) for number in (0, 1)}) == 4


# --- Scales -------------------------------------------------------------------------------------------------


def test_drop_path_keeps_the_mean_and_each_branch_by_itself():
  rates, tiles = np.array([0.0, 0.2, 0.6]), 4000
  keep = np.asarray(tower._keep_branches(tiles, rates, jax.random.key(0)))
  assert keep.shape == (3, 2, tiles)
  assert (keep[0] == 1).all()
  for rate, branches in zip(rates, keep, strict=True):
    np.testing.assert_allclose(
      np.unique(branches), np.unique([0.0, 1 / (1 - rate)])[int(rate == 0) :], rtol=1e-6
    )
    error = np.sqrt(rate / (1 - rate) / branches.size)  # of the mean
    assert abs(branches.mean() - 1) < 4 * error + 1e-6
  kept = (keep[1:] > 0).reshape(4, tiles)
  together = np.corrcoef(np.concatenate([kept, kept[:, :-1], kept[:, 1:]], axis=1)[:, :tiles])
  assert np.abs(together - np.eye(4)).max() < 4 / np.sqrt(tiles)  # no layer or branch goes with another
  for branch in kept:
    assert abs(np.corrcoef(branch[:-1], branch[1:])[0, 1]) < 4 / np.sqrt(tiles)  # nor a tile with the next


def test_dropout_of_adapters_keeps_the_mean_and_each_map_by_itself():
  """Both maps of a layer see ones: what is left of them is seen through a and b that copy."""
  width, rows = 8, 2000
  layer = nnx.List([linear_map(width, width, seed) for seed in range(2)])
  spec = LoRASpec(rank=width, alpha=float(width), dropout=0.25)
  for linear in layer:
    linear.kernel[...] = jnp.zeros((width, width))
    linear.adapter = lora.Adapter(linear, spec, nnx.Rngs(0))
    linear.adapter.a[...] = linear.adapter.b[...] = jnp.eye(width)
  lora.start_dropout(layer, jax.random.key(7))
  kept = np.stack([np.asarray(linear(jnp.ones((rows, width)))) for linear in layer])
  np.testing.assert_allclose(np.unique(kept), [0, 4 / 3], rtol=1e-6)
  assert abs(kept.mean() - 1) < 4 * np.sqrt(0.25 / 0.75 / kept.size)
  assert abs(np.corrcoef(kept[0].ravel(), kept[1].ravel())[0, 1]) < 4 / np.sqrt(rows * width)


def test_fresh_weights_have_their_scale():
  """Standard deviations to 5 %, of at least 4,000 numbers each."""
  wide = linear_map(100, 400).kernel[...]
  assert np.std(wide) == pytest.approx(0.1, rel=0.05) and abs(np.mean(wide)) < 0.005
  table = Embed(100, 100, rngs=nnx.Rngs(0)).embedding[...]
  assert np.std(table) == pytest.approx(1.0, rel=0.05)
  config = InternViTConfig(
    hidden_size=400, intermediate_size=8, num_layers=1, num_heads=1, patch_size=4, image_size=16
  )
  fresh = VisionEmbeddings(config, nnx.Rngs(0))
  assert np.std(fresh.patch_kernel[...]) == pytest.approx(3 / np.sqrt(48), rel=0.05)
  assert np.std(fresh.position_embedding[...]) == pytest.approx(0.02, rel=0.05)
  adapter = lora.Adapter(linear_map(100, 8), LoRASpec(rank=64, alpha=1.0), nnx.Rngs(0))
  a = np.asarray(adapter.a[...])
  # Uniform within 1/sqrt(D).
  assert 0.098 < np.abs(a).max() <= 0.1 and np.std(a) == pytest.approx(0.1 / np.sqrt(3), rel=0.05)


def test_fresh_layers_differ():
  """Those of a stack from each other, and those of one seed from another's."""
  config = dataclasses.replace(toy().vision, hidden_size=8, num_heads=1, intermediate_size=8)

  def kernels(seed):
    params = initialize(lambda rngs: config.build(rngs=rngs), jax.random.key(seed))
    return np.asarray(params["encoder.layers.0:2.mlp.fc1.kernel"]).reshape(2, -1)

  every = np.concatenate([kernels(seed) for seed in (0, 1)])
  assert len(np.unique(every)) > 0.99 * every.size
  assert np.abs(np.corrcoef(every) - np.eye(4)).max() < 0.5
