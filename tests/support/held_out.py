"""Held-out sets, without files."""

import numpy as np

from internvl_jax.eval.scoring import Prompt, score
from internvl_jax.eval.sets import EvalSet

NO_PROMPT = Prompt(np.zeros(0, np.int32), np.zeros((0, 0, 0, 3), np.uint8))


def make_set(*metrics, label="", group_field=None):
  """A set with these metrics, or accuracy."""
  return EvalSet(
    name="test", label=label, metrics=metrics or ("accuracy",), group_field=group_field, entry={}
  )


def score_set(questions, answers, *metrics, losses=(), start=None, **options):
  """The scores of answers to the questions of such a set."""
  return score(make_set(*metrics, **options), questions, answers, losses, start)
