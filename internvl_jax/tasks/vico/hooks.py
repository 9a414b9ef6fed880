"""What the consistency stage does beside its steps: its teacher is the model that the run began with."""

from collections.abc import Mapping

import jax

from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.tasks.preference.reference import check_same_reference
from internvl_jax.tasks.task import PlainHooks, RunContext
from internvl_jax.tasks.vico.data import FlashData


class ConsistencyHooks(PlainHooks):
  """The hooks of a run by `Consistency`; see `tasks.task.Hooks`."""

  needs_start = True

  def __init__(self, data: FlashData, context: RunContext):
    """Keeps what `prepare` needs."""
    super().__init__(data)
    self._context = context

  def prepare(self, params: Mapping[str, jax.Array], loader: TrainLoader, *, resumes: bool) -> None:
    """Looks that the teacher is the model that the run began with."""
    check_same_reference(self._context, params, resumes=resumes)
