"""Preference losses are TRL's, batch after batch, and each is named in one place."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import config_checks
from internvl_jax.config import TrainConfig
from internvl_jax.losses import preference
from internvl_jax.losses.preference import LossSettings, PairLogProbs
from internvl_jax.task_arguments import LOSS_WEIGHTS, PreferenceConfig
from internvl_jax.tasks.preference import settings
from internvl_jax.tasks.preference.objective import PreferenceOptimization

RECORDED = json.loads((Path(__file__).parents[1] / "assets" / "dpo_loss.json").read_text())
CASES = RECORDED["cases"]


def case_name(case):
  return f"{case['loss_type']}-{case['label_smoothing']}"


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_are_trls_batch_after_batch(case, padding):
  """Padding between the pairs changes nothing, and the running mean goes on from batch to batch."""
  settings = LossSettings(case["beta"], case["label_smoothing"])
  running = preference.initial_running()
  for values, (losses, chosen, rejected) in zip(RECORDED["batches"], case["results"], strict=True):
    places = np.sort(np.random.default_rng(0).permutation(6 + padding)[:6])
    arrays = np.full((4, 6 + padding), np.nan, np.float32)
    arrays[:, places] = values
    weights = np.zeros(6 + padding, np.float32)
    weights[places] = 1 / 6
    logps = PairLogProbs(*map(jnp.asarray, arrays))
    running = preference.update_running(running, logps, weights, settings.beta)
    found = preference.pair_losses(case["loss_type"], logps, weights, settings, running)
    np.testing.assert_allclose(found[places], losses, rtol=1e-5)
    np.testing.assert_allclose(settings.beta * logps.chosen_ratio[places], chosen, rtol=1e-5)
    np.testing.assert_allclose(settings.beta * logps.rejected_ratio[places], rejected, rtol=1e-5)


def test_losses_of_a_configuration_have_its_weights():
  assert set(LOSS_WEIGHTS) <= set(preference.LOSSES)
  assert PreferenceConfig(loss_type="ipo, bco_pair", ipo_loss_weight=0.8).terms == (
    ("ipo", 0.8),
    ("bco_pair", 1.0),
  )
  assert PreferenceConfig(loss_type="ipo,sppo", loss_weights=(0.5, 2)).terms == (("ipo", 0.5), ("sppo", 2))
  assert PreferenceConfig(loss_type="sppo").terms == (("sppo", 1.0),), "a loss without a field of its own"
  for kind, name in LOSS_WEIGHTS.items():
    assert PreferenceConfig(loss_type=kind, **{name: 3.0}).terms == ((kind, 3.0),)


def test_a_new_loss_is_one_place(monkeypatch):
  """A line in the table: its name is allowed, weighted, smoothed or not, and computed by the objective."""

  def apo_zero(logps, weights, settings, running):
    return (
      1
      - jax.nn.sigmoid(settings.beta * logps.chosen_ratio)
      + jax.nn.sigmoid(settings.beta * logps.rejected_ratio)
    )

  line = preference.PreferenceLoss(function=apo_zero, paper="2408.06266", per_token=True)
  monkeypatch.setitem(preference.LOSSES, "apo_zero", line)
  config = TrainConfig()
  config.preference.loss_type, config.preference.loss_weights = "sigmoid,apo_zero", (0.75, 0.25)
  assert list(settings.SETTINGS.problems(config)) == []
  config.preference.label_smoothing = 0.1
  assert not config_checks.idle_settings(config)
  config.preference.loss_type, config.preference.loss_weights = "apo_zero", ()
  (said,) = config_checks.idle_settings(config)
  assert "label_smoothing" in said and "apo_zero" not in said
  logps = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -6.0, -4.0, -3.0)))
  objective = PreferenceOptimization(
    model=None,
    how=None,
    normalize_type="imagenet",
    terms=(("apo_zero", 0.25),),
    settings=LossSettings(0.5, 0.0),
  )
  total, terms = objective._weighted_losses(
    logps, jnp.array([[2.0, 3.0]]), jnp.ones(1), preference.initial_running()
  )
  expected = 1 - 1 / (1 + np.exp(-0.5 * 1.0)) + 1 / (1 + np.exp(0.5 * 1.0))
  np.testing.assert_allclose([total, terms["losses/apo_zero"]], [0.25 * expected, expected], rtol=1e-6)


def test_an_answer_as_good_as_the_other_is_not_preferred():
  """TRL's accuracy counts pairs whose chosen answer has the higher reward: one of these three."""
  zero = jnp.zeros(3)
  logps = PairLogProbs(jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, 2.0, 1.0]), zero, zero)
  objective = PreferenceOptimization(
    model=None,
    how=None,
    normalize_type="imagenet",
    terms=(("sigmoid", 0.8), ("bco_pair", 0.2)),
    settings=LossSettings(0.5, 0.0),
  )
  found = objective._rewards(logps, jnp.full(3, 1 / 3))
  np.testing.assert_allclose(found["rewards/accuracies"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(found["rewards/margins"], 0, atol=1e-6)
