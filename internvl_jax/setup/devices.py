"""JAX's settings, the mesh of devices, and the processes of a run."""

from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from internvl_jax import compiler
from internvl_jax.config import TrainConfig
from internvl_jax.data.source.hosts import Hosts
from internvl_jax.models.functional import ModelDef
from internvl_jax.parallel import distributed, rules, zero
from internvl_jax.parallel import mesh as meshes


def set_up_jax(config: TrainConfig, *, keeps_programs: bool = True) -> None:
  """Settings of JAX that the whole process shares; tells where compiled programs are kept, where they are."""
  if keeps_programs and (folder := compiler.open_cache(config.runtime.compilation_cache_dir)):
    logging.info("Compiled programs are kept in %s (runtime.compilation_cache_dir)", folder)
  if not config.training.bf16:
    compiler.use_full_precision()


def open_mesh(
  config: TrainConfig, devices: Sequence[Any] | None = None, model: ModelDef | None = None
) -> jax.sharding.Mesh:
  """The devices, by default those at hand, as the config arranges them, and `fsdp` cut as the model's widths need it.

  Raises:
    UserError: they cannot be arranged so, or their compiler does not take `runtime.xla_options`.
  """
  stage = zero.read_stage(config.training.deepspeed)
  mesh = meshes.make_mesh(config.mesh, devices, zero_stage=stage)
  groups = 1 if model is None else rules.fsdp_groups(model.axes, model.shapes, mesh)
  if groups > 1:
    whole, mesh = mesh.shape["fsdp"], meshes.cut_fsdp(mesh, groups)
    logging.info(
      "The model's widths do not divide by mesh.fsdp=%d: its devices are arranged as fsdp_outer=%d x fsdp=%d",
      *(whole, groups, mesh.shape["fsdp"]),
    )
  compiler.check_overrides(config.runtime.xla_options, mesh)
  if config.training.deepspeed:
    logging.info("ZeRO stage %d: %s sharded over the data-parallel devices", stage, zero.STAGES[stage])
  return mesh


def processes() -> Hosts:
  """The processes of the run, for those who open data."""
  return Hosts(me=jax.process_index(), count=jax.process_count(), gather=distributed.all_gather_bytes)
