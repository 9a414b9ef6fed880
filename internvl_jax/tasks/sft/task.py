"""Supervised fine-tuning as a task."""

from internvl_jax.config import TrainConfig
from internvl_jax.hf.model import Source
from internvl_jax.tasks.sft.data import DATA
from internvl_jax.tasks.sft.objective import SupervisedFineTuning
from internvl_jax.tasks.task import Task


def open_task(config: TrainConfig, source: Source) -> Task:
  """The task of any config and model."""
  del config, source
  return Task(name="sft", data=DATA, make_objective=SupervisedFineTuning)
