"""Greedy answers with a key-value cache.

Letters: B rows, S tokens of a padded prompt, T tiles, P tokens of a tile, N new tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import NO_IMAGE
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.parallel import rules
from internvl_jax.parallel.host_arrays import fetch


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One question: token ids up to where the answer begins, and its tiles [t, H, W, 3] in uint8."""

  input_ids: np.ndarray
  tiles: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GreedyDecoder:
  """Answers prompts in batches of one size, taking the likeliest token each time.

  Prompts are padded on the left to a multiple of PROMPT_STEP, so that all rows' answers begin at the same
  slot of the cache; padding is a segment that no token sees. Where the parameters are sharded over a mesh, rows and heads
  are sharded over it, and the cache with them.

  Attributes:
    model: the model's definition.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    image_token_id: id of <IMG_CONTEXT>.
    stop_ids: ids that end an answer, each by itself.
    max_new_tokens: N.
    batch_size: B; a smaller last batch is filled up.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  image_token_id: int
  stop_ids: tuple[int, ...]
  max_new_tokens: int
  batch_size: int

  PROMPT_STEP = 32

  def __call__(self, params: dict[str, jax.Array], prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """The answers' token ids, without the token that ended them."""
    answers: list[np.ndarray] = []
    mesh = rules.mesh_of(params)
    for start in range(0, len(prompts), self.batch_size):
      group = prompts[start : start + self.batch_size]
      with rules.scope(mesh):
        tokens = fetch(self._generate(params, *self._pad(group)))
      answers += [self.cut(row) for row in tokens[: len(group)]]
    return answers

  def choose(self, logits: jax.Array) -> jax.Array:
    """The next token of each row, int [B], by its logits [B, V]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

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

  def _pad(self, group: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids and segment_ids [B, S], tiles [T, H, W, 3] of all rows in order."""
    longest = max(len(prompt.input_ids) for prompt in group)
    length = -(-longest // self.PROMPT_STEP) * self.PROMPT_STEP
    ids = np.zeros((self.batch_size, length), np.int32)
    segments = np.zeros((self.batch_size, length), np.int32)
    for row, prompt in enumerate(group):
      ids[row, length - len(prompt.input_ids) :] = prompt.input_ids
      segments[row, length - len(prompt.input_ids) :] = 1
    pool = np.concatenate([prompt.tiles for prompt in group])
    # Pools grow by powers of two, so that few programs are compiled.
    room = 1 << (len(pool) - 1).bit_length() if len(pool) else 0
    tiles = np.zeros((room, *pool.shape[1:]), np.uint8)
    tiles[: len(pool)] = pool
    return ids, segments, tiles

  @functools.partial(jax.jit, static_argnums=0)
  def _generate(self, params, input_ids, segment_ids, tiles):
    """The N tokens that follow each row [B, N]; after a stop token they mean nothing."""
    model = self.model.bind(params)
    B, S = input_ids.shape
    features = jnp.zeros((1, 0, 0), self.how.dtype)
    if tiles.shape[0]:
      encoded = model.extract_features(normalize_tiles(tiles, self.normalize_type), self.how)
      features = encoded.reshape(1, -1, encoded.shape[-1])
    is_image = (input_ids == self.image_token_id) & (segment_ids > 0)
    order = jnp.cumsum(is_image.reshape(-1)).reshape(B, S) - 1
    x = model.embed(input_ids, jnp.where(is_image, order, NO_IMAGE), features, self.how)

    decoder = model.language_model.model
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    cache = decoder.make_cache(B, S + self.max_new_tokens, self.how.dtype)
    run = functools.partial(decoder.extend, kernels=self.how.kernels)
    hidden, cache = run(x, cache, jnp.int32(0), positions=positions, segment_ids=segment_ids)
    first = self.choose(model.logits(hidden[:, -1:])[:, 0])
    real = segment_ids.max(axis=1)
    stop_ids = jnp.array(self.stop_ids, jnp.int32)

    def unfinished(carry):
      i, _, _, done, _ = carry
      return (i < self.max_new_tokens) & ~jnp.all(done)

    def extend(carry):
      i, token, cache, done, out = carry
      out = out.at[:, i].set(token)
      done = done | jnp.isin(token, stop_ids)
      x = decoder.embed_tokens(token[:, None], dtype=self.how.dtype)
      hidden, cache = run(
        x, cache, S + i, positions=(positions[:, -1] + 1 + i)[:, None], segment_ids=real[:, None]
      )
      token = self.choose(model.logits(hidden[:, -1:])[:, 0])
      return i + 1, token, cache, done, out

    out = jnp.full((B, self.max_new_tokens), self.stop_ids[0], jnp.int32)
    # Rows that only fill up the batch are done from the start.
    carry = (jnp.int32(0), first, cache, real == 0, out)
    return jax.lax.while_loop(unfinished, extend, carry)[-1]
