"""What packed rows cost a device is what the model computes for them, and the run's loader is told."""

import numpy as np
import pytest

from internvl_jax.batch import BatchCounts
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.metrics.mfu import UsefulFlops
from internvl_jax.open_model import open_shapes
from internvl_jax.setup.balance import planned_balance, row_cost, run_row_cost
from internvl_jax.setup.run import open_loader, open_run
from internvl_jax.tasks import open_task
from internvl_jax.watchdog import Watchdog
from tests.support.toy import curve_config

USEFUL = UsefulFlops(2.2e12, 6.6e7, 2.9e9, 2.6e5, ((512, 1.3e5),), tokens_per_tile=256)


@pytest.mark.parametrize("pools_are_full", [False, True])
def test_costs_are_in_proportion_to_operations(pools_are_full):
  sizes = np.array([[3000, 9], [40, 0], [8192, 31]])
  tokens, tiles = sizes.T
  pairs = tokens * (tokens + 1) / 2
  costs = row_cost(USEFUL, pools_are_full=pools_are_full).of(sizes).sum(axis=1)
  counted = np.zeros(3) if pools_are_full else tiles * 256
  expected = [USEFUL.of(BatchCounts(0, n, i, p)) for n, i, p in zip(tokens, counted, pairs, strict=True)]
  np.testing.assert_allclose(costs / UNIT, np.array(expected) / USEFUL.per_token, rtol=1e-4)


def test_costs_that_were_measured():
  one = UsefulFlops(2.2e12, 6.6e7, 2.9e9, 3e5, ((512, 1e5),), tokens_per_tile=256)
  # A pair is one in all layers, of which those with a window have a quarter here.
  assert row_cost(one, measured=(3.0, 0.004, 4e-7)) == RowCost(
    per_tile=750 * UNIT, per_pair=round(UNIT * 7.5e-5), windowed=((512, round(UNIT * 2.5e-5)),)
  )
  assert row_cost(one, measured=(3.0, 0.004, 4e-7)) == row_cost(one, measured=(3e6, 4e3, 0.4))
  assert row_cost(one, pools_are_full=True, measured=(3.0, 0.004, 4e-7)).per_tile == 0
  # However little a token costs, a window of rows stays below 2**63: 64 steps of 4,096 devices.
  for measured in ((1e9, 1e-9, 0.0), (0.0, 1e-9, 1e9)):
    row = row_cost(USEFUL, measured=measured).of(np.array([[32768, 64]])).sum(dtype=object)
    assert 0 < row * 64 * 4096 < 2**63


def test_a_plan_says_how_rows_are_balanced(tmp_path):
  config = curve_config(str(tmp_path / "out"))
  config.data.use_packed_ds, config.data.strict_mode = True, False
  source = open_shapes(config)
  task = open_task(config, source)
  by_flops = planned_balance(config, source, task, 2)
  cost = run_row_cost(config, source, task)
  assert by_flops == {
    "steps": 64,
    "tokens_a_tile": cost.per_tile / UNIT,
    "tokens_a_pair": cost.per_pair / UNIT,
    "measured": False,
  }
  config.loader.balance_costs = (8.0, 0.5, 0.001)
  found = planned_balance(config, source, task, 2)
  assert found is not None and found["measured"] and found["tokens_a_tile"] == 16
  np.testing.assert_allclose(found["tokens_a_pair"], 0.002, rtol=1e-4)
  assert planned_balance(config, source, task, 1) is None
  config.loader.balance_steps = 0
  assert planned_balance(config, source, task, 2) is None


def test_the_loader_of_a_run_is_told_what_rows_cost(tmp_path):
  config = curve_config(str(tmp_path / "out"))
  config.data.use_packed_ds, config.data.strict_mode = True, False
  run = open_run(config, Watchdog("here", 600.0))
  _, make_loader = open_loader(run)
  cost = make_loader.keywords["shards"].row_cost
  assert isinstance(cost, RowCost) and cost.per_token == UNIT and cost.per_tile > UNIT and cost.per_pair > 0
  run.config.loader.balance_costs = (64.0, 0.5, 0.0)
  measured = open_loader(run)[1].keywords["shards"].row_cost
  assert measured == RowCost(per_tile=128 * UNIT, per_pair=0)
  run.config.data.strict_mode = True
  assert open_loader(run)[1].keywords["shards"].row_cost.per_tile == 0
