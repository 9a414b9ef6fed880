"""Schedules agree with Hugging Face's Trainer."""

import math

import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.optim.learning_rate import make_schedule


def schedule(total=100, **settings):
  return make_schedule(TrainingArguments(learning_rate=2.0, **settings), total)


def test_schedules_at_their_landmarks():
  linear = schedule(lr_scheduler_type="linear", warmup_ratio=0.095)  # ceil(9.5) = 10 steps
  assert [linear(step) for step in (0, 5, 10, 55, 100)] == [0.0, 1.0, 2.0, 1.0, 0.0]
  cosine = schedule(lr_scheduler_type="cosine", warmup_steps=10, warmup_ratio=0.5)  # steps win over the ratio
  assert cosine(10) == 2.0 and cosine(55) == pytest.approx(1.0) and cosine(100) == 0.0
  assert schedule(lr_scheduler_type="constant", warmup_steps=10)(0) == 2.0
  warm = schedule(lr_scheduler_type="constant_with_warmup", warmup_steps=10)
  assert (warm(5), warm(50)) == (1.0, 2.0)
  restarts = schedule(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs='{"num_cycles": 2}')
  assert restarts(0) == restarts(50) == 2.0 and restarts(25) == pytest.approx(1.0)
  floor = schedule(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}')
  assert floor(100) == pytest.approx(0.2)
  polynomial = schedule(lr_scheduler_type="polynomial", lr_scheduler_kwargs='{"lr_end": 0.5, "power": 2.0}')
  assert polynomial(50) == pytest.approx(1.5 / 4 + 0.5) and polynomial(101) == 0.5
  inverse = schedule(lr_scheduler_type="inverse_sqrt", warmup_steps=25)
  assert inverse(100) == pytest.approx(2.0 / math.sqrt(4))


def test_wrong_schedules_are_named():
  with pytest.raises(UserError, match="'cosin'"):
    schedule(lr_scheduler_type="cosin")
  with pytest.raises(UserError, match="num_cycle"):
    schedule(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"num_cycle": 2}')
  with pytest.raises(UserError, match="one of min_lr and min_lr_rate"):
    schedule(lr_scheduler_type="cosine_with_min_lr")
