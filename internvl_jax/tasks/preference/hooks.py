"""What preference optimization does beside its steps: its reference policy and its held-out pairs."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from internvl_jax.callbacks import Callback
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.errors import UserError
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.storage.paths import path_of
from internvl_jax.tasks.precomputed import checksum, reader_in_order
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.reference import (
  PairEvaluation,
  PairScorer,
  ReferenceLogProbs,
  check_same_reference,
  check_start,
)
from internvl_jax.tasks.task import RunContext
from internvl_jax.trees import select


class PreferenceHooks:
  """The hooks of a run by `PreferenceOptimization`; see `tasks.task.Hooks`.

  Attributes:
    data: pairs, with what the reference says of them where that is computed before.
  """

  needs_start = True

  def __init__(self, data: PairData, context: RunContext):
    """Names what there will be; nothing is computed before `prepare`."""
    self._context, config = context, context.config
    self._config, self._source, self._watchdog = config, context.source, context.watchdog
    self._objective, self._mesh = context.objective, context.mesh
    self._make_loader, self._pairs = context.make_loader, data
    self._evaluation: PairEvaluation | None = None
    self._lookup: ReferenceLogProbs | None = None
    if config.preference.precompute_reference:
      assert config.training.output_dir is not None
      folder = (
        config.preference.reference_cache_dir or path_of(config.training.output_dir) / "reference_logps"
      )
      self._lookup = ReferenceLogProbs(path_of(folder))
    self.data = dataclasses.replace(data, reference=self._lookup)

  def before_weights(self, loader: TrainLoader) -> None:
    """Does nothing: the reference is the policy, whose weights are still to be read."""

  def source(self, loader: TrainLoader) -> TrainLoader:
    """The loader itself."""
    return loader

  def callbacks(self, log: RunLog) -> Sequence[Callback]:
    """None."""
    del log
    return ()

  def prepare(self, params: Mapping[str, jax.Array], loader: TrainLoader, *, resumes: bool) -> None:
    """Computes what the reference says, by the policy that has not taken a step, where that is asked for.

    Args:
      params: all parameters by path, as they are in the checkpoint.
      loader: of the run.
      resumes: the run goes on from a checkpoint.

    Raises:
      UserError: what is on disk is of another reference, or it cannot be computed once for all epochs.
    """
    asked = self._config.preference
    if self._lookup is not None:
      if varying := loader.first_varying():
        raise UserError(
          f"preference.precompute_reference=True: log-probabilities of {varying.dataset!r} would hold for one epoch only: "
          f"{varying.cause}; or set it to False, and hold the reference in memory"
        )
      scorer = self._scorer(self._config.data.meta_path, "reference")
      self._lookup.open_or_make(self._key(params, loader), lambda: scorer.score(params))
    else:
      check_same_reference(self._context, params, resumes=resumes)
    if asked.eval_meta_path is not None:
      scorer = self._scorer(asked.eval_meta_path, "held-out pairs")
      self._evaluation = PairEvaluation(scorer=scorer, reference=scorer.score(params), beta=asked.beta)

  def first_batch(self, params: dict[str, jax.Array], batch: PreferenceBatch) -> None:
    """Sees that policy and reference are one; see `reference.check_start`."""
    check_start(self._objective, params, batch, self._mesh)

  @property
  def evaluates(self) -> bool:
    """Whether there are held-out pairs."""
    return self._evaluation is not None

  def evaluate(self, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Judges the held-out pairs; empty where there are none."""
    return {} if self._evaluation is None else self._evaluation.metrics(params)

  def _key(self, params: Mapping[str, jax.Array], loader: TrainLoader) -> dict[str, Any]:
    dtype = self._objective.how.dtype
    reference = select(params, set(self._source.without_fresh_adapters().shapes))
    return {
      "checkpoint": checksum(reference, dtype),
      "model": hashlib.sha256(repr(self._source.stored_config).encode()).hexdigest()[:16],
      "data": loader.fingerprint(),
      "dtype": str(jax.numpy.dtype(dtype)),
      "samples": loader.num_samples,
    }

  def _scorer(self, meta_path: str | None, title: str) -> PairScorer:
    """Reads a mixture in order, every sample once."""
    return PairScorer(
      objective=self._objective,
      make_loader=reader_in_order(self._config, self._make_loader, meta_path, self._pairs),
      mesh=self._mesh,
      title=title,
      watchdog=self._watchdog,
    )
