"""Samples answers to the prompts of a step, by the weights that train and on their mesh: one program on the devices.

    prompts -> prefill, each prompt once -> a loop: one more token of all G answers of every prompt

The answers to a prompt share its keys and values: they go on side by side, and see the prompt and themselves.

Letters: k micro-batches, R rows, S tokens of a prompt, B = k*R prompts, G answers of a prompt, L the longest answer, V
vocabulary, D data shards.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from internvl_jax.models.decoder import KVCache
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass
from internvl_jax.parallel import rules
from internvl_jax.tasks.grpo.batch import PromptBatch
from internvl_jax.tasks.grpo.draws import Draws

_PROMPT = 1
"""The segment of prompts; answers have those that follow."""


class Given(NamedTuple):
  """What is known of answers before they are sampled: how they begin.

  Attributes:
    tokens: int32 [k, R, G, L].
    lengths: int32 [k, R, G], of the beginnings.
  """

  tokens: Any
  lengths: Any

  @classmethod
  def nothing(cls, *shape: int) -> "Given":
    """Of answers of a shape [k, R, G, L]."""
    return cls(np.zeros(shape, np.int32), np.zeros(shape[:-1], np.int32))


class _Asked(NamedTuple):
  """What does not change while answers are sampled.

  Attributes:
    lengths: int [B], tokens of the prompts.
    keys: [B, G], the randomness of each answer.
    given: how answers begin, [B, G, ...].
  """

  lengths: Int[Array, " B"]
  keys: Key[Array, "B G"]
  given: Given


class _Growing(NamedTuple):
  """Answers that are being sampled.

  Attributes:
    length: int, tokens that all of them have.
    cache: keys and values.
    token: int [B, G], the last one, which is not in the cache yet.
    done: bool [B, G], answers that have ended.
    tokens: int [B, G, L]. logps: float32 [B, G, L].
  """

  length: Int[Array, ""]
  cache: KVCache
  token: Int[Array, "B G"]
  done: Array
  tokens: Int[Array, "B G L"]
  logps: Float[Array, "B G L"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sampler:
  """Samples groups of answers.

  Attributes:
    objective: how forward passes are computed.
    mesh: the devices.
    stop_ids: tokens that end an answer.
    longest: L.
    draws: how tokens are drawn.
    temperature: what logits are divided by before.
  """

  objective: ForwardPass
  mesh: jax.sharding.Mesh | None
  stop_ids: tuple[int, ...]
  longest: int
  draws: Draws
  temperature: float = 1.0

  def __call__(
    self, params: Mapping[str, jax.Array], prompts: PromptBatch, step: int, given: Given
  ) -> tuple[Int[Array, "k R G L"], Float[Array, "k R G L"]]:
    """The tokens of the answers, and their log-probabilities; what lies behind an answer's end means nothing.

    Args:
      params: all parameters by path.
      prompts: k micro-batches on the devices.
      step: whose answers they are.
      given: how they begin; the rest is drawn.
    """
    return self.program(dict(params), prompts, jnp.int32(step), given)

  @functools.cached_property
  def program(self) -> Callable[..., Any]:
    """The program, compiled once for every shape of prompts."""
    return jax.jit(self.sample)

  def sample(
    self, params: dict[str, jax.Array], prompts: PromptBatch, step: Int[Array, ""], given: Given
  ) -> Any:
    """What `__call__` returns; under `jax.jit`."""
    with rules.scope(self.mesh):
      return self._sample(_in_compute_dtype(params, self.objective), prompts, step, given)

  def _sample(
    self, params: dict[str, jax.Array], prompts: PromptBatch, step: Int[Array, ""], given: Given
  ) -> Any:
    rows, k, shards = prompts.rows, prompts.index.shape[0], prompts.rows.tiles.shape[1]

    def joined(x: jax.Array) -> jax.Array:
      """From [k, R, ...] to [B, ...], the rows of a data shard next to each other."""
      parts = x.reshape(k, shards, -1, *x.shape[2:]).swapaxes(0, 1)
      return parts.reshape(-1, *x.shape[2:])

    def apart(x: jax.Array) -> jax.Array:
      parts = x.reshape(shards, k, -1, *x.shape[1:]).swapaxes(0, 1)
      return parts.reshape(k, -1, *x.shape[1:])

    x = jax.lax.map(functools.partial(self._embed, params), rows)
    model = self.objective.model.bind(params)
    asked = _Asked(
      lengths=jnp.sum(joined(rows.segment_ids) > 0, axis=1),
      keys=self.draws.keys(joined(prompts.index), step),
      given=jax.tree.map(joined, given),
    )
    answers = self._first(model, joined(x), joined(rows.positions), joined(rows.segment_ids), asked)
    extend = functools.partial(self._extend, params, asked, rows.input_ids.shape[-1])
    answers = jax.lax.while_loop(
      lambda so_far: (so_far.length < self.longest) & ~jnp.all(so_far.done), extend, answers
    )
    return apart(answers.tokens), apart(answers.logps)

  def _embed(self, params: dict[str, jax.Array], rows: Any) -> jax.Array:
    """Embeds the prompts [R, S] of a micro-batch."""
    model = self.objective.model.bind(params)
    features = self.objective.features(model, rows.tiles, None)
    return model.embed(rows.input_ids, rows.image_index, features, self.objective.how)

  def _first(
    self,
    model: InternVL,
    x: Float[Array, "B S E"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    asked: _Asked,
  ) -> _Growing:
    """The prompts in a cache that has room for the answers, and the first token of each."""
    kernels = self.objective.how.kernels
    hidden, cache = model.language_model.model.prefill(
      x, positions=positions, segment_ids=segments, kernels=kernels
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(asked.lengths - 1, 0)[:, None, None], axis=1)
    logits = jnp.repeat(model.logits(last), self.draws.generations, axis=1)
    token, logp = self._next(logits, asked, jnp.int32(0))
    empty = jnp.zeros((*token.shape, self.longest))
    slots = x.shape[1] + (self.longest - 1) * self.draws.generations
    return _Growing(
      length=jnp.int32(1),
      cache=cache.with_slots(slots),
      token=token,
      done=self._ends(token) | (asked.lengths == 0)[:, None],
      tokens=empty.astype(jnp.int32).at[:, :, 0].set(token),
      logps=empty.at[:, :, 0].set(logp),
    )

  def _extend(
    self,
    params: dict[str, jax.Array],
    asked: _Asked,
    prompt: int,
    answers: _Growing,
  ) -> _Growing:
    """One more token of every answer, behind prompts in so many slots of the cache."""
    model, how, lengths = self.objective.model.bind(params), self.objective.how, asked.lengths
    decoder, done = model.language_model.model, answers.length
    B, G = answers.token.shape
    segments = jnp.where(lengths[:, None] > 0, _PROMPT + 1 + jnp.arange(G), 0)
    hidden, cache = decoder.extend(
      decoder.embed_tokens(answers.token, dtype=how.dtype),
      answers.cache,
      prompt + (done - 1) * G,
      positions=jnp.broadcast_to(lengths[:, None] + done - 1, (B, G)),
      segment_ids=segments,
      prompt=_PROMPT,
      kernels=how.kernels,
    )
    token, logp = self._next(model.logits(hidden), asked, done)
    return _Growing(
      length=done + 1,
      cache=cache,
      token=token,
      done=answers.done | self._ends(token),
      tokens=jax.lax.dynamic_update_index_in_dim(answers.tokens, token, done, axis=2),
      logps=jax.lax.dynamic_update_index_in_dim(answers.logps, logp, done, axis=2),
    )

  def _ends(self, token: Int[Array, "B G"]) -> Array:
    return jnp.isin(token, jnp.array(self.stop_ids, jnp.int32))

  def _next(
    self, logits: Float[Array, "B G V"], asked: _Asked, place: Int[Array, ""]
  ) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
    """The next token of each answer, and its log-probability at the temperature, of all tokens."""
    logits = logits if self.temperature == 1 else logits / self.temperature
    drawn = self.draws.token(logits, asked.keys, place)
    given = jax.lax.dynamic_index_in_dim(asked.given.tokens, place, axis=2, keepdims=False)
    token = jnp.where(place < asked.given.lengths, given, drawn)
    picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1)


def answered_at_once(wanted: int | None, accumulation: int, rows: int) -> int:
  """k, the micro-batches whose prompts are answered at once: an equal part of all of a step's.

  Args:
    wanted: prompts of a data shard that are answered at once at most; None: all.
    accumulation: micro-batches of a step.
    rows: of a data shard and micro-batch.
  """
  most = accumulation if wanted is None else max(1, min(accumulation, wanted // rows))
  return next(k for k in range(most, 0, -1) if accumulation % k == 0)


def _in_compute_dtype(params: dict[str, jax.Array], objective: ForwardPass) -> dict[str, jax.Array]:
  """Kernels and tables in the dtype that they are multiplied in: rounded once, not for every token.

  What the model reads in float32 (norms, biases, routers) stays as it is.
  """
  axes, dtype = objective.model.axes, objective.how.dtype

  def cast(path: str, value: jax.Array) -> jax.Array:
    names = [name for name in axes.get(path, ()) if name != "layers"]
    return value.astype(dtype) if len(names) > 1 and None not in names else value

  return {path: cast(path, value) for path, value in params.items()}
