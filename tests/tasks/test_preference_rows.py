"""Rows and batches of preference pairs: the schema, packing, and exact resume."""

import contextlib
import json

import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX, TokenBatch
from internvl_jax.tasks.preference.batch import PreferenceBatch
from tests.support.pairs import (
  PACKED,
  assert_equal,
  leaves,
  make_loader,
  segments_of,
)


@pytest.fixture(scope="module")
def unpacked(meta, tokenizer):
  loader = make_loader(meta, tokenizer, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1)
  found = [entry for batch in loader for entry in segments_of(batch)]
  loader.close()
  return found


def test_a_batch_is_as_its_schema_says(meta, tokenizer):
  with contextlib.closing(make_loader(meta, tokenizer, data=PACKED, shards=2)) as loader:
    batch = next(loader)
  A, R, S = batch.rows.input_ids.shape
  assert isinstance(batch.rows, TokenBatch) and (A, R) == (2, 2)
  shapes = [(array.shape, array.dtype) for array in batch[1:]]
  K = S // 4
  assert shapes == [
    ((A, R, K), np.float32),
    ((A, R, K), np.int32),
    ((A, R, K, 2), np.float32),
    ((A, R, K, 2), np.int32),
    ((A, R, S), np.int32),
  ]
  np.testing.assert_array_equal(batch.answers > 0, np.stack([batch.pair_weight == 1] * 2, axis=-1))
  assert not batch.parent.any()
  assert np.isnan(batch.reference).all() and batch.pair_weight.sum(-1).max() > 1
  np.testing.assert_array_equal(batch.pair_weight == 1, batch.pair_index >= 0)
  np.testing.assert_array_equal(batch.rows.loss_weight == 1, batch.rows.targets != IGNORE_INDEX)
  assert set(np.unique(batch.rows.loss_weight)) == {0, 1}


def test_packed_equals_unpacked(meta, tokenizer, unpacked):
  assert sorted(index for index, *_ in unpacked) == list(range(36))
  with contextlib.closing(
    make_loader(meta, tokenizer, data=PACKED, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1)
  ) as loader:
    assert loader.num_samples == 36 and loader.schedule.rows_per_epoch < 25
    found = [entry for batch in loader for entry in segments_of(batch)]
    counters = loader.counters()
  assert sorted(found) == sorted(unpacked)
  assert [counts["samples"] for counts in counters.values()] == [12, 24]


@pytest.mark.parametrize("name", ["unpacked", "grouped", "packed"])
def test_resume_is_bit_identical_for_any_workers_and_hosts(meta, tokenizer, name):
  settings = {"data": PACKED if name == "packed" else {}, "group_by_length": name == "grouped", "shards": 2}
  with contextlib.closing(make_loader(meta, tokenizer, **settings)) as loader:
    expected, wanted = list(loader), loader.get_state()
  batches, state = [], None
  for workers, steps in ((1, 1), (0, 2)):
    with contextlib.closing(
      make_loader(meta, tokenizer, **settings, state=state, dataloader_num_workers=workers)
    ) as loader:
      batches += [next(loader) for _ in range(steps)]
      state = json.loads(json.dumps(loader.get_state()))
  with contextlib.ExitStack() as stack:
    hosts = [
      stack.enter_context(
        contextlib.closing(make_loader(meta, tokenizer, **settings, state=state, my_shards=range(i, i + 1)))
      )
      for i in range(2)
    ]
    for _ in range(2):
      parts = [next(host) for host in hosts]
      joined = [np.concatenate(arrays, axis=1) for arrays in zip(*map(leaves, parts), strict=True)]
      batches.append(PreferenceBatch(TokenBatch(*joined[:7]), *joined[7:]))
    assert hosts[0].next_step == wanted["next_step"]
  for batch, other in zip(batches, expected, strict=True):
    assert_equal(batch, other)
