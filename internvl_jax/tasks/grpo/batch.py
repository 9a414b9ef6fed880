"""Batches of reinforcement by rewards: prompts, and rows of prompts with their answers.

Letters as in `internvl_jax.batch`; G answers of a prompt.
"""

from typing import Annotated, NamedTuple

from internvl_jax.batch import Array, Axes, TokenBatch


class PromptBatch(NamedTuple):
  """The prompts of one optimizer step, one a row.

  Attributes:
    rows: tokens up to where the answer begins; there are no targets. Rows of samples that were lost are empty.
    index: int32 [A, R], index of the sample in the mixture; -1 where there is none.
  """

  rows: TokenBatch
  index: Annotated[Array, Axes("int32", "A", "R")]


class GrpoBatch(NamedTuple):
  """One optimizer step's batch: in every row a prompt and its answers.

  Attributes:
    rows: each answer is a segment. The prompt is in that of the first; the others begin with a copy of its last token,
      whose target there is the answer's first token. All tokens of answers are targets, with a loss weight of 1.
    parent: int32 [A, R, S], which tokens are a prompt, and whose prompt a token sees; see `models.attention.Mask`.
    owner: int32 [A, R, S], the answer that the token to predict belongs to, from 1; 0 for none.
    advantages: float32 [A, R, G], of the answers.
    present: float32 [A, R, G], 1 where there is an answer, else 0.
    kept: float32 [A, R, G], 1 where it is learned from, else 0.
    sampled: float32 [A, R, S], log-probabilities of the tokens to predict when they were sampled; 0 elsewhere.
    old: float32 [A, R, S], the same by the step's own forward pass with the weights that sampled them; 0 where rows are
      learned from once, so that nobody asks.
  """

  rows: TokenBatch
  parent: Annotated[Array, Axes("int32", "A", "R", "S")]
  owner: Annotated[Array, Axes("int32", "A", "R", "S")]
  advantages: Annotated[Array, Axes("float32", "A", "R", "G")]
  present: Annotated[Array, Axes("float32", "A", "R", "G")]
  kept: Annotated[Array, Axes("float32", "A", "R", "G")]
  sampled: Annotated[Array, Axes("float32", "A", "R", "S")]
  old: Annotated[Array, Axes("float32", "A", "R", "S")]


class RewardBatch(NamedTuple):
  """Rewards of answers by F functions, on their way to all hosts; float32 [A, R, G, F], NaN where there is none."""

  rewards: Annotated[Array, Axes("float32", "A", "R", "G", "F")]
