"""Prompts and their answers as rows: what is fed is the prompt, what is learned are the answers, and each sees its own."""

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.tasks.grpo.prompts import prompt_lengths
from internvl_jax.tasks.grpo.rows import Answers, answer_rows, fitting_length, longest_row, row_lengths

X = IGNORE_INDEX
STOP, G, L = 9, 3, 4


def prompts_of(lengths, S=8):
  """Rows [1, R] of prompts; the first token of each shows an image."""
  R = len(lengths)
  real = (np.arange(S) < np.array(lengths)[:, None])[None]
  ids = np.where(real, 10 + np.arange(S) + 100 * np.arange(R)[:, None], 0).astype(np.int32)
  return TokenBatch(
    input_ids=ids,
    targets=np.full((1, R, S), X, np.int32),
    loss_weight=np.zeros((1, R, S), np.float32),
    positions=np.where(real, np.arange(S), 0).astype(np.int32),
    segment_ids=real.astype(np.int32),
    image_index=np.where(real & (np.arange(S) == 0), np.arange(R)[:, None], NO_IMAGE).astype(np.int32),
    tiles=np.zeros((1, 1, 1, 4, 4, 3), np.uint8),
  )


def answers_of(rows):
  """Answers [1, R, G, L] from lists of tokens, with log-probabilities that tell them apart."""
  tokens = np.zeros((1, len(rows), G, L), np.int32)
  for r, group in enumerate(rows):
    for g, answer in enumerate(group):
      tokens[0, r, g, : len(answer)] = answer
  present = np.array([[bool(group) for group in rows]])
  return Answers.of(tokens, -np.arange(tokens.size, dtype="f4").reshape(tokens.shape), present, (STOP,))


def test_a_prompt_is_what_lies_before_the_last_answer():
  targets = np.array([[[X, 5, 6, X, X, 7, 8, X], [X, X, X, X, X, X, X, X], [5, 6, X, X, X, X, X, X]]])
  assert prompt_lengths(targets).tolist() == [[6, 0, 1]]


def test_an_answer_ends_with_the_token_that_ends_it():
  answers = answers_of([[[1, STOP, 3], [1, 2, 3, 4], [STOP]], []])
  assert answers.lengths.tolist() == [[[2, 4, 1], [0, 0, 0]]]
  assert answers.ended.tolist() == [[[True, False, True], [False] * 3]]


def test_every_answer_goes_on_from_its_prompt():
  prompts, answers = (
    prompts_of([5, 0, 1]),
    answers_of([[[1, STOP], [1, 2, 3, 4], [STOP]], [], [[4], [5, STOP], [6]]]),
  )
  found = answer_rows(prompts, answers, 32)
  for r, n in ((0, 5), (2, 1)):
    ids, positions, segments = (
      getattr(found.rows, name)[0, r] for name in ("input_ids", "positions", "segment_ids")
    )
    prompt = ids[(segments == 1) & (found.parent[0, r] == 1)]
    for g in range(G):
      own = (segments == g + 1) & ((found.parent[0, r] == 0) if g == 0 else (found.parent[0, r] == 1))
      size = answers.lengths[0, r, g]
      whole = np.concatenate([prompts.input_ids[0, r, :n], answers.tokens[0, r, g, :size]])
      np.testing.assert_array_equal(np.concatenate([prompt, ids[own]]), whole)
      np.testing.assert_array_equal(positions[own], np.arange(n - 1, n + size))
      told = found.owner[0, r] == g + 1
      assert own[told].all() and told.sum() == size
      np.testing.assert_array_equal(found.rows.targets[0, r, told], answers.tokens[0, r, g, :size])
      np.testing.assert_array_equal(found.sampled[0, r, told], answers.logps[0, r, g, :size])
    assert found.rows.image_index[0, r].max() == found.rows.image_index[0, r, 0] == r
  assert not found.rows.segment_ids[0, 1].any() and not found.owner[0, 1].any()
  assert ((found.owner > 0) == (found.rows.targets != X)).all()


def test_rows_have_few_lengths():
  assert row_lengths(56, 8, 3) == (longest_row(56, 8, 3),) == (88,)
  lengths = row_lengths(1024, 8, 512)
  assert lengths == (1408, 2688, 5248)
  assert fitting_length(1024, np.full((2, 8), 512), 512) == 5248
  assert fitting_length(1024, np.full((2, 8), 10), 512) == 1408
