"""The batch of preference optimization: numpy arrays, as `internvl_jax.batch` has them."""

from typing import Annotated, NamedTuple

from internvl_jax.batch import Array, Axes, TokenBatch


class PreferenceBatch(NamedTuple):
  """One optimizer step's batch for preference optimization.

  K, the most pairs that a row has room for, is fixed by the length of rows: see `pairs_of_row`.

  Attributes:
    rows: as for supervised fine-tuning. Each answer of a pair is a segment, behind the whole prompt; both point at the
      same features of the pool. `loss_weight` is 1 at every supervised token. Where a pair shares its prompt, the prompt
      is in the segment of the chosen answer only, and the other begins with a copy of its last token, whose target
      there is the rejected answer's first token.
    pair_weight: float32 [A, R, K], 1 where the row has such a pair, before normalization; else 0.
    pair_index: int32 [A, R, K], index of the sample in the mixture; -1 where there is none.
    reference: float32 [A, R, K, 2], log-probabilities of the chosen and the rejected answer by the reference policy,
      where they were computed before; NaN elsewhere.
    answers: int32 [A, R, K, 2], the segments of the chosen and of the rejected answer; 0 where there is no pair.
    parent: int32 [A, R, S], whose prompt a token may attend to besides its own segment, and which tokens are such a
      prompt; see `models.attention.Mask`. All 0 where prompts are not shared.
  """

  rows: TokenBatch
  pair_weight: Annotated[Array, Axes("float32", "A", "R", "K")]
  pair_index: Annotated[Array, Axes("int32", "A", "R", "K")]
  reference: Annotated[Array, Axes("float32", "A", "R", "K", 2)]
  answers: Annotated[Array, Axes("int32", "A", "R", "K", 2)]
  parent: Annotated[Array, Axes("int32", "A", "R", "S")]


def pairs_of_row(length: int) -> int:
  """K for rows of so many tokens: a pair has at least four, a token to read and one to predict in each answer."""
  return max(1, length // 4)
