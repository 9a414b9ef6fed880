"""What of preference losses no recording has: BCO's running mean batch by batch, and EXO without label smoothing."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from internvl_jax.losses.preference import (
  LOSSES,
  LossSettings,
  PairLogProbs,
  initial_running,
  pair_losses,
  update_running,
)


def test_the_running_mean_counts_batches_that_have_pairs_alike():
  """Rewards are beta times the mean of both ratios; padding may hold anything."""
  running = initial_running()
  for chosen, rejected, weights in (
    ([4.0, 2.0], [0.0, 2.0], [0.5, 0.5]),  # (2 + 2) / 2 = 2
    ([1.0, np.nan], [1.0, np.inf], [1.0, 0.0]),  # 1
    ([np.nan, 7.0], [np.nan, 7.0], [0.0, 0.0]),  # Nothing, which does not count.
    ([8.0, 0.0], [0.0, 0.0], [0.75, 0.25]),  # 3
  ):
    zero = jnp.zeros(2)
    logps = PairLogProbs(jnp.array(chosen), jnp.array(rejected), zero, zero)
    running = update_running(running, logps, jnp.array(weights), beta=0.5)
  assert float(running["batches"]) == 3
  np.testing.assert_allclose(running["reward_sum"], 0.5 * (2 + 1 + 3))


def test_exo_takes_a_thousandth_where_nothing_is_smoothed():
  """The reverse KL divergence from the policy's preference to one of 0.999 (arXiv:2402.00856, equation 16)."""
  margin = np.array([-3.0, 0.5, 4.0])
  zero = jnp.zeros(3)
  logps = PairLogProbs(jnp.asarray(margin), zero, zero, zero)
  found = pair_losses("exo_pair", logps, jnp.ones(3), LossSettings(0.5, 0.0), initial_running())
  prefers = 1 / (1 + np.exp(-0.5 * margin))
  expected = prefers * np.log(prefers / 0.999) + (1 - prefers) * np.log((1 - prefers) / 0.001)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_docs_name_the_losses():
  text = (Path(__file__).parents[2] / "docs/preference.md").read_text()
  (row,) = (line for line in text.splitlines() if line.startswith("| `loss_type` |"))
  assert re.findall("`([a-z_]+)`", row.split("|")[2]) == list(LOSSES)
