"""Sampled answers: what is left of logits is what transformers leaves, and draws follow their probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import Prompt
from internvl_jax.eval.sampling import Sampling, SamplingDecoder, make_decoder, processed
from internvl_jax.models.internvl import Execution
from tests.eval.test_greedy import IMAGE, NEW, ROWS, VOCAB, parts, prompts

CASES = [
  {"temperature": 0.7},
  {"temperature": 1.0, "top_k": 5},
  {"temperature": 1.3, "top_p": 0.8},
  {"temperature": 0.5, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4},
  {"repetition_penalty": 1.7},
  {"temperature": 1.0, "top_p": 0.01},
  {"temperature": 1.0, "top_k": 1000},
]
WIDTH = 50


def decoder_of(**settings):
  return SamplingDecoder(
    model=None,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=IMAGE,
    stop_ids=(VOCAB,),
    max_new_tokens=NEW,
    batch_size=3,
    sampling=Sampling(**settings),
    vocab_size=WIDTH,
  )


@pytest.mark.torch
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_logits_are_processed_as_in_transformers(settings):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process as theirs

  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, WIDTH)).astype("f4") * 3
  answered = rng.integers(0, WIDTH, (3, 4))
  draw = decoder_of(**settings).begin([])
  if draw.seen is not None:
    draw = draw._replace(seen=draw.seen.at[np.arange(3)[:, None], answered].set(True))
  ours = np.asarray(processed(jnp.asarray(logits), draw))
  how = Sampling(**settings)
  steps = [theirs.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)]
  steps += [theirs.TemperatureLogitsWarper(how.temperature)] if how.temperature else []
  steps += [theirs.TopKLogitsWarper(how.top_k)] if how.top_k else []
  steps += [theirs.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
  found = torch.tensor(logits)
  for step in steps:
    found = step(torch.tensor(answered), found)
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(found.numpy()))
  np.testing.assert_allclose(ours, found.numpy(), rtol=1e-6)


def test_tokens_are_drawn_by_their_probabilities():
  """A batch's rows, its number and the token's number all draw anew; the same seed draws the same."""
  decoder = dataclasses.replace(decoder_of(temperature=1.0, top_k=3, seed=5), batch_size=2000)
  logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (2000, 1))
  decoder = dataclasses.replace(decoder, vocab_size=4)
  draw = decoder.begin([Prompt(None, None, number) for number in range(2000)])
  first, draw = decoder.choose(logits, draw)
  second, _ = decoder.choose(logits, draw)
  shares = np.bincount(np.asarray(first), minlength=4) / 2000
  np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
  agree = float((first == second).mean())
  assert abs(agree - (shares**2).sum()) < 0.04  # As often as independent draws do.
  later = decoder.begin([Prompt(None, None, number) for number in range(1, 2001)])
  np.testing.assert_array_equal(decoder.choose(logits, later)[0][:-1], first[1:])


def test_answers_are_those_of_their_seed_and_do_not_depend_on_the_batch():
  definition, params = parts("dense")
  params = jax.device_put(params, jax.devices()[0])
  options = {
    "model": definition,
    "how": Execution(),
    "normalize_type": "imagenet",
    "image_token_id": IMAGE,
    "stop_ids": (VOCAB,),
    "max_new_tokens": NEW,
  }

  def answers(batch_size=ROWS, **settings):
    decoder = make_decoder(Sampling(**settings), VOCAB, batch_size=batch_size, **options)
    asked = [dataclasses.replace(prompt, number=row) for row, prompt in enumerate(prompts())]
    return [row.tolist() for row in decoder(params, asked)]

  warm = answers(temperature=3.0, seed=1)
  assert warm == answers(batch_size=2, temperature=3.0, seed=1)
  assert warm != answers(temperature=3.0, seed=2)
  greedy = answers()
  assert answers(temperature=0.5, top_k=1) == greedy != warm
  once = answers(repetition_penalty=1e6)
  assert all(len(set(row)) == NEW for row in once) and once != greedy


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"temperature": -1.0}, "temperature=-1.0: must be 0 or more"),
    ({"temperature": float("nan")}, "temperature=nan: must be"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
    ({"top_p": 0.5}, "no effect at temperature=0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
  ],
)
def test_values_that_cannot_be(settings, message):
  with pytest.raises(UserError, match=message):
    Sampling(**settings)
