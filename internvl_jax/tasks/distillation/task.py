"""Distillation as a task."""

import functools

from internvl_jax.config import TrainConfig
from internvl_jax.hf.model import Source
from internvl_jax.losses.distillation import Divergence
from internvl_jax.tasks.distillation.batch import DistillationBatch
from internvl_jax.tasks.distillation.data import DistillationData
from internvl_jax.tasks.distillation.hooks import DistillationHooks
from internvl_jax.tasks.distillation.objective import Distillation
from internvl_jax.tasks.task import Task

SHOWN_TERMS = {"losses/teacher": "losses/teacher {:.3g}"}
"""Metrics of `Distillation` that log lines show."""


def open_task(config: TrainConfig, source: Source) -> Task:
  """The task of a config that names a teacher; the teacher is opened when a run is."""
  del source
  asked = config.distillation
  data = DistillationData(top_k=asked.top_k)
  return Task(
    name="distillation",
    data=data,
    make_objective=functools.partial(
      Distillation, divergence=Divergence(asked.divergence, asked.temperature), weight=asked.weight
    ),
    batch=DistillationBatch,
    sizes=lambda tokens: {"K": asked.top_k},
    shown_terms=SHOWN_TERMS,
    open_hooks=functools.partial(DistillationHooks, data),
  )
