"""BCO's running mean of rewards, batch by batch."""

import jax.numpy as jnp
import numpy as np

from internvl_jax.losses.preference import PairLogProbs, initial_running, update_running


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
