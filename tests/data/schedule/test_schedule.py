"""The steps of a run from the sizes of its samples alone, and the same from any step on."""

import pickle

import numpy as np
import pytest

from internvl_jax.arguments import DataTrainingArguments, TrainingArguments
from internvl_jax.data.sample.long_samples import OVER_LONG, UNREADABLE
from internvl_jax.data.schedule.grouping import GroupedOrder
from internvl_jax.data.schedule.order import DrawnOrder, EpochOrder, ResampledOrder
from internvl_jax.data.schedule.packed_rows import packable
from internvl_jax.data.schedule.packed_steps import StepShape
from internvl_jax.data.schedule.packing import PackSettings, count_rows
from internvl_jax.data.schedule.schedule import Schedule, make_order, make_schedule

SAMPLES = 53
SHAPE = StepShape(accumulation=2, shards=3, rows_per_shard=1)
PACKED = PackSettings(max_tokens=100, max_tiles=6, look_ahead=8, over_long="drop")


def size_of(indices):
  """Tokens and tiles of samples; of each 17 one is unreadable, and one too long."""
  sizes = np.stack([10 + indices * 37 % 61, indices * 5 % 4], axis=1)
  sizes[indices % 17 == 3, 0], sizes[indices % 17 == 5, 0] = UNREADABLE, OVER_LONG
  return sizes


def lengths_of(indices):
  return size_of(indices)[:, 0].clip(0)


def schedule_of(packed=None, **training):
  order = EpochOrder(SAMPLES, seed=3, shuffle=True)

  def rows(indices):
    return count_rows(packable(size_of(indices), PACKED), PACKED)

  return make_schedule(order, SHAPE, TrainingArguments(**training), size_of, packed, rows)


def told(rows):
  return [(row.epochs.tolist(), row.indices.tolist()) for row in rows]


def steps_of(schedule, count, step=0, state=None):
  cursor = schedule.cursor(step, state)
  return [cursor.next_rows() for _ in range(count)], cursor.get_state()


@pytest.mark.parametrize("packed", [None, PACKED])
def test_a_schedule_goes_on_from_any_step(packed):
  schedule = schedule_of(packed, max_steps=30)
  straight, _ = steps_of(schedule, 30)
  for stop in (0, 1, 7, 29):
    _, state = steps_of(schedule, stop)
    rest, _ = steps_of(schedule_of(packed, max_steps=30), 30 - stop, stop, state)
    assert [told(step.rows) for step in rest] == [told(step.rows) for step in straight[stop:]]
    for step, other in zip(rest, straight[stop:], strict=True):
      assert [part.tolist() for part in step.skipped] == [part.tolist() for part in other.skipped]


@pytest.mark.parametrize("packed", [None, PACKED])
def test_workers_find_the_rows_of_micro_batches_in_any_order(packed):
  schedule = schedule_of(packed, max_steps=9)
  cursor = schedule.cursor()
  for _ in range(2):
    cursor.next_rows()
  micro_batches = pickle.loads(pickle.dumps(cursor.micro_batches()))
  rows = [row for _ in range(3) for row in cursor.next_rows().rows]
  for element in (4, 1, 5, 0):
    expected = rows[element * SHAPE.micro_rows : (element + 1) * SHAPE.micro_rows]
    assert told(micro_batches[element]) == told(expected)


def test_single_rows_are_the_stream():
  schedule = schedule_of(max_steps=20)
  steps, state = steps_of(schedule, 20)
  rows = [row for step in steps for row in step.rows]
  assert all(len(row.indices) == 1 for row in rows) and len(rows) == 20 * SHAPE.rows and state is None
  indices = np.concatenate([row.indices for row in rows])
  np.testing.assert_array_equal(indices, schedule.order.places(0, len(rows)).indices)
  assert not any(len(part) for step in steps for part in step.skipped)


def test_packed_rows_hold_what_fits_and_the_rest_is_skipped_once_an_epoch():
  schedule = schedule_of(PACKED, num_train_epochs=1)
  fills = []
  cursor = schedule.cursor()
  steps = [cursor.next_rows(fills.append) for _ in range(schedule.steps_per_epoch)]
  rows = [row for step in steps for row in step.rows]
  for row in rows:
    sizes = size_of(row.indices)
    assert (sizes[:, 0] > 0).all() and (sizes.sum(0) <= [PACKED.max_tokens, PACKED.max_tiles]).all()
  assert [fill.rows for fill in fills] == list(range(1, len(rows) + 1))
  first = np.concatenate([row.indices[row.epochs == 0] for row in rows])
  lost = {i for i in range(SAMPLES) if size_of(np.array([i]))[0, 0] <= 0}
  assert sorted(first.tolist()) == sorted(set(range(SAMPLES)) - lost)
  skipped = [set(np.concatenate([step.skipped[why] for step in steps]).tolist()) for why in range(3)]
  assert skipped[0] | skipped[1] == lost and skipped[0] == {i for i in lost if i % 17 == 3} and not skipped[2]


@pytest.mark.parametrize("packed", [None, PACKED])
def test_totals(packed):
  schedule = schedule_of(packed, num_train_epochs=2.5)
  steps, _ = steps_of(schedule, SAMPLES)
  rows = sum(row.epochs[0] == 0 for step in steps for row in step.rows)
  assert (schedule.num_samples, schedule.rows_per_epoch) == (SAMPLES, rows)
  assert schedule.steps_per_epoch == -(-rows // 6) and schedule.total_steps == -(-rows * 5 // 12)
  assert schedule.epoch_of(3) == 18 / rows
  assert schedule_of(packed, max_steps=7, num_train_epochs=9).total_steps == 7


def test_a_state_of_other_budgets_is_refused():
  _, state = steps_of(schedule_of(PACKED, max_steps=9), 2)
  other = PackSettings(max_tokens=101, max_tiles=6, look_ahead=8, over_long="drop")
  with pytest.raises(ValueError, match="packing state of other settings"):
    schedule_of(other, max_steps=9).cursor(2, state)


def test_the_fingerprint_tells_other_orders_and_shapes_apart():
  def prints(order=None, shape=SHAPE):
    schedule = Schedule(
      order=order or EpochOrder(SAMPLES, 3, True),
      shape=shape,
      size_of=size_of,
      packing=None,
      rows_per_epoch=SAMPLES,
      total_steps=5,
    )
    return schedule.fingerprint()

  ours = prints()
  assert ours == {
    "num_samples": 53,
    "global_batch": 6,
    "order_seed": 3,
    "shuffle": 1,
    "order_checksum": EpochOrder(SAMPLES, 3, True).checksum(),
  }
  # How a step is dealt to devices does not change which samples it sees.
  assert prints(shape=StepShape(accumulation=1, shards=2, rows_per_shard=3)) == ours
  others = [
    prints(EpochOrder(SAMPLES, 4, True)),
    prints(EpochOrder(SAMPLES, 3, False)),
    prints(EpochOrder(SAMPLES + 1, 3, True)),
    prints(shape=StepShape(accumulation=1, shards=3, rows_per_shard=1)),
  ]
  assert all(other != ours for other in others)


@pytest.mark.parametrize(
  ("data", "training", "expected"),
  [
    ({}, {}, EpochOrder(53, 42, True)),
    ({}, {"seed": 1, "data_seed": 7}, EpochOrder(53, 7, True)),
    ({"use_data_resampling": True}, {}, ResampledOrder((50, 3), 42, True)),
    ({"replacement": True}, {}, EpochOrder(53, 42, True)),
    ({"replacement": True, "use_packed_ds": True}, {}, DrawnOrder((50, 3), 42, False, True)),
    (
      {"replacement": True, "use_packed_ds": True, "use_data_resampling": True},
      {},
      DrawnOrder((50, 3), 42, True, True),
    ),
    ({}, {"group_by_length": True}, GroupedOrder(EpochOrder(53, 42, True), lengths_of, 2, 3, 1)),
    ({"use_packed_ds": True}, {"group_by_length": True}, EpochOrder(53, 42, True)),
  ],
)
def test_settings_choose_the_order(data, training, expected):
  order = make_order(
    DataTrainingArguments(**data),
    TrainingArguments(**training),
    shuffle=True,
    samples=(50, 3),
    shape=SHAPE,
    length_of=lengths_of,
  )
  assert order == expected
