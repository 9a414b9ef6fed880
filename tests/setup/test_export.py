"""Which weights a run exports, and what it says of them."""

import contextlib
from types import SimpleNamespace

import pytest

from internvl_jax.setup.export import average_remark, exported_weights
from internvl_jax.setup.progress import best_params
from tests.test_fields_training import configured, set_up

EMA = {"optim_args": "ema_decay=0.5"}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_what_is_said_of_the_weights(kept, average):
  settings = EMA if kept else {}
  config, setup = configured(**settings), set_up(**settings)
  config.checkpoint.export_average = average
  said, remark = exported_weights(config, setup, 7), average_remark(config, setup)
  if not kept:
    assert said is None
    assert (remark or "").startswith("checkpoint.export_average=False has no effect") == (not average)
  else:
    assert remark is None and (
      "after step 7" in said if average else said.startswith("the last weights, of step 7")
    )


@pytest.mark.parametrize("average", [True, False])
def test_the_best_model_has_the_weights_that_are_asked_for(average):
  state = SimpleNamespace(model_params=lambda *, average: {"average": average})
  config = configured()
  config.checkpoint.export_average = average
  run = SimpleNamespace(
    config=config,
    setup=SimpleNamespace(abstract_state=lambda: None),
    watchdog=SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
  )
  checkpointer = SimpleNamespace(restore=lambda like, *, step: (state, {}, {}))
  assert best_params(run, checkpointer, 3) == {"average": average}
