"""Greedy answers with a key-value cache.

    prompts -> padded rows -> prefill: cache, first token -> chunks of tokens, one loop on the device each

The programs depend on lengths by few steps only (`rounded_up`), and not on how long answers may be.

Letters: B rows, S tokens of a padded prompt, T tiles, P tokens of a tile, N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import NO_IMAGE
from internvl_jax.eval.embedding import embed_rows, pool_tiles
from internvl_jax.eval.routing import TileRouter
from internvl_jax.models.decoder import KVCache
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL
from internvl_jax.parallel import rules
from internvl_jax.parallel.host_arrays import fetch

CHUNK = 64
"""The most tokens that a call of the device's loop decodes."""

STREAMED = 4
"""The most tokens that a stream waits for."""

ROOM = 256
"""Slots of a cache for new tokens; longer answers make it grow, by half of what it is."""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One question.

  Attributes:
    input_ids: token ids up to where the answer begins.
    tiles: uint8 [t, H, W, 3].
    number: of the question, which what is drawn for its answer depends on.
  """

  input_ids: np.ndarray
  tiles: np.ndarray
  number: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """Rows that are being answered.

  Attributes:
    cache: keys and values of prompts and of answers so far.
    offset: int, the first free slot.
    token: int [B], the next token of each row, which is not in the cache yet.
    position: int [B], its position.
    real: int [B], 0 of rows that only fill up the batch.
    done: bool [B], rows whose answer has ended.
    draw: what a subclass keeps of each row to choose tokens by; None of greedy ones.
  """

  cache: KVCache
  offset: jax.Array
  token: jax.Array
  position: jax.Array
  real: jax.Array
  done: jax.Array
  draw: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyDecoder:
  """Answers prompts in batches of one size, taking the likeliest token each time.

  Prompts are padded on the left (`rounded_up`), so that all rows' answers begin at the same slot of the cache; padding is a
  segment that no token sees. Where the parameters are sharded over a mesh, rows and heads are sharded over it, and the
  cache with them. Decoders that differ in `max_new_tokens` or `batch_size` alone share compiled programs.

  Attributes:
    model: the model's definition.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    image_token_id: id of <IMG_CONTEXT>.
    stop_ids: ids that end an answer, each by itself.
    max_new_tokens: N.
    batch_size: B; a smaller last batch is filled up.
    router: chooses the tiles that a Flash compresses; None: no tile is.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  image_token_id: int
  stop_ids: tuple[int, ...]
  max_new_tokens: int = dataclasses.field(compare=False)
  batch_size: int = dataclasses.field(compare=False)
  router: TileRouter | None = dataclasses.field(default=None, compare=False)

  def __call__(self, params: dict[str, jax.Array], prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """The answers' token ids, without the token that ended them."""
    answers: list[np.ndarray] = []
    for start in range(0, len(prompts), self.batch_size):
      group = prompts[start : start + self.batch_size]
      tokens = np.concatenate(list(self._chunks(params, group, CHUNK)), axis=1)
      answers += [self.cut(row) for row in tokens[: len(group)]]
    return answers

  def stream(self, params: dict[str, jax.Array], prompt: Prompt) -> Iterator[np.ndarray]:
    """The token ids of one answer, a few at a time, without the token that ends it."""
    for tokens in self._chunks(params, [prompt], STREAMED):
      yield self.cut(tokens[0])

  def _chunks(
    self, params: dict[str, jax.Array], group: Sequence[Prompt], longest: int
  ) -> Iterator[np.ndarray]:
    """Tokens [B, n] of a batch, n at most `longest`, until all answers have ended; after a stop token they mean nothing.

    Args:
      params: the weights.
      group: the prompts, B or fewer.
      longest: the most tokens at a time.
    """
    mesh, made = rules.mesh_of(params), 0
    with rules.scope(mesh):
      length, state = self._read(params, group)
    while made < self.max_new_tokens:
      count = min(self.max_new_tokens - made, longest)
      with rules.scope(mesh):
        if length + made + count > state.cache.slots:
          wanted = max(length + made + count, state.cache.slots * 3 // 2)
          state = _with_slots(state, slots=rounded_up(min(length + self.max_new_tokens, wanted)))
        state, tokens, ended = self._proceed(params, state, np.int32(count))
        tokens, (new, done) = fetch(tokens), fetch(ended)
      made += count
      yield tokens[:, :new]
      if done:
        return

  def begin(self, group: Sequence[Prompt]) -> Any:
    """What `choose` keeps of each row of a batch, before its first token."""
    del group

  def choose(self, logits: jax.Array, draw: Any) -> tuple[jax.Array, Any]:
    """The next token of each row, int [B], by its logits [B, V], and what is kept of the rows."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), draw

  def cut(self, row: np.ndarray) -> np.ndarray:
    """The token ids up to the first one that ends an answer."""
    ends = np.flatnonzero(np.isin(row, self.stop_ids))
    return row[: ends[0]] if len(ends) else row

  def unusual_ends(self, answers: Sequence[np.ndarray]) -> list[str]:
    """What there is to say of answers that say nothing, or that were stopped by their length; a line each."""
    empty = sum(not len(answer) for answer in answers)
    long = sum(len(answer) == self.max_new_tokens for answer in answers)
    lines = []
    if empty:
      lines.append(f"{empty} of {len(answers)} answers are empty: the model's first token ended them")
    if long:
      lines.append(
        f"{long} of {len(answers)} answers were cut at max_new_tokens={self.max_new_tokens}; raise it to read on"
      )
    return lines

  def _read(self, params: dict[str, jax.Array], group: Sequence[Prompt]) -> tuple[int, Decoding]:
    """The length S of a batch's padded rows, and the rows with their prompts read."""
    ids, tiles = [prompt.input_ids for prompt in group], [prompt.tiles for prompt in group]
    if self.router is not None and any(map(len, tiles)):
      ids, index, features = self.router(params, ids, tiles)
      program, images = self._prefill_routed, (self._pad(index, NO_IMAGE), features)
    else:
      program, images = self._prefill, (pool_tiles(tiles),)
    rows, segments = self._pad(ids, 0), self._pad([np.ones_like(row) for row in ids], 0)
    length = rows.shape[1]
    slots = rounded_up(length + min(self.max_new_tokens, ROOM))
    return length, program(params, rows, segments, *images, self.begin(group), slots=slots)

  def _pad(self, rows: Sequence[np.ndarray], empty: int) -> np.ndarray:
    """Numbers of rows, padded on the left to int32 [B, S]."""
    length = rounded_up(max(map(len, rows)))
    out = np.full((self.batch_size, length), empty, np.int32)
    for row, values in enumerate(rows):
      out[row, length - len(values) :] = values
    return out

  @functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
  def _prefill(self, params, input_ids, segment_ids, tiles, draw, *, slots: int) -> Decoding:
    """The rows with their prompts in a cache of so many slots, and the first token of their answers."""
    model = self.model.bind(params)
    x = embed_rows(
      model,
      self.how,
      input_ids,
      segment_ids,
      tiles,
      image_token_id=self.image_token_id,
      normalize_type=self.normalize_type,
    )
    return self._start(model, x, segment_ids, draw, slots)

  @functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
  def _prefill_routed(
    self, params, input_ids, segment_ids, image_index, features, draw, *, slots: int
  ) -> Decoding:
    """`_prefill` of rows whose tiles have features already: [1, Q, D], into which `image_index` [B, S] points."""
    model = self.model.bind(params)
    x = model.embed(input_ids, image_index, features, self.how)
    return self._start(model, x, segment_ids, draw, slots)

  def _start(self, model: InternVL, x: jax.Array, segment_ids: jax.Array, draw: Any, slots: int) -> Decoding:
    """The rows by their embeddings x [B, S, D]."""
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    hidden, cache = model.language_model.model.prefill(
      x, positions=positions, segment_ids=segment_ids, kernels=self.how.kernels
    )
    token, draw = self.choose(model.logits(hidden[:, -1:])[:, 0], draw)
    real = segment_ids.max(axis=1)
    return Decoding(
      cache=cache.with_slots(slots),
      offset=jnp.int32(segment_ids.shape[1]),
      token=token,
      position=positions[:, -1] + 1,
      real=real,
      # Rows that only fill up the batch are done from the start.
      done=real == 0,
      draw=draw,
    )

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def _proceed(self, params, state: Decoding, limit):
    """Decodes at most `limit` tokens, or until all rows are done.

    Returns:
      The rows, the tokens [B, CHUNK], and int [2]: how many of them were made, and whether all rows are done.
    """
    model, stop_ids = self.model.bind(params), jnp.array(self.stop_ids, jnp.int32)
    decoder = model.language_model.model

    def unfinished(carry):
      i, state, _ = carry
      return (i < limit) & ~jnp.all(state.done)

    def extend(carry):
      i, state, out = carry
      out = out.at[:, i].set(state.token)
      x = decoder.embed_tokens(state.token[:, None], dtype=self.how.dtype)
      hidden, cache = decoder.extend(
        x,
        state.cache,
        state.offset,
        positions=state.position[:, None],
        segment_ids=state.real[:, None],
        kernels=self.how.kernels,
      )
      token, draw = self.choose(model.logits(hidden[:, -1:])[:, 0], state.draw)
      state = dataclasses.replace(
        state,
        cache=cache,
        offset=state.offset + 1,
        token=token,
        position=state.position + 1,
        done=state.done | jnp.isin(state.token, stop_ids),
        draw=draw,
      )
      return i + 1, state, out

    out = jnp.full((state.token.shape[0], CHUNK), self.stop_ids[0], jnp.int32)
    made, state, out = jax.lax.while_loop(unfinished, extend, (jnp.int32(0), state, out))
    return state, out, jnp.stack([made, jnp.all(state.done).astype(jnp.int32)])


@functools.partial(jax.jit, static_argnames="slots")
def _with_slots(state: Decoding, *, slots: int) -> Decoding:
  return dataclasses.replace(state, cache=state.cache.with_slots(slots))


def rounded_up(length: int) -> int:
  """A length up to which rows are padded: a multiple of 32, and of ever larger powers of two.

  At most an eighth is added beyond 256, and a power of two has eight lengths: so many programs are compiled at most.
  """
  step = max(32, 1 << max((length - 1).bit_length() - 4, 0))
  return -(-length // step) * step
