"""The batch of distillation: numpy arrays, as `internvl_jax.batch` has them."""

from typing import Annotated, NamedTuple

from internvl_jax.batch import Array, Axes, TokenBatch


class DistillationBatch(NamedTuple):
  """One optimizer step's batch for distillation.

  K is the number of the teacher's tokens that are kept. Where there is no target, all three are 0.

  Attributes:
    rows: as for supervised fine-tuning.
    ids: int32 [A, R, S, K], the teacher's likeliest tokens in place of each target.
    logps: float16 [A, R, S, K], their log-probabilities at the run's temperature.
    tail: float32 [A, R, S], the log of the probability of all other tokens together.
  """

  rows: TokenBatch
  ids: Annotated[Array, Axes("int32", "A", "R", "S", "K")]
  logps: Annotated[Array, Axes("float16", "A", "R", "S", "K")]
  tail: Annotated[Array, Axes("float32", "A", "R", "S")]
