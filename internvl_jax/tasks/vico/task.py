"""ViCO's stages as tasks."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.models.flash import PARTS
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.tasks.preference.policy import COPIES, ReferencePolicy, abstract_copies
from internvl_jax.tasks.task import Task
from internvl_jax.tasks.vico.batch import FlashBatch
from internvl_jax.tasks.vico.data import Draw, FlashData, Independently, OneTile
from internvl_jax.tasks.vico.hooks import ConsistencyHooks
from internvl_jax.tasks.vico.objective import Consistency, Routing
from internvl_jax.trees import submodule_of


def open_task(config: TrainConfig, source: Source) -> Task:
  """The task of the stage that a config asks for.

  Raises:
    UserError: the router stage of a model that has no router.
  """
  if source.config.flash is None:
    raise UserError(
      f"flash.stage={config.flash.stage!r}: the model has no router, which the consistency stage gives it; train that first "
      "(flash.stage='consistency'), or begin with an InternVL3.5-Flash"
    )
  return _consistency(config, source) if config.flash.stage == "consistency" else _routing(config, source)


def _consistency(config: TrainConfig, source: Source) -> Task:
  trainable = trainable_paths(config.model, source.model.shapes, config.flash.stage)
  shares_vision = not any(submodule_of(path) == "vision_model" for path in trainable)
  teacher = ReferencePolicy(model=source.without_fresh_adapters(), shares_features=False)
  parts = ("mlp1", "language_model") if shares_vision else teacher.parts
  data = _data(config, source, Independently(config.flash.compressed_share))
  return Task(
    name="consistency",
    data=data,
    make_objective=functools.partial(Consistency, teacher=teacher, shares_vision=shares_vision),
    batch=FlashBatch,
    twice=parts,
    abstract_copies=functools.partial(_copies, source, bf16=config.training.bf16),
    copy_prefix=COPIES,
    open_hooks=functools.partial(ConsistencyHooks, data),
  )


def _routing(config: TrainConfig, source: Source) -> Task:
  return Task(
    name="router",
    data=_data(config, source, OneTile()),
    make_objective=functools.partial(Routing, percentile=config.flash.percentile, window=config.flash.window),
    batch=FlashBatch,
    twice=("mlp1", "language_model"),
    shown_terms={"router_accuracy": "router_accuracy {:.3f}"},
  )


def _data(config: TrainConfig, source: Source, draw: Draw) -> FlashData:
  sizes = source.config.tokens_per_tile, source.config.tokens_per_compressed_tile
  return FlashData(draw=draw, seed=config.training.seed, features_per_tile=sizes)


def _copies(
  source: Source, params: Mapping[str, Any], trainable: set[str], *, bf16: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """What the teacher has copies of: all that trains but the second projector, which it does not use."""
  used = {path for path in trainable if submodule_of(path) not in PARTS}
  return abstract_copies(source, params, used, bf16=bf16)
