"""Prompts and their answers as rows to learn from: pure numpy.

Letters: A micro-batches, R rows, S tokens of a row, G answers of a prompt, L the longest answer.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch

_SHORTEST = 256
"""Rows shorter than twice this have one length."""


class Answers(NamedTuple):
  """What was sampled for the prompts of a step.

  Attributes:
    tokens: int32 [A, R, G, L]; those behind an answer's end mean nothing.
    logps: float32 [A, R, G, L], the log-probability of each token when it was sampled.
    lengths: int [A, R, G], tokens of each answer, the one that ends it among them; 0 in rows without a prompt.
    ended: bool [A, R, G], there is a token that ends it.
  """

  tokens: np.ndarray
  logps: np.ndarray
  lengths: np.ndarray
  ended: np.ndarray

  @classmethod
  def of(
    cls,
    tokens: Int[np.ndarray, "A R G L"],
    logps: Float[np.ndarray, "A R G L"],
    present: Bool[np.ndarray, "A R"],
    stop_ids: tuple[int, ...],
  ) -> "Answers":
    """Finds where answers end.

    Args:
      tokens: int32 [A, R, G, L]. logps: float32 [A, R, G, L].
      present: bool [A, R], rows that have a prompt.
      stop_ids: tokens that end an answer.
    """
    stops = np.isin(tokens, stop_ids)
    ended = stops.any(-1) & present[..., None]
    lengths = np.where(stops.any(-1), stops.argmax(-1) + 1, tokens.shape[-1])
    return cls(tokens, logps, np.where(present[..., None], lengths, 0), ended)


class AnswerRows(NamedTuple):
  """Rows with answers; see `batch.GrpoBatch` for what the fields are."""

  rows: TokenBatch
  parent: np.ndarray
  owner: np.ndarray
  sampled: np.ndarray


def longest_row(prompt: int, generations: int, longest: int) -> int:
  """The most tokens of a row: a prompt of so many, and answers that are all as long as may be."""
  return _rounded_up(prompt + longest + (generations - 1) * (1 + longest))


def _rounded_up(tokens: int) -> int:
  """A length that kernels and meshes can cut."""
  multiple = 128 if tokens > 8 * 128 else 8
  return -(-tokens // multiple) * multiple


def row_lengths(prompt: int, generations: int, longest: int) -> tuple[int, ...]:
  """The lengths of rows with prompts of at most so many tokens, ascending: the longest, and its halves.

  Few, since a program is compiled for each.
  """
  lengths = [longest_row(prompt, generations, longest)]
  while (half := _rounded_up(lengths[-1] // 2)) >= max(_SHORTEST, prompt):
    lengths.append(half)
  return tuple(reversed(lengths))


def fitting_length(prompt: int, answers: Int[np.ndarray, "*prompts G"], longest: int) -> int:
  """The length of rows that hold answers of so many tokens, int [..., G], behind prompts of at most `prompt`."""
  generations = answers.shape[-1]
  needed = prompt + int(answers.sum(-1).max()) + generations - 1
  return next(length for length in row_lengths(prompt, generations, longest) if length >= needed)


def answer_rows(prompts: TokenBatch, answers: Answers, length: int) -> AnswerRows:
  """Lays out the answers behind their prompts.

  prompt a b c, answers x y and z  ->  tokens   a b c x y c z
                                       targets  . . x y . z .        segments  1 1 1 1 1 2 2
                                       owner    0 0 1 1 0 2 0        parent    1 1 0 0 0 1 1

  Args:
    prompts: of this host's rows.
    answers: of the same rows.
    length: S of the rows to make.
  """
  A, R, _ = prompts.input_ids.shape
  ids, positions, segments, parent, owner = np.zeros((5, A, R, length), np.int32)
  targets = np.full((A, R, length), IGNORE_INDEX, np.int32)
  image_index = np.full((A, R, length), NO_IMAGE, np.int32)
  sampled = np.zeros((A, R, length), np.float32)
  for a, r in np.ndindex(A, R):
    n, at = int((prompts.segment_ids[a, r] > 0).sum()), 0
    for g, size in enumerate(answers.lengths[a, r].tolist() if n else ()):
      # The first answer has the whole prompt before it, the others its last token, which predicts their first.
      begin = 0 if g == 0 else n - 1
      whole = np.concatenate([prompts.input_ids[a, r, begin:n], answers.tokens[a, r, g, :size]])
      here, first = slice(at, at + len(whole)), at + n - 1 - begin
      ids[a, r, here], segments[a, r, here] = whole, g + 1
      positions[a, r, here] = begin + np.arange(len(whole))
      parent[a, r, at : at + n - 1 if g == 0 else at + len(whole)] = 1
      if g == 0:
        image_index[a, r, :n] = prompts.image_index[a, r, :n]
      told = slice(first, first + size)
      targets[a, r, told], owner[a, r, told] = answers.tokens[a, r, g, :size], g + 1
      sampled[a, r, told] = answers.logps[a, r, g, :size]
      at += len(whole)
  rows = TokenBatch(
    input_ids=ids,
    targets=targets,
    loss_weight=(owner > 0).astype(np.float32),
    positions=positions,
    segment_ids=segments,
    image_index=image_index,
    tiles=prompts.tiles,
  )
  return AnswerRows(rows, parent, owner, sampled)
