"""What reinforcement does beside its steps: its batches are answers, and some of these are written to be looked at."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from internvl_jax.callbacks import Callback
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.step import StepMetrics
from internvl_jax.tasks.grpo.answering import make_answering
from internvl_jax.tasks.grpo.prompts import PromptData
from internvl_jax.tasks.grpo.rewards import open_rewards
from internvl_jax.tasks.grpo.source import Parts, RolloutSource
from internvl_jax.tasks.preference.reference import check_same_reference
from internvl_jax.tasks.task import PlainHooks, RunContext

SHOWN_AS = "rollouts"
"""The set that answers are shown under, beside the held-out sets."""


class GrpoHooks(PlainHooks):
  """The hooks of a run by `GroupRelativePolicy`; see `tasks.task.Hooks`.

  Attributes:
    needs_start: the reference policy has copies of the weights that the run began with.
  """

  def __init__(self, data: PromptData, context: RunContext):
    """Opens the rewards.

    Raises:
      UserError: a reward that there is not.
    """
    super().__init__(data)
    self._context, grpo = context, context.config.grpo
    self.needs_start = grpo.beta > 0
    self._prints, self._max_steps = grpo.num_completions_to_print, context.config.training.max_steps
    self._source: RolloutSource | None = None
    self._parts = Parts(
      grpo=grpo,
      chat=context.chat,
      answering=make_answering(
        context.config,
        context.objective,
        context.mesh,
        stop_ids=(context.chat.stop_token_id,),
      ),
      rewards=open_rewards(grpo.reward_funcs),
    )

  def source(self, loader: TrainLoader) -> TrainLoader:
    """Samples answers to the loader's prompts."""
    self._source = RolloutSource(loader, self._parts, self._max_steps)
    return self._source  # pyright: ignore[reportReturnType] - in all else it is the loader

  def prepare(self, params: Mapping[str, jax.Array], loader: TrainLoader, *, resumes: bool) -> None:
    """Looks that the reference policy is the one that the run began with."""
    if self.needs_start:
      check_same_reference(self._context, params, resumes=resumes)

  def callbacks(self, log: RunLog) -> Sequence[Callback]:
    """Writes answers at every step that is logged, where that is asked for."""
    assert self._source is not None, "source() comes first"
    return [Completions(log, self._source)] if self._prints else []


@dataclasses.dataclass
class Completions(Callback):
  """Writes answers to the first prompts of every step that is logged.

  Attributes:
    log: of the run.
    source: has the answers.
  """

  log: RunLog
  source: RolloutSource

  def after_step(self, step: int, metrics: StepMetrics) -> None:
    """Writes them."""
    del metrics
    if self.log.history and self.log.history[-1]["step"] == step:
      self.log.add_predictions(step, SHOWN_AS, self.source.shown(step))
