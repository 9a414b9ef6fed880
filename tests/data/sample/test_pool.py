"""Memory of tiles: written once, grown, and shared between processes."""

import multiprocessing
import pickle

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.sample.pool import SharedSlots, SharedTiles, TilePool
from tests.support.data_toys import arguments, write_dataset

SHAPE = (2, 3, 3, 3)


@pytest.mark.parametrize("capacity", [0, 3, 100])
def test_tiles_stay_whatever_the_room(capacity):
  pool, rng = TilePool(4, capacity), np.random.default_rng(0)
  written = []
  for count in (1, 0, 2, 5, 1):
    written.append(rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    pool.take(count)[:] = written[-1]
  assert pool.used == 9 and pool.allocated == (capacity == 100)
  np.testing.assert_array_equal(pool.since(0), np.concatenate(written))
  np.testing.assert_array_equal(pool.tiles[:9], pool.since(0))
  np.testing.assert_array_equal(pool.since(3), np.concatenate(written[3:]))
  pool.rewind(3)
  pool.take(1)[:] = 7
  np.testing.assert_array_equal(pool.since(0)[:3], np.concatenate(written[:3]))
  assert (pool.since(3) == 7).all() and pool.used == 4


@pytest.fixture
def slots():
  slots = SharedSlots.create(3, int(np.prod(SHAPE)))
  if slots is None:
    pytest.skip("this system has no such memory")
  yield slots
  slots.close()


def fill(pickled, value):
  """In another process: writes to a slot, and says to which."""
  slots = pickle.loads(pickled)
  slot = slots.claim()
  slots.array(slot, SHAPE)[:] = value
  return slot


def test_another_process_writes_and_this_one_reads(slots):
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    slot = pool.apply(fill, (pickle.dumps(slots), 9))
  tiles = slots.open(SharedTiles(slot, SHAPE))
  assert tiles.shape == SHAPE and (tiles == 9).all()


def test_a_slot_is_free_again_when_nobody_reads_it(slots):
  assert [slots.claim() for _ in range(4)] == [0, 1, 2, None]
  tiles = slots.open(SharedTiles(1, SHAPE))
  view = np.asarray(tiles)[1:, None]
  del tiles
  assert slots.claim() is None
  del view
  assert slots.claim() == 1
  slots.release(2)
  assert slots.claim() == 2


def test_what_was_opened_outlives_the_slots():
  slots = SharedSlots.create(1, 27)
  if slots is None:
    pytest.skip("this system has no such memory")
  slots.array(slots.claim(), (27,))[:] = 5
  tiles = slots.open(SharedTiles(0, (1, 3, 3, 3)))
  copy = pickle.dumps(slots)
  slots.close()
  slots.close()
  del slots
  assert (tiles == 5).all()
  assert pickle.loads(copy) is None  # Its process has closed it: workers do without.


def batches(meta, tokenizer, workers, accumulation):
  training = TrainingArguments(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=accumulation,
    max_steps=8 // accumulation,
    dataloader_num_workers=workers,
    disable_tqdm=True,
  )
  loader = TrainLoader(arguments(meta), training, LoaderConfig(prefetch=1), tokenizer, tokens_per_tile=4)
  found = list(loader)
  loader.close()
  return found


def test_a_batch_that_is_not_copied_is_the_same(tmp_path, tokenizer, monkeypatch):
  """Also where all slots are held by batches that are kept, and where there are none."""
  meta = write_dataset(tmp_path)
  copied = batches(meta, tokenizer, 0, 2)
  threads = batches(meta, tokenizer, 0, 1)
  processes = batches(meta, tokenizer, 1, 1)
  monkeypatch.setattr(SharedSlots, "create", lambda count, slot_bytes: None)
  without = batches(meta, tokenizer, 1, 1)
  for number, batch in enumerate(threads):
    pool = copied[number // 2].tiles[number % 2]
    size = min(pool.shape[1], batch.tiles.shape[2])
    np.testing.assert_array_equal(batch.tiles[0, :, :size], pool[:, :size])
    assert not pool[:, size:].any() and not batch.tiles[0, :, size:].any()
    for other in (processes[number], without[number]):
      for ours, theirs in zip(batch, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert type(theirs) is np.ndarray
