"""Where batches of reinforcement come from: which step's random numbers a source asks for."""

import types

import numpy as np
import pytest

from internvl_jax.task_arguments import GrpoConfig
from internvl_jax.tasks.grpo.source import Parts, RolloutSource


class AskedError(Exception):
  """Tells the step that answers were asked for."""


class Loader:
  """Has prompts, and a place among them."""

  def __init__(self):
    self.place = 0

  def next(self, params):
    del params
    return types.SimpleNamespace(index=np.zeros((1, 1), np.int32))

  def set_state(self, state):
    self.place = state["next_step"]


def answering(params, prompts, step):
  del params, prompts
  raise AskedError(step)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("told", [True, False])
def test_a_source_that_goes_on_draws_as_in_the_step_it_has_come_to(iterations, told):
  """Not as in the first, also from the state of a loader alone."""
  grpo = GrpoConfig(reward_funcs=("exact_match",), num_iterations=iterations)
  parts = Parts(grpo=grpo, chat=None, answering=answering, rewards=())
  source = RolloutSource(Loader(), parts, max_steps=20)
  source.prompts.get_state = dict
  with pytest.raises(AskedError, match=r"^0$"):
    source.next({})
  source.set_state({"next_step": 3, **({"steps": 3 * iterations} if told else {})})
  with pytest.raises(AskedError, match=rf"^{3 * iterations}$"):
    source.next({})
  assert source.prompts.place == 3
