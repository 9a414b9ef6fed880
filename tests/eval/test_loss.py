"""The loss on held-out samples is what training minimizes, however samples are put together."""

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.where import Where
from internvl_jax.eval.loss import HeldOutLoss, TokenLoss
from internvl_jax.losses.lm import token_losses
from internvl_jax.models.internvl import Execution, normalize_tiles
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from tests.eval.test_greedy import IMAGE, parts

LENGTHS = (9, 30, 14)


def samples():
  """Of different lengths; every other one begins with a tile of four tokens. Two tokens of each are learned, and more."""
  rng = np.random.default_rng(2)
  found = []
  for row, length in enumerate(LENGTHS):
    ids, tiles = rng.integers(0, IMAGE, length).astype("i4"), row % 2
    ids[: 4 * tiles] = IMAGE
    labels = np.where(np.arange(length) >= length - 2 - row, ids, IGNORE_INDEX).astype("i4")
    found.append(
      Sample(
        input_ids=ids,
        labels=labels,
        tiles=rng.integers(0, 256, (tiles, 16, 16, 3)).astype("u1"),
        where=Where("toy", "toy.jsonl", row),
      )
    )
  return found


def plain_loss(definition, params, sample):
  """The sum of a sample's token losses by the plain logits of a row of its own."""

  @jax.jit
  def run(params, ids, targets, tiles):
    model = definition.bind(params)
    features, index = jnp.zeros((1, 0, 0)), jnp.full(ids.shape, NO_IMAGE)
    if len(tiles):
      features = model.extract_features(normalize_tiles(tiles, "imagenet"), Execution())
      features = features.reshape(1, -1, features.shape[-1])
      index = jnp.where(ids == IMAGE, jnp.cumsum(ids == IMAGE, axis=1) - 1, NO_IMAGE)
    x = model.embed(ids, index, features, Execution())
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = model.decode(x, Execution(), positions=positions, segment_ids=jnp.ones_like(ids))
    return jnp.sum(token_losses(model.logits(hidden)[0, :-1], targets))

  return float(run(params, sample.input_ids[None], sample.labels[1:], sample.tiles))


def loss_of(definition, batch_size):
  return HeldOutLoss(
    model=definition,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=IMAGE,
    batch_size=batch_size,
  )


def test_it_is_that_of_each_sample_alone():
  """Also in batches that are not full, and on a mesh."""
  definition, params = parts("dense")
  params = jax.device_put(params, jax.devices()[0])
  expected = [plain_loss(definition, params, sample) for sample in samples()]
  found = loss_of(definition, 2)(params, samples())
  assert [loss.tokens for loss in found] == [2, 3, 4]
  np.testing.assert_allclose([loss.total for loss in found], expected, rtol=1e-5)
  assert np.ptp(expected) > 1

  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  placed = jax.device_put(params, rules.weight_shardings(definition.axes, definition.shapes, mesh))
  totals = [loss.total for loss in loss_of(definition, 4)(placed, samples())]
  np.testing.assert_allclose(totals, expected, rtol=1e-5)


def test_the_mean_is_over_tokens():
  assert TokenLoss.mean([TokenLoss(4.0, 1), TokenLoss(2.0, 3)]) == 1.5
  assert TokenLoss.mean([TokenLoss(0.0, 0)]) == 0


def test_rows_are_padded_to_few_lengths():
  loss = loss_of(None, 4)
  ids, targets, segments, tiles = loss._pad(samples())
  assert ids.shape == targets.shape == segments.shape == (4, 128) and tiles.shape == (1, 16, 16, 3)
  assert segments.sum(axis=1).tolist() == [*LENGTHS, 0]
  assert (targets != IGNORE_INDEX).sum() == 9
  sample = samples()[1]
  assert targets[1, 28] == sample.input_ids[29] and targets[1, 29] == IGNORE_INDEX
