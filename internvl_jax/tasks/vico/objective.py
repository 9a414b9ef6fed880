"""The objectives of ViCO's stages: rows with compressed tiles are to say what the same rows say without.

Letters: A micro-batches, R rows, S tokens, D data shards, T tiles of a pool, E width, W the window.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from internvl_jax.batch import IGNORE_INDEX, TokenBatch
from internvl_jax.losses import divergence
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass, Outcome, Running
from internvl_jax.parallel.rules import constrain
from internvl_jax.parallel.sharded_gather import take_features
from internvl_jax.tasks.preference.policy import ReferencePolicy
from internvl_jax.tasks.vico.batch import FlashBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Comparison(ForwardPass):
  """What the rows with compressed tiles say, compared with what the full ones do."""

  def divergences(
    self,
    model: InternVL,
    hidden: Float[Array, "R S E"],
    teacher: InternVL,
    teacher_hidden: Float[Array, "R S E"],
    batch: FlashBatch,
  ) -> Float[Array, "R S"]:
    """KL(teacher || model) [R, S] of the next token after each of a micro-batch's, 0 where none is supervised.

    Args:
      model: the bound model.
      hidden: of its rows.
      teacher: what is to be equalled.
      teacher_hidden: of the full rows.
      batch: the micro-batch.
    """
    # The same token of the full row: a lookup in rows that are pools of their own.
    theirs = jax.lax.stop_gradient(take_features(teacher_hidden, batch.place))
    if self.fused_loss:
      with jax.named_scope("lm_head"):
        ours_kernel, their_kernel = (each.language_model.output_embedding for each in (model, teacher))
        found = divergence.linear_token_divergences(hidden, ours_kernel, theirs, their_kernel)
    else:
      found = divergence.token_divergences(
        model.logits(hidden), jax.lax.stop_gradient(teacher.logits(theirs))
      )
    return jnp.where(batch.rows.targets != IGNORE_INDEX, found, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(_Comparison):
  """The mean divergence of the model's answers with compressed tiles from those of the model at the start without.

  Attributes:
    teacher: the model at the start.
    shares_vision: nothing of the ViT trains, so that its hidden states are the teacher's, too.
  """

  teacher: ReferencePolicy
  shares_vision: bool

  def weights(self, batch: FlashBatch) -> Float[Array, "A R S"]:
    """Normalized weights [A, R, S] of an optimizer batch's tokens."""
    return self.normalized(batch.rows.loss_weight)

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: FlashBatch,
    weights: Float[Array, "R S"],
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's divergences; see `SupervisedFineTuning.loss`."""
    model, teacher = self.model.bind(params), self.teacher.bind(params)
    vision_key, text_key = jax.random.split(key)
    (D, T), tiles = batch.rows.tiles.shape[:2], batch.rows.tiles
    features = theirs = jnp.zeros((D, 0, 0), self.how.dtype)
    if T:
      hidden = self.encoded(model, tiles, vision_key)
      features = self.projected(model, hidden, D, both=True)
      seen = hidden if self.shares_vision else self.encoded(teacher, tiles, None)
      theirs = self.projected(teacher, seen, D, both=False)
    hidden, router_loss = self.hidden(model, batch.rows, features, text_key)
    full = _full(batch)
    teacher_hidden, _ = self.hidden(teacher, full, jax.lax.stop_gradient(theirs), None)
    found = self.divergences(model, hidden, teacher, teacher_hidden, batch)
    loss = jnp.sum(found * weights)
    return loss + share * router_loss, Outcome(running, jax.lax.stop_gradient({"kl": loss}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing(_Comparison):
  """Cross-entropy of the router's choice for tiles of which it is known what compressing them changes.

  Of a sample, one tile is compressed. What that changes is the mean divergence of the sample's answers from those without
  it, by the same frozen model. The tile is to be compressed where that is less than a percentile of the last ones.

  Attributes:
    percentile: from 0 to 100.
    window: W, how many of the last are kept.
  """

  percentile: float
  window: int

  def initial_running(self) -> Running:
    """No tile was seen: a window [W] of infinities, and where its next entry goes."""
    return {"changes": jnp.full(self.window, jnp.inf, jnp.float32), "next_change": jnp.float32(0)}

  def weights(self, batch: FlashBatch) -> Float[Array, "A D T"]:
    """Normalized weights [A, D, T] of an optimizer batch's compressed tiles."""
    return self.normalized(batch.tile_weight)

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: FlashBatch,
    weights: Float[Array, "D T"],
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's cross-entropies; see `SupervisedFineTuning.loss`."""
    del key, share
    model, (D, T) = self.model.bind(params), batch.rows.tiles.shape[:2]
    if T == 0:
      return jnp.float32(0), Outcome(running, {})
    seen = self.encoded(model, batch.rows.tiles, None)
    both = self.projected(model, seen, D, both=True)
    full = self.projected(model, seen, D, both=False)
    hidden, _ = self.hidden(model, batch.rows, both, None)
    full_hidden, _ = self.hidden(model, _full(batch), full, None)
    found = self.divergences(model, hidden, model, full_hidden, batch)
    # Every device keeps the same window.
    changes = constrain(jax.lax.stop_gradient(changes_by_tile(found, batch)), None, None)
    running = remembered(running, changes, constrain(weights > 0, None, None))
    threshold = percentile_of(running["changes"], self.percentile)
    logits = model.gate(seen).reshape(D, -1, 2)[:, :T]
    keeps = changes >= threshold
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), keeps[..., None].astype(jnp.int32), axis=-1)
    loss = -jnp.sum(jnp.where(weights > 0, picked[..., 0], 0.0) * weights)
    right = (logits[..., 1] > logits[..., 0]) == keeps
    terms = {
      "router_accuracy": jnp.sum(right * weights),
      "compressible": jnp.sum(~keeps * weights),
      "change": jnp.sum(jnp.where(weights > 0, changes, 0.0) * weights),
    }
    return loss, Outcome(running, jax.lax.stop_gradient(terms))


def _full(batch: FlashBatch) -> TokenBatch:
  """The full rows as a batch, whose targets nobody reads."""
  return batch.rows._replace(**batch.full._asdict())


def changes_by_tile(divergences: Float[Array, "R S"], batch: FlashBatch) -> Float[Array, "D T"]:
  """The mean divergence over the supervised tokens of the sample that each of a micro-batch's tiles belongs to."""
  D, (R, S) = batch.tile_row.shape[0], divergences.shape
  real = (batch.rows.targets != IGNORE_INDEX).astype(jnp.float32)
  add = lambda values, segments: jnp.zeros(S + 1).at[segments].add(values)  # noqa: E731
  segments = constrain(batch.rows.segment_ids, "rows", None)
  sums, counts = (
    jax.vmap(add)(constrain(x, "rows", None), segments).reshape(D, R // D, S + 1) for x in (divergences, real)
  )
  means = sums / jnp.maximum(counts, 1.0)
  return jax.vmap(lambda pool, row, segment: pool[row, segment])(means, batch.tile_row, batch.tile_segment)


def remembered(running: Running, changes: Float[Array, "D T"], real: Bool[Array, "D T"]) -> Running:
  """The window with the last of what tiles changed, the newest in the places of the oldest; what is not finite is left out."""
  window, start = running["changes"], running["next_change"].astype(jnp.int32)
  values, real = changes.reshape(-1), (real & jnp.isfinite(changes)).reshape(-1)
  number, count = jnp.cumsum(real) - 1, jnp.sum(real)
  # Of more than fit, the last ones; places beyond the window are left out.
  fits = real & (number >= count - window.size)
  place = jnp.where(fits, (start + number) % window.size, window.size)
  return {
    "changes": window.at[place].set(values, mode="drop"),
    "next_change": ((start + count) % window.size).astype(jnp.float32),
  }


def percentile_of(window: Float[Array, " W"], percentile: float) -> Float[Array, ""]:
  """A percentile, interpolated linearly, of the entries of a window that are finite; infinite if none is."""
  count = jnp.sum(jnp.isfinite(window))
  rank = percentile / 100 * jnp.maximum(count - 1, 0)
  low, high = (jnp.sort(window)[bound(rank).astype(jnp.int32)] for bound in (jnp.floor, jnp.ceil))
  return jnp.where(high > low, low + (rank - jnp.floor(rank)) * (high - low), low)
