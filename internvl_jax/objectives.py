"""What a step minimizes: a batch and a model in, a sum that is already normalized out.

Letters: A micro-batches, R rows, S tokens, D data shards, K pairs of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import IGNORE_INDEX, PreferenceBatch, SFTBatch
from internvl_jax.losses import lm, preference, vocab_parallel
from internvl_jax.losses.preference import LossSettings, PairLogProbs, Running
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.models.moe import load_balancing_loss
from internvl_jax.parallel.rules import constrain, even_shares


class Outcome(NamedTuple):
  """What comes of a micro-batch beside its loss.

  Attributes:
    running: statistics that go on from batch to batch.
    terms: scalars for the log by name, already weighted: an optimizer step's are sums over its micro-batches.
  """

  running: Running
  terms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPass:
  """How a batch goes through the model, and how the losses of its rows are normalized.

  Attributes:
    model: the definition that parameters are bound to.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    drop_path_rates: stochastic depth of the ViT's layers, 0 where they are frozen; empty where all are 0.
    dropout: adapters drop some of their inputs.
    shards: data shards D, whose rows balance their routers' load apart.
    all_gather: see `normalized_weights`.
    router_loss_coef: weight of the routers' load-balancing loss; 0 is off.
    fused_loss: logits are made in chunks and never together; False is the plain way, to check it by.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  drop_path_rates: tuple[float, ...] = ()
  dropout: bool = False
  shards: int = 1
  all_gather: bool = False
  router_loss_coef: float = 0.0
  fused_loss: bool = True

  def initial_running(self) -> Running:
    """The statistics before the first batch: none, by default."""
    return {}

  def _normalized(self, weights: jax.Array) -> jax.Array:
    return normalized_weights(weights, shards=self.shards, all_gather=self.all_gather)

  def _hidden(
    self,
    model: InternVL,
    rows: SFTBatch,
    features: jax.Array,
    key: jax.Array | None,
    shared: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | float]:
    """Hidden states [R, S, E] of a micro-batch and its routers' loss; without a key nothing is dropped."""
    x = model.embed(rows.input_ids, rows.image_index, features, self.how)
    hidden, router = model.decode(
      x,
      self.how,
      positions=rows.positions,
      segment_ids=rows.segment_ids,
      shared=shared,
      dropout_key=key if self.dropout else None,
    )
    return hidden, self._router_loss(router, rows)

  def _router_loss(self, router: dict[str, jax.Array], rows: SFTBatch) -> jax.Array | float:
    """The load-balancing loss of a decoder with experts; 0 without."""
    if not router or not self.router_loss_coef:
      return 0.0
    tokens = jnp.sum(rows.segment_ids > 0, axis=1)
    load, prob = router["router_load"], router["router_prob"]
    return self.router_loss_coef * load_balancing_loss(load, prob, tokens, shards=self.shards)

  def _features(self, model: InternVL, tiles: jax.Array, key: jax.Array | None) -> jax.Array:
    """Features [D, T*P, E] of a pool of tiles [D, T, H, W, 3]; an empty pool runs no ViT, no key drops nothing."""
    D, T = tiles.shape[:2]
    if T == 0:
      return jnp.zeros((D, 0, 0), self.how.dtype)
    drop_path = dropout_key = None
    if key is not None:
      path_key, dropout_key = jax.random.split(key)
      drop_path = (np.array(self.drop_path_rates), path_key) if any(self.drop_path_rates) else None
    # Empty tiles at the end of each pool, where its devices would not run as many each.
    tiles = jnp.pad(tiles, ((0, 0), (0, even_shares(T) - T), *[(0, 0)] * 3))
    tiles = constrain(tiles.reshape(-1, *tiles.shape[2:]), "tiles", None, None, None)
    pixels = normalize_tiles(tiles, self.normalize_type)
    features = model.extract_features(
      pixels, self.how, drop_path=drop_path, dropout_key=dropout_key if self.dropout else None
    )
    return constrain(features.reshape(D, -1, features.shape[-1]), "rows", "tokens", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(ForwardPass):
  """Next-token cross-entropy on the answers."""

  def weights(self, batch: SFTBatch) -> jax.Array:
    """Normalized weights [A, R, S] of an optimizer batch's tokens."""
    return self._normalized(batch.loss_weight)

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: SFTBatch,
    weights: jax.Array,
    key: jax.Array,
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[jax.Array, Outcome]:
    """The weighted sum of a micro-batch's token losses.

    Args:
      params: all parameters by path.
      batch: one micro-batch: fields of SFTBatch without their leading A.
      weights: float32 [R, S], of `weights`.
      key: randomness of this micro-batch.
      running: see `Outcome`.
      share: weight of this micro-batch in what is not a sum over tokens.
    """
    model = self.model.bind(params)
    vision_key, text_key = jax.random.split(key)
    features = self._features(model, batch.tiles, vision_key)
    hidden, router_loss = self._hidden(model, batch, features, text_key)
    loss = self._language_loss(model, hidden, batch, weights) + share * router_loss
    return loss, Outcome(running, {})

  def _language_loss(self, model: InternVL, hidden, batch: SFTBatch, weights: jax.Array) -> jax.Array:
    if not self.fused_loss:
      return lm.cross_entropy(model.logits(hidden), batch.targets, weights)
    with jax.named_scope("lm_head"):
      kernel = model.language_model.output_embedding
      return lm.chunked_linear_cross_entropy(hidden, kernel, batch.targets, weights)


# --- Preference optimization --------------------------------------------------------------------------------

COPIES = "reference/"
"""What the paths of parameters begin with that the reference policy has copies of."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReferencePolicy:
  """The policy as it was at the start: copies of what trains, and all else shared with the policy.

  Attributes:
    model: its definition: the policy's, or that without the adapters that were attached for this run.
    shares_features: nothing of the ViT and the projector trains, so that the policy's features are also its own.
  """

  model: ModelDef[InternVL]
  shares_features: bool

  @property
  def parts(self) -> tuple[str, ...]:
    """The parts of the model that it runs."""
    return ("language_model",) if self.shares_features else ("vision_model", "mlp1", "language_model")

  def bind(self, params: Mapping[str, jax.Array]) -> InternVL:
    """The module, from all parameters by path, the copies among them."""
    return self.model.bind(
      {path: params[COPIES + path if COPIES + path in params else path] for path in self.model.shapes}
    )


class PreferenceWeights(NamedTuple):
  """Normalized weights of an optimizer batch.

  Attributes:
    pairs: float32 [A, R, K].
    tokens: float32 [A, R, S], of the chosen answers' tokens.
  """

  pairs: jax.Array
  tokens: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptimization(ForwardPass):
  """A weighted sum of preference losses, and the chosen answers' cross-entropy: MPO (arXiv:2411.10442).

  Attributes:
    terms: names of losses (`preference.LOSSES`) and their weights.
    settings: what the losses have in common.
    rpo_alpha: weight of the cross-entropy; None leaves it out.
    reference: the reference policy; None: its log-probabilities come with the batch.
    shares_prompts: the answers of a pair may share their prompt's tokens.
  """

  terms: tuple[tuple[str, float], ...]
  settings: LossSettings
  rpo_alpha: float | None = None
  reference: ReferencePolicy | None = None
  shares_prompts: bool = False

  def initial_running(self) -> Running:
    """BCO's running mean before the first batch."""
    return preference.initial_running()

  def weights(self, batch: PreferenceBatch) -> PreferenceWeights:
    """Normalized weights of an optimizer batch's pairs, and of the tokens of its chosen answers."""
    chosen = jnp.where(batch.rows.segment_ids % 2 == 1, batch.rows.loss_weight, 0.0)
    return PreferenceWeights(self._normalized(batch.pair_weight), self._normalized(chosen))

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: PreferenceBatch,
    weights: PreferenceWeights,
    key: jax.Array,
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[jax.Array, Outcome]:
    """The weighted sum of a micro-batch's losses; see `SupervisedFineTuning.loss`."""
    policy, rows = self.model.bind(params), batch.rows
    vision_key, text_key = jax.random.split(key)
    features = self._features(policy, rows.tiles, vision_key)
    hidden, router_loss = self._hidden(policy, rows, features, text_key, self._shared(batch))
    token_losses = self._token_losses(policy, hidden, rows)
    pairs = batch.pair_weight.shape[-1]
    reference = self._reference_logps(params, batch, features)
    logps = _pair_logps(_sums(token_losses, rows, pairs), reference)
    flat = weights.pairs.reshape(-1)
    running = preference.update_running(running, logps, flat, self.settings.beta)
    total, terms = self._weighted_losses(logps, _lengths(rows, pairs), flat, running)
    terms |= self._rewards(logps, flat)
    if self.rpo_alpha is not None:
      terms["nll_loss"] = jnp.sum(token_losses * weights.tokens)
      total += self.rpo_alpha * terms["nll_loss"]
    return total + share * router_loss, Outcome(running, jax.lax.stop_gradient(terms))

  def drift(self, params: Mapping[str, jax.Array], batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """How far the policy is from the reference on a micro-batch, nothing being dropped.

    Returns:
      DPO's loss, and the largest |log-ratio| of an answer relative to 1 + |its log-probability|.
    """
    reference = self._reference_logps(params, batch, None)
    logps = _pair_logps(self.answer_logps(params, batch), reference)
    real = batch.pair_weight.reshape(-1) > 0
    losses = preference.pair_losses(
      "sigmoid", logps, real, LossSettings(self.settings.beta, 0.0), preference.initial_running()
    )
    ratios = jnp.stack([logps.chosen_ratio, logps.rejected_ratio])
    relative = jnp.abs(ratios) / (1 + jnp.abs(jnp.stack([logps.chosen, logps.rejected])))
    mean = jnp.sum(jnp.where(real, losses, 0.0)) / jnp.maximum(jnp.sum(real), 1)
    return mean, jnp.max(jnp.where(real, relative, 0.0))

  def answer_logps(self, params: Mapping[str, jax.Array], batch: PreferenceBatch) -> jax.Array:
    """The policy's log-probabilities [R, K, 2] of a micro-batch's answers, nothing being dropped."""
    return self._answer_logps(self.model.bind(params), batch, None)

  def _reference_logps(self, params, batch: PreferenceBatch, features: jax.Array | None) -> jax.Array:
    """The reference's log-probabilities [R, K, 2]; `features` are the policy's, where it has them already."""
    if self.reference is None:
      # What is not known of padding must not get into gradients; of a real pair, it makes the step non-finite.
      return jnp.where(batch.pair_weight[..., None] > 0, batch.reference, 0.0)
    shared = features if self.reference.shares_features else None
    return jax.lax.stop_gradient(self._answer_logps(self.reference.bind(params), batch, shared))

  def _answer_logps(self, model: InternVL, batch: PreferenceBatch, features: jax.Array | None) -> jax.Array:
    rows = batch.rows
    if features is None:
      features = self._features(model, rows.tiles, None)
    hidden, _ = self._hidden(model, rows, features, None, self._shared(batch))
    return _sums(self._token_losses(model, hidden, rows), rows, batch.pair_weight.shape[-1])

  def _shared(self, batch: PreferenceBatch) -> jax.Array | None:
    return batch.shared if self.shares_prompts else None

  def _token_losses(self, model: InternVL, hidden: jax.Array, rows: SFTBatch) -> jax.Array:
    """-log p [R, S] of the tokens to predict, 0 where there is none."""
    if not self.fused_loss:
      return lm.token_losses(model.logits(hidden), rows.targets)
    with jax.named_scope("lm_head"):
      return vocab_parallel.linear_token_losses(hidden, model.language_model.output_embedding, rows.targets)

  def _weighted_losses(self, logps: PairLogProbs, lengths, weights, running):
    """The weighted sum of all kinds, and the sum of each."""
    means = logps.per_token(lengths[:, 0], lengths[:, 1])
    total, terms = jnp.float32(0), {}
    for kind, factor in self.terms:
      values = means if preference.LOSSES[kind].per_token else logps
      losses = preference.pair_losses(kind, values, weights, self.settings, running)
      terms[f"losses/{kind}"] = jnp.sum(jnp.where(weights > 0, losses, 0.0) * weights)
      total += factor * terms[f"losses/{kind}"]
    return total, terms

  def _rewards(self, logps: PairLogProbs, weights: jax.Array) -> dict[str, jax.Array]:
    """TRL's metrics of a batch, under its names."""
    beta = self.settings.beta
    chosen, rejected = beta * logps.chosen_ratio, beta * logps.rejected_ratio
    values = {
      "rewards/chosen": chosen,
      "rewards/rejected": rejected,
      "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
      "rewards/margins": chosen - rejected,
      "logps/chosen": logps.chosen,
      "logps/rejected": logps.rejected,
    }
    return {name: jnp.sum(jnp.where(weights > 0, value, 0.0) * weights) for name, value in values.items()}


def _sums(token_losses: jax.Array, rows: SFTBatch, pairs: int) -> jax.Array:
  """Log-probabilities [R, K, 2] of the chosen and rejected answers, from token losses [R, S]."""
  return -_by_answer(token_losses, rows, pairs)


def _lengths(rows: SFTBatch, pairs: int) -> jax.Array:
  """Supervised tokens of each answer, [R*K, 2]."""
  return _by_answer((rows.targets != IGNORE_INDEX).astype(jnp.float32), rows, pairs).reshape(-1, 2)


def _by_answer(values: jax.Array, rows: SFTBatch, pairs: int) -> jax.Array:
  """Sums [R, K, 2] of values [R, S] over the segments of each row."""
  values, segments = (constrain(x, "rows", None) for x in (values, rows.segment_ids))
  add = lambda value, segment: jnp.zeros(1 + 2 * pairs).at[segment].add(value)  # noqa: E731
  return jax.vmap(add)(values, segments)[:, 1:].reshape(-1, pairs, 2)


def _pair_logps(policy: jax.Array, reference: jax.Array) -> PairLogProbs:
  """Pairs end to end, from [R, K, 2] each."""
  policy, reference = policy.reshape(-1, 2), reference.reshape(-1, 2)
  return PairLogProbs(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])


# --- Weights ------------------------------------------------------------------------------------------------


def normalized_weights(loss_weight: jax.Array, *, shards: int, all_gather: bool) -> jax.Array:
  """Divides token weights so that the optimizer batch's loss is their plain weighted sum.

  Args:
    loss_weight: float32 [A, R, S].
    shards: data shards D that the rows are dealt to.
    all_gather: one denominator for the whole optimizer batch (exact under any split). Otherwise each shard's
      micro-batch has its own and the A*D means are averaged, as the reference's data parallel ranks do; one
      without any supervised token adds 0 to that average.
  """
  A, R, S = loss_weight.shape
  if all_gather:
    return loss_weight / jnp.maximum(jnp.sum(loss_weight), jnp.finfo(jnp.float32).tiny)
  parts = loss_weight.reshape(A, shards, R // shards, S)
  total = jnp.sum(parts, axis=(2, 3), keepdims=True)
  parts = jnp.where(total > 0, parts / jnp.where(total > 0, total, 1.0), 0.0) / (A * shards)
  return parts.reshape(A, R, S)
