"""Balanced steps: every row once, devices that finish together, and the same again from any step on."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.data.sample.long_samples import OVER_LONG, UNREADABLE
from internvl_jax.data.schedule import balance, packing
from internvl_jax.data.schedule.balance import UNIT, Balance, RowCost
from internvl_jax.data.schedule.order import EpochOrder
from internvl_jax.data.schedule.packed_rows import packable
from internvl_jax.data.schedule.packed_steps import StepShape
from internvl_jax.data.schedule.schedule import make_schedule

# Of a model of a billion parameters, where a tile costs as much as 775 tokens.
COST = RowCost(per_tile=775 * UNIT, per_pair=UNIT // 8192, windowed=((128, UNIT // 8192),))
SIZES = np.load(Path(__file__).parents[2] / "assets" / "packing_sizes.npz")["sizes"].astype(np.int64)
ROWS = packing.PackSettings(max_tokens=8192, max_tiles=40, over_long="drop")

SAMPLES = 211
PACKED = packing.PackSettings(max_tokens=100, max_tiles=6, look_ahead=8, over_long="drop")
SHAPE = StepShape(accumulation=2, shards=3, rows_per_shard=2)
TOY = Balance(steps=5, cost=RowCost(per_tile=20 * UNIT, per_pair=UNIT // 64))


def size_of(indices):
  """Tokens and tiles of samples; of each 17 one is unreadable, and one too long."""
  sizes = np.stack([10 + indices * 37 % 61, indices * indices * 5 % 4], axis=1)
  sizes[indices % 17 == 3, 0], sizes[indices % 17 == 5, 0] = UNREADABLE, OVER_LONG
  return sizes


def schedule_of(settings=TOY, shape=SHAPE, **training):
  def rows(indices):
    return packing.count_rows(packable(size_of(indices), PACKED), PACKED)

  order = EpochOrder(SAMPLES, seed=3, shuffle=True)
  return make_schedule(order, shape, TrainingArguments(**training), size_of, PACKED, rows, settings)


def steps_of(schedule, count, step=0, state=None):
  cursor = schedule.cursor(step, state)
  return [cursor.next_rows() for _ in range(count)], json.loads(json.dumps(cursor.get_state()))


def told(rows):
  return [(row.epochs.tolist(), row.indices.tolist()) for row in rows]


def all_rows(steps):
  return sorted(row for step in steps for row in told(step.rows))


# --- Costs --------------------------------------------------------------------------------------------------


def test_a_rows_cost_is_that_of_its_tiles_tokens_and_pairs():
  cost = RowCost(per_tile=1000, per_token=10, per_pair=2, windowed=((3, 1), (9, 5)))
  sizes = np.array([[4, 2], [2, 0], [10, 1]])
  #         10 n + 2 n (n + 1) / 2 + 1 * min(n (n + 1) / 2, 3 n) + 5 * min(n (n + 1) / 2, 9 n)
  decoder = [40 + 20 + 10 + 50, 20 + 6 + 3 + 15, 100 + 110 + 30 + 275]
  assert cost.of(sizes).tolist() == [[2000, decoder[0]], [0, decoder[1]], [1000, decoder[2]]]
  rows = cost.of_rows(sizes, np.array([2, 1]))
  assert rows.tolist() == [[2000, decoder[0] + decoder[1]], [1000, decoder[2]]]


def test_settings_survive_json():
  settings = Balance(steps=7, cost=COST)
  assert Balance.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_slowest_over_mean_counts_each_micro_batch():
  # Two micro-batches of two devices with two rows each: 3 and 5, then 8 and 2.
  costs = np.array([[1, 2, 4, 1, 4, 4, 1, 1]])
  assert balance.slowest_over_mean(costs, 2, 2) == (5 + 8) / (4 + 5)
  assert balance.slowest_over_mean(costs, 1, 4) == 8 / 4.5
  assert balance.slowest_over_mean(np.zeros((3, 4), np.int64), 2, 2) == 1


# --- Pure functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_in_one_step(seed):
  rng = np.random.default_rng(seed)
  steps, rows = int(rng.integers(1, 20)), int(rng.integers(1, 9))
  costs = rng.pareto(1.0, (steps * rows, 2)).astype(np.int64) * int(rng.integers(1, 1 << 30))
  found = balance.even_steps(costs, rows)
  assert found.shape == (steps, rows) and (np.diff(found, axis=1) > 0).all()
  assert sorted(found.ravel().tolist()) == list(range(steps * rows))


def test_steps_of_rows_that_cost_the_same_in_both_parts():
  # Tiles and decoder add up to the same everywhere, so that only the parts tell the rows apart.
  costs = np.array([[9, 1], [1, 9], [1, 9], [9, 1]])
  assert sorted(balance.even_steps(costs, 2).tolist()) == [[0, 3], [1, 2]]
  assert balance.even_steps(np.array([[0, 1], [0, 9], [0, 1], [0, 9]]), 2).tolist() == [[0, 2], [1, 3]]


def test_rows_that_are_alike_stay_in_their_order():
  costs = 1000 + np.random.default_rng(0).integers(0, 9, (64, 2))
  assert balance.even_steps(costs, 4).ravel().tolist() == list(range(64))
  # One row that is not moves those alone that differ from their neighbors for it.
  costs[17] *= 2
  assert balance.even_steps(costs, 4).ravel().tolist() != list(range(64))


@pytest.mark.parametrize(("accumulation", "shards", "each"), [(1, 4, 1), (3, 4, 1), (2, 3, 3), (4, 1, 2)])
def test_rows_of_a_step_to_devices(accumulation, shards, each):
  rows = accumulation * shards * each
  costs = np.random.default_rng(rows).integers(1, 1000, rows)
  found = balance.to_devices(costs, accumulation, shards)
  assert sorted(found.tolist()) == list(range(rows))
  devices = found.reshape(accumulation, shards, each)
  assert (np.diff(devices, axis=2) > 0).all() and (np.diff(devices[:, :, 0], axis=1) > 0).all()
  loads = costs[devices].sum(2)
  # Micro-batches hold devices that are alike: those of one are not cheaper than those of the one before.
  assert (loads.max(1)[:-1] <= loads.min(1)[1:]).all()
  as_it_comes = balance.slowest_over_mean(costs[None], accumulation, shards)
  assert balance.slowest_over_mean(costs[found][None], accumulation, shards) <= as_it_comes


def test_rows_of_a_window_to_devices():
  costs = np.array([[0, 1], [0, 1], [0, 9], [0, 9], [0, 50], [0, 50], [0, 60], [0, 60]])
  found = balance.assign(costs, 1, 2, 4)
  assert sorted(map(sorted, found.tolist())) == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert balance.slowest_over_mean(costs[:, 1][found], 1, 2) == 1
  assert balance.waiting(costs[:, ::-1], 2, 4) == ((1 + 9 + 50 + 60) / (1 + 9 + 50 + 60), 1)
  assert balance.waiting(costs[[0, 2, 1, 4, 3]], 2, 2)[1] == (1 + 50) / (1 + 29.5)
  assert balance.waiting(costs[[0, 2, 1, 4, 3]], 2, 1)[0] == (9 + 50) / (5 + 25.5)


def test_the_order_of_a_windows_steps_is_drawn():
  steps = np.arange(32)[:, None]
  drawn = [balance.shuffled(steps, seed, first).ravel().tolist() for seed, first in ((0, 0), (0, 32), (1, 0))]
  assert all(sorted(one) == list(range(32)) for one in drawn)
  assert drawn[0] == balance.shuffled(steps, 0, 0).ravel().tolist()
  assert drawn[0] != drawn[1] and drawn[0] != drawn[2] and drawn[0] != list(range(32))


def packed_costs(sizes, cost):
  """Costs of the rows that sizes are packed into, [rows, 2], and their tokens."""
  rows = list(packing.pack(sizes, ROWS))
  chosen = sizes[np.concatenate(rows)]
  lengths = np.array([len(row) for row in rows])
  return cost.of_rows(chosen, lengths), np.add.reduceat(chosen[:, 0], np.cumsum(lengths) - lengths)


def heavy_tailed(count):
  """Sizes of short texts, some of them very long, images of 1 to 13 tiles, and videos."""
  rng = np.random.default_rng(0)
  kinds, sizes = rng.choice(3, count, p=[0.4, 0.57, 0.03]), np.zeros((count, 2))
  text = np.exp(rng.normal(5.5, 1.3, count))
  tiles = np.where(
    kinds == 1, np.minimum(1 + 2 * rng.pareto(1.0, count), 13), rng.integers(8, 31, count)
  ).astype(int)
  sizes[:, 1] = np.where(kinds == 0, 0, tiles)
  sizes[:, 0] = np.where(kinds == 0, text, 256 * tiles + np.minimum(text, 500))
  return sizes.astype(np.int64).clip((8, 0), (8192, 40))


@pytest.mark.parametrize("shards", [8, 64])
@pytest.mark.parametrize("mixture", ["recorded", "heavy"])
def test_devices_finish_together(mixture, shards):
  sizes = np.random.default_rng(1).permutation(SIZES) if mixture == "recorded" else heavy_tailed(7000)
  costs, _ = packed_costs(sizes, COST)
  steps = min(64, len(costs) // shards)
  costs = costs[: steps * shards]
  before = balance.slowest_over_mean(costs.sum(1).reshape(steps, shards), 1, shards)
  assigned = balance.even_steps(costs, shards)
  after = balance.slowest_over_mean(costs.sum(1)[assigned], 1, shards)
  if steps == 64:
    assert before > 1.08 and after <= 1.02
  # With fewer steps to choose from, at least most of the waiting goes.
  assert after - 1 < 0.35 * (before - 1)


# --- Steps of a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_balanced_steps_have_the_rows_of_the_stream(steps):
  settings = Balance(steps=steps, cost=TOY.cost)
  total = schedule_of(max_steps=1).steps_per_epoch
  assert total % 5  # The last window is a short one.
  balanced, _ = steps_of(schedule_of(settings, max_steps=total), total)
  plain, _ = steps_of(schedule_of(None, max_steps=total), total)
  assert all_rows(balanced) == all_rows(plain)
  for start in range(0, total, steps):
    assert all_rows(balanced[start : start + steps]) == all_rows(plain[start : start + steps])
  skipped = [
    [np.concatenate([step.skipped[why] for step in run]).tolist() for why in range(3)]
    for run in (balanced, plain)
  ]
  assert skipped[0] == skipped[1] and len(skipped[0][0]) > 9
  if steps > 1:
    assert [told(step.rows) for step in balanced] != [told(step.rows) for step in plain]


def test_devices_of_a_run_are_more_even_and_it_says_so():
  def evenness(schedule):
    rows, found = [], []
    for step in steps_of(schedule, 30)[0]:
      sizes = size_of(np.concatenate([row.indices for row in step.rows]))
      costs = TOY.cost.of_rows(sizes, np.array([len(row.indices) for row in step.rows]))
      rows.append(costs.sum(1))
      found += [] if step.evenness is None else [step.evenness]
    return balance.slowest_over_mean(np.array(rows), SHAPE.accumulation, SHAPE.shards), found

  after, found = evenness(schedule_of(max_steps=30))
  before, nothing = evenness(schedule_of(None, max_steps=30))
  assert 1 < after < 1 + (before - 1) / 2 and not nothing
  assert [each.steps for each in found] == [5] * 6
  np.testing.assert_allclose(np.mean([each.after for each in found]), after, atol=0.01)
  np.testing.assert_allclose(np.mean([each.before for each in found]), before, atol=0.01)


def test_balanced_steps_go_on_from_any_step():
  schedule = schedule_of(max_steps=18)
  straight, last = steps_of(schedule, 18)
  for stop in (0, 1, 4, 5, 7, 17):
    _, state = steps_of(schedule, stop)
    rest, end = steps_of(schedule_of(max_steps=18), 18 - stop, stop, state)
    assert [told(step.rows) for step in rest] == [told(step.rows) for step in straight[stop:]]
    for step, other in zip(rest, straight[stop:], strict=True):
      assert [part.tolist() for part in step.skipped] == [part.tolist() for part in other.skipped]
    assert end == last


def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start():
  long, _ = steps_of(schedule_of(max_steps=18), 18)
  for stop in (3, 10):  # The short run's last window begins after step 10.
    _, state = steps_of(schedule_of(max_steps=12), stop)
    rest, _ = steps_of(schedule_of(max_steps=18), 18 - stop, stop, state)
    assert [told(step.rows) for step in rest] == [told(step.rows) for step in long[stop:]]
  # Within that window its two steps stay what they were.
  _, state = steps_of(schedule_of(max_steps=12), 11)
  rest, _ = steps_of(schedule_of(max_steps=18), 7, 11, state)
  assert all_rows([*steps_of(schedule_of(max_steps=12), 11)[0], *rest]) == all_rows(long)


def test_a_run_goes_on_as_it_began():
  plain, balanced = schedule_of(None, max_steps=18), schedule_of(max_steps=18)
  other = schedule_of(Balance(steps=3, cost=RowCost(per_tile=UNIT)), max_steps=18)
  for began, now in ((plain, balanced), (balanced, plain), (balanced, other)):
    expected, _ = steps_of(began, 18)
    _, state = steps_of(began, 7)
    rest, _ = steps_of(now, 11, 7, state)
    assert [told(step.rows) for step in rest] == [told(step.rows) for step in expected[7:]]


def test_a_step_has_the_same_rows_for_any_devices_that_share_it():
  shapes = [
    StepShape(accumulation=a, shards=d, rows_per_shard=r) for a, d, r in ((2, 3, 2), (1, 12, 1), (3, 2, 2))
  ]
  runs = [steps_of(schedule_of(shape=shape, max_steps=18), 18)[0] for shape in shapes]
  for steps in zip(*runs, strict=True):
    assert all_rows([steps[0]]) == all_rows([steps[1]]) == all_rows([steps[2]])
  # One device waits for nobody.
  alone = schedule_of(shape=StepShape(accumulation=12, shards=1, rows_per_shard=1), max_steps=18)
  assert alone.balance is None
  plain = schedule_of(None, max_steps=18)
  assert [told(s.rows) for s in steps_of(alone, 18)[0]] == [told(s.rows) for s in steps_of(plain, 18)[0]]


def test_workers_find_balanced_micro_batches_in_any_order():
  cursor = schedule_of(max_steps=18).cursor()
  for _ in range(3):
    cursor.next_rows()
  micro_batches = pickle.loads(pickle.dumps(cursor.micro_batches()))
  rows = [row for _ in range(6) for row in cursor.next_rows().rows]
  for element in (4, 11, 5, 0):
    expected = rows[element * SHAPE.micro_rows : (element + 1) * SHAPE.micro_rows]
    assert told(micro_batches[element]) == told(expected)


def test_planning_ahead_is_spread_over_the_steps():
  """No step but a run's first plans more rows than two steps have: for itself at a window's end, and ahead."""
  cursor = schedule_of(max_steps=40).cursor()
  planned = []
  for _ in range(40):
    reports = []
    cursor.next_rows(reports.append)
    planned.append(len(reports))
  assert (
    planned[0] == 6 * SHAPE.rows and set(planned[1:35]) == {SHAPE.rows} and sum(planned) == 40 * SHAPE.rows
  )


def test_states_of_other_steps_and_versions_are_refused():
  _, state = steps_of(schedule_of(max_steps=18), 7)
  for step in (4, 10):
    with pytest.raises(ValueError, match=f"state of steps 5 to 9, not of {step}"):
      schedule_of(max_steps=18).cursor(step, state)
  with pytest.raises(ValueError, match="state of other balancing: saved balanced-0, now balanced-1"):
    schedule_of(max_steps=18).cursor(7, {**state, "algorithm": "balanced-0"})
  # A version that knows of no balance sees another packing, and refuses it.
  with pytest.raises((ValueError, KeyError)):
    packing.Packer(PACKED).set_state(state)
