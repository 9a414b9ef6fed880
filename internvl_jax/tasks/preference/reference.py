"""What policies say of preference pairs: the reference's log-probabilities, kept on disk, and held-out pairs.

The reference policy is the policy before its first step. Its log-probabilities are computed by that one, in one
pass over the data; a folder keeps them together with what they depend on:

    <folder>/key.json     checkpoint, data, dtype and number of samples
             logps.npy    float32 [samples of the mixture, 2]: chosen and rejected; NaN of samples that are lost
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, Int
from tqdm import tqdm

from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.errors import UserError
from internvl_jax.outputs import write_json
from internvl_jax.parallel import batches, distributed, rules
from internvl_jax.storage.paths import AnyPath, path_of, write_whole
from internvl_jax.tasks.precomputed import WAIT_SECONDS, KeyedFolder, checksum
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.objective import PreferenceOptimization
from internvl_jax.tasks.task import RunContext
from internvl_jax.trees import select
from internvl_jax.watchdog import Watchdog

_LOGPS = "logps.npy"

DRIFT = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 3e-2}
"""How far, relative to 1 + |log-probability|, rounding may take the reference from the policy that it is: rows of
other samples, and another program, round sums over an answer's tokens differently."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScorer:
  """Computes what a policy says of all pairs of a mixture.

  Attributes:
    objective: how log-probabilities are computed.
    make_loader: makes a loader that reads the mixture in order; an epoch of it has every sample once.
    mesh: the devices.
    title: of the progress bar.
    watchdog: is told of every batch.
  """

  objective: PreferenceOptimization
  make_loader: Callable[[], TrainLoader]
  mesh: jax.sharding.Mesh
  title: str
  watchdog: Watchdog

  def score(self, params: Mapping[str, jax.Array]) -> Float[np.ndarray, "samples 2"]:
    """Log-probabilities float32 [samples of the mixture, 2]; NaN of samples that are lost. All hosts have all."""
    loader = self.make_loader()
    found = np.full((loader.num_samples, 2), np.nan, np.float32)
    steps = math.ceil(loader.schedule.rows_per_epoch / loader.global_batch)
    for _ in tqdm(range(steps), desc=self.title, unit="batch", disable=not distributed.is_first()):
      with self.watchdog.phase(self.title):
        batch = batches.place_batch(next(loader), self.mesh)
        indices, logps = jax.tree.map(np.asarray, self._program(dict(params), batch))
      found[indices[indices >= 0]] = logps[indices >= 0]
    loader.close()
    return found

  @functools.cached_property
  def _program(self) -> Callable[..., Any]:
    """Compiled once for all passes over the mixture."""
    whole = rules.replicated(self.mesh)
    return jax.jit(self._score_batch, out_shardings=(whole, whole))

  def _score_batch(self, params: Mapping[str, jax.Array], batch: PreferenceBatch):
    with rules.scope(self.mesh):
      logps = jax.lax.map(lambda micro: self.objective.answer_logps(params, micro), batch)
      return batch.pair_index, logps


def check_same_reference(context: RunContext, params: Mapping[str, jax.Array], *, resumes: bool) -> None:
  """Remembers what the reference in memory was made of, so that a run which goes on has the same.

  Args:
    context: of the run.
    params: all parameters by path, as they are in the checkpoint that the run began with.
    resumes: the run goes on.

  Raises:
    UserError: it has another.
  """
  config, dtype = context.config, context.objective.how.dtype
  path = path_of(config.training.output_dir or "") / "reference.json"
  now = checksum(select(params, set(context.source.without_fresh_adapters().shapes)), dtype)
  if resumes and distributed.first_says(path.exists()):
    if (then := json.loads(path.read_text(encoding="utf-8"))["checkpoint"]) != now:
      raise UserError(
        f"{path}: this run's reference policy had the checksum {then}, but {config.model.model_name_or_path} has "
        f"{now} in {jax.numpy.dtype(dtype)}; name the checkpoint that the run began with, or begin anew with "
        "training.overwrite_output_dir=True"
      )
  elif distributed.is_first():
    write_json(path, {"checkpoint": now})


# --- On disk ------------------------------------------------------------------------------------------------


class ReferenceLogProbs:
  """The reference's log-probabilities in a folder that all hosts see, or in a bucket."""

  def __init__(self, folder: AnyPath):
    """Names the folder; nothing is read before `open_or_make`."""
    self.folder = folder
    self._kept = KeyedFolder(folder=folder, setting="preference.reference_cache_dir", model="reference")
    self._logps: np.ndarray | None = None

  def __call__(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Log-probabilities float32 [n, 2] of the samples with these indices in the mixture.

    Raises:
      UserError: they are not known.
    """
    assert self._logps is not None, "open_or_make() comes first"
    found = np.asarray(self._logps[indices])
    if np.isnan(found).any():
      lost = indices[np.isnan(found).any(axis=1)]
      raise UserError(
        f"{self.folder}: has no log-probabilities of {len(lost)} of {len(indices)} pairs, the first being sample "
        f"{lost[0]} of the mixture: it could not be read when they were computed; delete the folder to compute them anew"
      )
    return found

  def open_or_make(
    self, key: Mapping[str, Any], compute: Callable[[], Float[np.ndarray, "samples 2"]]
  ) -> None:
    """Opens what is there, or computes and writes it; all hosts together.

    Args:
      key: what the numbers depend on, as JSON values.
      compute: makes the array.

    Raises:
      UserError: what is there is of another checkpoint, other data or other settings, or damaged; or not all hosts
        see the folder.
    """
    if self._kept.has():
      self._kept.check_seen()
      self._kept.check(key)
      logging.info("Reference log-probabilities: those in %s", self.folder)
    else:
      logps = compute()
      if distributed.is_first():
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(content := io.BytesIO(), logps)
        write_whole(self.folder / _LOGPS, content.getvalue())
        self._kept.write_key(key)
      logging.info("Reference log-probabilities of %d pairs: written to %s", len(logps), self.folder)
      distributed.barrier("the reference's log-probabilities are written", seconds=WAIT_SECONDS)
      self._kept.check_seen()
    self._logps = self._open(key["samples"])

  def _open(self, samples: int) -> np.ndarray:
    path = self.folder / _LOGPS
    try:
      logps = (
        np.load(path, mmap_mode="r") if isinstance(path, Path) else np.load(io.BytesIO(path.read_bytes()))
      )
    except (OSError, ValueError, EOFError) as error:
      raise UserError(f"{path}: damaged or missing ({error}); {self._kept.anew}") from None
    if logps.shape != (samples, 2):
      raise UserError(f"{path}: has the shape {logps.shape}, expected {(samples, 2)}; {self._kept.anew}")
    return logps


# --- At the start, and on held-out pairs --------------------------------------------------------------------


def check_start(
  objective: PreferenceOptimization,
  params: Mapping[str, jax.Array],
  batch: PreferenceBatch,
  mesh: jax.sharding.Mesh,
) -> None:
  """Sees on a run's first batch that policy and reference are one, nothing being dropped.

  Raises:
    UserError: they are not.
  """

  @functools.partial(jax.jit, out_shardings=rules.replicated(mesh))
  def drift(params: Mapping[str, jax.Array], batch: PreferenceBatch):
    with rules.scope(mesh):
      first = jax.tree.map(lambda leaf: leaf[0], batch)
      return objective.drift(params, first)

  loss, relative = map(float, drift(dict(params), batches.place_batch(batch, mesh)))
  if not relative <= DRIFT[jnp.dtype(objective.how.dtype)]:
    raise UserError(
      f"the policy is not the reference before the first step: DPO's loss is {loss:.7f}, not ln 2 = {math.log(2):.7f}, "
      f"and an answer's log-probability differs by {relative:.2g} of itself; the reference's log-probabilities are of "
      "another model: delete their folder (preference.reference_cache_dir) to compute them anew"
    )
  logging.info("Policy and reference agree: DPO's loss on the first batch is %.7f (ln 2)", loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairEvaluation:
  """Scores held-out pairs by how policy and reference judge them.

  Attributes:
    scorer: computes log-probabilities.
    reference: float32 [n, 2], the reference's.
    beta: scale of rewards.
  """

  scorer: PairScorer
  reference: np.ndarray
  beta: float

  def metrics(self, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Means over the pairs, under TRL's names."""
    logps = self.scorer.score(params)
    real = ~(np.isnan(logps) | np.isnan(self.reference)).any(axis=1)
    logps, rewards = logps[real], self.beta * (logps - self.reference)[real]
    return {
      "eval_rewards/chosen": float(rewards[:, 0].mean()),
      "eval_rewards/rejected": float(rewards[:, 1].mean()),
      "eval_rewards/accuracies": float((rewards[:, 0] > rewards[:, 1]).mean()),
      "eval_rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
      "eval_logps/chosen": float(logps[:, 0].mean()),
      "eval_logps/rejected": float(logps[:, 1].mean()),
      "eval_pairs": int(real.sum()),
    }
