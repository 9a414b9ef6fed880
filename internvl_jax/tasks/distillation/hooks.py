"""What distillation does beside its steps: it asks the teacher."""

import dataclasses

from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import path_of
from internvl_jax.tasks.distillation.cache import TeacherLogProbs
from internvl_jax.tasks.distillation.data import DistillationData, TeacherData
from internvl_jax.tasks.distillation.teacher import Pass, open_teacher
from internvl_jax.tasks.precomputed import KeyedFolder, reader_in_order
from internvl_jax.tasks.task import PlainHooks, RunContext


class DistillationHooks(PlainHooks):
  """The hooks of a run by `Distillation`; see `tasks.task.Hooks`.

  Attributes:
    data: conversations, with what the teacher says of them.
  """

  def __init__(self, data: DistillationData, context: RunContext):
    """Opens the teacher, and sees that it suits the student; nothing is computed before `before_weights`.

    Raises:
      UserError: it does not.
    """
    super().__init__(data)
    config = context.config
    asked = config.distillation
    assert config.training.output_dir is not None
    folder = path_of(asked.cache_dir or path_of(config.training.output_dir) / "teacher_logps")
    kept = KeyedFolder(folder=folder, setting="distillation.cache_dir", model="teacher")
    self._teacher = open_teacher(context)
    self._known = TeacherLogProbs(kept, asked.top_k, config.loader.cache_dir)
    self._make_loader = reader_in_order(config, context.make_loader, config.data.meta_path, TeacherData())
    self._quiet = config.training.disable_tqdm
    self.data = dataclasses.replace(data, known=self._known)

  def before_weights(self, loader: TrainLoader) -> None:
    """Asks the teacher about all data, unless that was done before; its weights are gone before the student's come.

    Args:
      loader: of the run.

    Raises:
      UserError: what is on disk is of another teacher or other data, or samples are not always the same.
    """
    if varying := loader.first_varying():
      raise UserError(
        f"distillation.teacher: what it says of {varying.dataset!r} would hold for one epoch only: {varying.cause}"
      )
    key = self._teacher.key(loader)
    if not self._known.is_complete(key):
      asks = Pass(teacher=self._teacher, known=self._known, make_loader=self._make_loader, quiet=self._quiet)
      asks.run(key)
    self._known.open(loader.num_samples)
