"""Sampled answers: tokens are drawn from what temperature, top-k, top-p and a penalty of repetitions leave of the logits.

The rules and their order are transformers' (`generation/logits_process.py`): repetition, temperature, top-k, top-p.

Letters: B rows, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import GreedyDecoder, Prompt

_NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are drawn. The defaults are the likeliest token each time.

  Attributes:
    temperature: what logits are divided by; 0 takes the likeliest token.
    top_k: only so many of the likeliest tokens are drawn from; 0: all.
    top_p: only the fewest likeliest tokens whose probabilities sum to this are drawn from; 1: all.
    repetition_penalty: logits of tokens that the answer has are divided by it where positive, else multiplied
      (arXiv:1909.05858); 1: none. As in the reference, the prompt's tokens do not count.
    seed: of the draws. A question's answer depends on it, on the question and on its number, not on what is asked beside.

  Raises:
    UserError: a value that cannot be.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    checks = (
      ("temperature", self.temperature >= 0, "0 or more"),
      ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
    )
    for name, right, wanted in checks:
      value = getattr(self, name)
      if not (right and math.isfinite(value)):
        raise UserError(f"{name}={value}: must be {wanted}")
    if not self.temperature and (self.top_k or self.top_p < 1):
      raise UserError("top_k and top_p have no effect at temperature=0; set a temperature, e.g. 0.7")

  @property
  def is_greedy(self) -> bool:
    """Whether it is the likeliest token each time."""
    return not self.temperature and self.repetition_penalty == 1


class Draw(NamedTuple):
  """What rows are drawn by; numbers that are None ask for nothing, and the program has no part for them.

  Attributes:
    keys: [B], randomness of each row.
    step: int, tokens drawn so far.
    seen: bool [B, V], the tokens that each answer has.
    penalty, temperature, top_k, top_p: see `Sampling`.
  """

  keys: jax.Array
  step: jax.Array
  seen: jax.Array | None
  penalty: jax.Array | None
  temperature: jax.Array | None
  top_k: jax.Array | None
  top_p: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDecoder(GreedyDecoder):
  """Answers prompts with tokens that are drawn. Decoders that differ in numbers alone share compiled programs.

  Attributes:
    sampling: how tokens are drawn.
    vocab_size: V.
  """

  sampling: Sampling = dataclasses.field(compare=False)
  vocab_size: int

  def begin(self, group: Sequence[Prompt]) -> Draw:
    """The rows before their first token."""
    how, rows = self.sampling, self.batch_size
    numbers = jnp.array([prompt.number for prompt in group] + [0] * (rows - len(group)))

    def number(value: float, neutral: float) -> jax.Array | None:
      return None if value == neutral else jnp.float32(value)

    return Draw(
      keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(how.seed), numbers),
      step=jnp.int32(0),
      seen=None if how.repetition_penalty == 1 else jnp.zeros((rows, self.vocab_size), bool),
      penalty=number(how.repetition_penalty, 1),
      temperature=number(how.temperature, 0),
      top_k=None if not how.top_k else jnp.int32(min(how.top_k, self.vocab_size)),
      top_p=number(how.top_p, 1),
    )

  def choose(self, logits: jax.Array, draw: Draw) -> tuple[jax.Array, Draw]:
    """The next token of each row, int [B], drawn by its logits [B, V]."""
    left = processed(logits, draw)
    if draw.temperature is None:
      token = jnp.argmax(left, axis=-1)
    else:
      keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, draw.step)
      token = jax.vmap(jax.random.categorical)(keys, left)
    token = token.astype(jnp.int32)
    seen = None if draw.seen is None else draw.seen.at[jnp.arange(len(token)), token].set(True)
    return token, draw._replace(step=draw.step + 1, seen=seen)


def processed(logits: jax.Array, draw: Draw) -> jax.Array:
  """The logits [B, V] that tokens are drawn by, minus infinity where one must not be drawn."""
  if draw.seen is not None and draw.penalty is not None:
    penalized = jnp.where(logits < 0, logits * draw.penalty, logits / draw.penalty)
    logits = jnp.where(draw.seen, penalized, logits)
  if draw.temperature is not None:
    logits = logits / draw.temperature
  if draw.top_k is None and draw.top_p is None:
    return logits
  rising = jnp.sort(logits, axis=-1)
  if draw.top_k is not None:
    lowest = jnp.take(rising, rising.shape[-1] - draw.top_k, axis=-1)[:, None]
    logits, rising = (jnp.where(x < lowest, _NEVER, x) for x in (logits, rising))
  if draw.top_p is not None:
    # What lies below the fewest likeliest tokens that sum to top_p; the likeliest always stays.
    out = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= 1 - draw.top_p
    lowest = jnp.min(jnp.where(out.at[:, -1].set(False), jnp.inf, rising), axis=-1, keepdims=True)
    logits = jnp.where(logits < lowest, _NEVER, logits)
  return logits


def make_decoder(sampling: Sampling, vocab_size: int, **options: Any) -> GreedyDecoder:
  """The decoder of a way to draw tokens; `options` are the fields of `GreedyDecoder`."""
  if sampling.is_greedy:
    return GreedyDecoder(**options)
  return SamplingDecoder(sampling=sampling, vocab_size=vocab_size, **options)
