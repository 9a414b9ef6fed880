"""Batches of ViCO's stages: every sample with and without compressed tiles, whatever packs, deals and decodes it."""

import contextlib

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.tasks.sft.data import DATA
from internvl_jax.tasks.vico.data import FlashData, Independently, OneTile
from tests.support.data_toys import arguments, resumed, write_dataset

P, Q = 4, 1
PACKED = {"use_packed_ds": True, "max_packed_tokens": 512, "num_images_expected": 24, "strict_mode": False}
HALF = FlashData(draw=Independently(0.5), seed=3, features_per_tile=(P, Q))


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
  return write_dataset(tmp_path_factory.mktemp("flash"), 14)


def loader_of(meta, tokenizer, *, task=HALF, shards=1, state=None, data=None, **more):
  settings = {"per_device_train_batch_size": 4 // shards, "gradient_accumulation_steps": 2, "max_steps": 6}
  loader = TrainLoader(
    arguments(meta, **(data or {})),
    TrainingArguments(**settings | {"disable_tqdm": True} | more),
    LoaderConfig(cache_dir=str(meta.parent / "cache")),
    tokenizer,
    tokens_per_tile=P,
    shards=Shards(count=shards),
    task=task,
  )
  return contextlib.closing(resumed(loader, state))


def batches_of(meta, tokenizer, **settings):
  with loader_of(meta, tokenizer, **settings) as loader:
    return list(loader)


def samples_of(batch):
  """Of every sample of a batch: both forms' tokens, targets and pixels, which tiles are compressed, and what they weigh."""
  rows, full, found = batch.rows, batch.full, []
  A, R, _ = rows.input_ids.shape
  each = R // rows.tiles.shape[1]
  for a, r in np.ndindex(A, R):
    pool, shard = rows.tiles[a, r // each], r // each
    assert rows.segment_ids[a, r].max() == full.segment_ids[a, r].max()
    for segment in range(1, rows.segment_ids[a, r].max() + 1):
      here, there = (np.flatnonzero(x.segment_ids[a, r] == segment) for x in (rows, full))
      np.testing.assert_array_equal(rows.positions[a, r, here], np.arange(len(here)))
      np.testing.assert_array_equal(full.positions[a, r, there], np.arange(len(there)))
      # Every token is where `place` says.
      assert set(batch.place[a, r, here]) <= set(there)
      np.testing.assert_array_equal(full.input_ids[a, r, batch.place[a, r, here]], rows.input_ids[a, r, here])
      index = full.image_index[a, r, there]
      tiles = index[index != NO_IMAGE].reshape(-1, P)
      np.testing.assert_array_equal(tiles % P, np.broadcast_to(np.arange(P), tiles.shape))
      tiles = tiles[:, 0] // P
      ours = rows.image_index[a, r, here]
      ours = ours[ours != NO_IMAGE]
      compressed = np.array([t * (P + Q) + P in ours for t in tiles], bool)
      wanted = [
        t * (P + Q) + (P + np.arange(Q) if c else np.arange(P))
        for t, c in zip(tiles, compressed, strict=True)
      ]
      np.testing.assert_array_equal(ours, np.concatenate([*wanted, np.zeros(0, int)]))
      np.testing.assert_array_equal(batch.tile_weight[a, shard, tiles], compressed)
      assert (batch.tile_row[a, shard, tiles] == r % each).all()
      assert (batch.tile_segment[a, shard, tiles] == segment).all()
      found.append((full.input_ids[a, r, there], rows.targets[a, r, here], pool[tiles], compressed))
  assert batch.tile_weight.sum() == sum(compressed.sum() for *_, compressed in found)
  assert (rows.loss_weight[rows.targets == IGNORE_INDEX] == 0).all()
  return found


def test_each_sample_is_there_twice(meta, tokenizer):
  """The full rows are those of fine-tuning; the targets of the others are the same tokens."""
  for batch, plain in zip(batches_of(meta, tokenizer), batches_of(meta, tokenizer, task=DATA), strict=True):
    for name in batch.full._fields:
      np.testing.assert_array_equal(getattr(batch.full, name), getattr(plain, name))
    np.testing.assert_array_equal(batch.rows.tiles, plain.tiles)
    drawn = np.concatenate([compressed for *_, compressed in samples_of(batch)])
    assert 0 < drawn.mean() < 1
    for field in ("targets", "loss_weight"):
      for a, r in np.ndindex(plain.targets.shape[:2]):
        ours, theirs = (getattr(x, field)[a, r][x.targets[a, r] != IGNORE_INDEX] for x in (batch.rows, plain))
        np.testing.assert_array_equal(ours, theirs)


def by_sample(batches):
  """Of every sample, by its full tokens, which tiles are compressed each time that it comes."""
  found = {}
  for batch in batches:
    for ids, _, _, compressed in samples_of(batch):
      found.setdefault(ids.tobytes(), []).append(compressed.tolist())
  return found


@pytest.mark.parametrize("settings", [{"shards": 2}, {"data": PACKED}], ids=["shards", "packed"])
def test_what_is_drawn_is_the_samples(meta, tokenizer, settings):
  """By its number and its epoch, whatever row and place it is in; not the same in every epoch."""
  # Packed rows hold more samples: as far as both see an epoch.
  one, other = (by_sample(batches_of(meta, tokenizer, **more)) for more in ({}, settings))
  for ids, draws in one.items():
    seen = min(len(draws), len(other[ids]))
    assert seen and other[ids][:seen] == draws[:seen]
  assert any(len({*map(tuple, draws)}) > 1 for draws in one.values())


def test_a_loader_goes_on_with_the_same_draws(meta, tokenizer):
  whole = batches_of(meta, tokenizer)
  with loader_of(meta, tokenizer) as loader:
    for _ in range(2):
      next(loader)
    state = loader.get_state()
  for batch, wanted in zip(batches_of(meta, tokenizer, state=state), whole[2:], strict=True):
    for ours, theirs in zip(
      [*batch.rows, *batch.full, *batch[2:]], [*wanted.rows, *wanted.full, *wanted[2:]], strict=True
    ):
      np.testing.assert_array_equal(ours, theirs)


def test_the_router_learns_of_one_tile_of_each_sample(meta, tokenizer):
  task = FlashData(draw=OneTile(), seed=3, features_per_tile=(P, Q))
  for batch in batches_of(meta, tokenizer, task=task):
    for _, _, tiles, compressed in samples_of(batch):
      assert compressed.sum() == min(1, len(tiles))
