"""After which steps something is due, and which scored step is the best."""

import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.intervals import Best, Due, best_of, steps_of


@pytest.mark.parametrize(
  ("interval", "total", "steps"), [(5, 30, 5), (0.1, 25, 3), (0.001, 20, 1), (1, 9, 1)]
)
def test_intervals_below_one_are_shares_rounded_up(interval, total, steps):
  assert steps_of(interval, total) == steps


def steps(method, total=10, epoch_of=lambda step: step / 4, **training):
  due = Due(training=TrainingArguments(**training), total_steps=total, epoch_of=epoch_of)
  return [step for step in range(1, total + 1) if getattr(due, method)(step)]


def test_what_is_due_when():
  assert steps("logs", logging_steps=4) == [4, 8, 10]  # The last step always is.
  assert steps("logs", logging_steps=4, logging_first_step=True) == [1, 4, 8, 10]
  assert steps("saves", save_strategy="steps", save_steps=0.3) == [3, 6, 9]
  assert steps("saves", save_strategy="epoch") == [4, 8, 10]
  assert steps("saves", save_strategy="no") == []
  assert steps("scores", eval_strategy="steps", eval_steps=None, logging_steps=5) == [5, 10]
  assert steps("scores", eval_strategy="steps", eval_steps=4) == [4, 8]


def test_nothing_is_due_before_the_first_step():
  due = Due(training=TrainingArguments(eval_strategy="steps"), total_steps=4, epoch_of=float)
  assert not (due.saves(0) or due.scores(0) or due.logs(0))


def test_the_best_is_the_first_of_equals_among_those_saved():
  history = [
    {"step": step, "eval_x": value} for step, value in ((1, 0.9), (2, 0.5), (3, 0.7), (4, 0.7), (5, 0.5))
  ]
  history += [{"step": 6, "eval_x": float("nan")}, {"step": 7, "loss": 0.0}]
  assert Best("eval_x", greater=True).of(history, {2, 3, 4, 5, 6, 7}) == (3, 0.7)
  assert Best("eval_x", greater=False).of(history, {1, 2, 3, 4, 5, 6}) == (2, 0.5)
  assert Best("eval_x", greater=True).of(history, {6, 7}) is None


def test_what_the_best_is_known_by():
  def best(first="accuracy", **settings):
    return best_of(TrainingArguments(load_best_model_at_end=True, **settings), first=first)

  assert best() == Best("eval_accuracy", greater=True)
  assert best(first=None) == Best("eval_rewards/accuracies", greater=True)
  assert best(metric_for_best_model="loss") == Best("eval_loss", greater=False)
  assert best("docs/loss") == Best("eval_docs/loss", greater=False)
  assert best(metric_for_best_model="vqa/loss_red") == Best("eval_vqa/loss_red", greater=False)
  assert best("docs/anls") == Best("eval_docs/anls", greater=True)
  assert best(metric_for_best_model="eval_loss", greater_is_better=True) == Best("eval_loss", greater=True)
  assert best_of(TrainingArguments(), first="accuracy") is None
