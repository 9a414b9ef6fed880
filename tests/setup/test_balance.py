"""What packed rows cost a device is what the model computes for them, and the run's loader is told."""

import numpy as np
import pytest

from internvl_jax.batch import BatchCounts
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.metrics.mfu import UsefulFlops
from internvl_jax.setup.balance import row_cost
from internvl_jax.setup.run import open_loader, open_run
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


def test_the_loader_of_a_run_is_told_what_rows_cost(tmp_path):
  config = curve_config(str(tmp_path / "out"))
  config.data.use_packed_ds, config.data.strict_mode = True, False
  run = open_run(config, Watchdog("here", 600.0))
  _, make_loader = open_loader(run)
  cost = make_loader.keywords["shards"].row_cost
  assert isinstance(cost, RowCost) and cost.per_token == UNIT and cost.per_tile > UNIT and cost.per_pair > 0
  run.config.data.strict_mode = True
  assert open_loader(run)[1].keywords["shards"].row_cost.per_tile == 0
