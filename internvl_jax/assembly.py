"""Puts a run's pieces together from the configuration: what the front doors that compute share."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import compiler, serving
from internvl_jax.config import TrainConfig, get
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.task import DataTask
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.files import default_cache
from internvl_jax.data.source.hosts import Hosts
from internvl_jax.errors import UserError
from internvl_jax.eval.questions import NAME, QuestionFile
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import peft
from internvl_jax.hf.embeddings import EMBEDDINGS
from internvl_jax.hf.model import (
  Source,
)
from internvl_jax.losses.preference import LossSettings
from internvl_jax.models.choice import choose_kernels
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVLConfig
from internvl_jax.models.kernels import Device
from internvl_jax.models.quantized import has_products
from internvl_jax.objectives import (
  COPIES,
  PreferenceOptimization,
  ReferencePolicy,
  SupervisedFineTuning,
)
from internvl_jax.optim import optimizer
from internvl_jax.optim.labels import ADAPTERS, decays, labels_of, trainable_paths, trained
from internvl_jax.parallel import distributed, rules, zero
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel.placement_table import placement_table, placement_warnings
from internvl_jax.serving import Export, ExportSettings
from internvl_jax.state import TrainState, parameter_table, with_dtypes
from internvl_jax.step import TrainStep
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.lines import FRAME_NAME, PairLines
from internvl_jax.tasks.sft.data import DATA
from internvl_jax.trees import layers_with, select, submodule_of

_HELD_OUT_SHOWN = 5
"""Lines named in the message that refuses held-out data."""


def set_up_jax(config: TrainConfig) -> None:
  """Settings of JAX that the whole process shares."""
  if config.runtime.compilation_cache_dir:
    compiler.set_cache(config.runtime.compilation_cache_dir)
  if not config.training.bf16:
    compiler.use_full_precision()


def processes() -> Hosts:
  """The processes of the run, for those who open data."""
  return Hosts(me=jax.process_index(), count=jax.process_count(), gather=distributed.all_gather_bytes)


def held_out_problems(config: TrainConfig, source: Source, chat: ChatTokenizer) -> list[str]:
  """Why lines of `eval.annotation` and of `preference.eval_meta_path` cannot be used, one text each.

  All of their images and videos are decoded, on all cores: what is found here is not found at the end of a run.

  Raises:
    UserError: a file cannot be opened at all.
  """
  found, tokens_per_tile, workers = [], source.config.tokens_per_tile, os.cpu_count() or 1
  if config.eval.annotation is not None:
    found += QuestionFile.open(config.eval, config.data, chat, tokens_per_tile).problems(workers)
  if config.preference.eval_meta_path is not None:
    cache = config.loader.cache_dir or default_cache()
    mixture = Mixture(
      dataclasses.replace(config.data, meta_path=config.preference.eval_meta_path),
      chat,
      tokens_per_tile=tokens_per_tile,
      seed=config.training.seed,
      policy=config.loader.on_over_length,
      cache=cache,
      lines=data_task(config, source).lines,
    )
    mixture.index_sizes(cache, workers=workers, quiet=config.training.disable_tqdm, hosts=processes())
    found += [line for report in examine(mixture) for line in report.examples]
    found += decode_all(mixture, packed=config.data.use_packed_ds, workers=workers)
    mixture.close()
  return found


def check_held_out(config: TrainConfig, source: Source, chat: ChatTokenizer) -> None:
  """Refuses held-out data that would end the run when they are read; pairs that may be dropped are told.

  Raises:
    UserError: a line cannot be used.
  """
  found = held_out_problems(config, source, chat)
  if not found:
    return
  shown = " | ".join(found[:_HELD_OUT_SHOWN])
  what = f"{len(found)} lines of the held-out data cannot be used: {shown}"
  if config.loader.on_bad_sample == "drop" and not any(NAME in line for line in found):
    logging.warning("%s", what)
    return
  raise UserError(f"{what}; correct them before the run, which would end when it comes to them")


def open_export(
  config: TrainConfig, source: Source, tokenizer: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> Export:
  """How the run's export will be asked; tells what it will lack, as long as nothing has been computed.

  Raises:
    UserError: checkpoint.export_layout cannot hold the model, the settings of its data or its template.
  """
  settings = ExportSettings(
    layout=layouts.layout_named(config.checkpoint.export_layout),
    code=config.checkpoint.code,
    layout_flag="checkpoint.export_layout",
    code_flag="checkpoint.code",
    **({} if config.preference.loss_type is None else {"frame_name": FRAME_NAME}),
  )
  export = serving.prepare(source, config.data, tokenizer, chat, settings)
  for line in [*export.notes, *adapter_notes(config, source)]:
    logging.warning("Export: %s", line)
  return export


def adapter_notes(config: TrainConfig, source: Source) -> list[str]:
  """What the folder adapter/ of an export will lack, and why: one line each."""
  if not source.specs:
    return []
  only = "no adapter/ will be written, only the merged model:"
  if config.model.model_name_or_path is None:
    return [f"{only} there is no checkpoint of the base model"]
  if lacking := peft.formless(source.model.shapes, source.table):
    return [
      f"{only} the base model's layout ({source.layout.name}) has no form for adapters of {', '.join(lacking)}, which it "
      "splits; begin with the base model in the internvl layout, or leave them out of lora.targets"
    ]
  found = []
  if source.new_rows:
    found.append(
      f"adapter/ has no form for {source.new_rows} new row(s) of the embeddings: they will be in the merged model only, and "
      "made again where a run with runtime.grow_vocabulary=True goes on from adapter/"
    )
  others = set(trained(labels_of(config.model, source.model.shapes)).values()) - {ADAPTERS}
  if others:
    parts = ", ".join(sorted(others))
    found.append(
      f"adapter/ holds the adapters alone; what else trains ({parts}) will be in the merged model only"
    )
  return found


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
      "The model's widths do not divide by mesh.fsdp=%d: its devices stand as fsdp_outer=%d x fsdp=%d",
      *(whole, groups, mesh.shape["fsdp"]),
    )
  compiler.check_overrides(config.runtime.xla_options, mesh)
  if config.training.deepspeed:
    logging.info("ZeRO stage %d: %s spread over the data-parallel devices", stage, zero.STAGES[stage])
  return mesh


def state_places(
  config: TrainConfig, source: Source, trainable: set[str], mesh: jax.sharding.Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], rules.StateShardings]:
  """Shapes of all parameters by path, as they are stored, and where all of the state lies."""
  shapes = with_dtypes(source.model, trainable, bf16=config.training.bf16)
  stage = zero.read_stage(config.training.deepspeed)
  return shapes, rules.state_shardings(source.model.axes, shapes, trainable, mesh, zero_stage=stage)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Setup:
  """A run before it has weights and data: what trains, where it lies and how; see `set_up`.

  Attributes:
    source: the model.
    mesh: the devices.
    trainable: the paths of the parameters that train.
    shapes: of all parameters by path, as they are stored, and where.
    how: how forward passes are computed.
    objective: what is minimized.
    step: the optimizer step.
    places: where all of the state lies.
  """

  source: Source
  mesh: jax.sharding.Mesh
  trainable: set[str]
  shapes: dict[str, jax.ShapeDtypeStruct]
  how: Execution
  objective: SupervisedFineTuning | PreferenceOptimization
  step: TrainStep
  places: rules.StateShardings

  def create_state(self, params: Mapping[str, jax.Array]) -> TrainState:
    """The state before the first step, of all parameters by path, where they lie."""
    trained = select(params, self.trainable)
    return TrainState.create(trained, self.step.optimizer, self.places, self.objective.initial_running)

  def abstract_state(self) -> TrainState:
    """The shapes of what `create_state` makes, and where they lie."""
    trained = select(self.shapes, self.trainable)
    return TrainState.abstract(trained, self.step.optimizer, self.places, self.objective.initial_running)


def set_up(
  config: TrainConfig, source: Source, mesh: jax.sharding.Mesh, *, device: Device | None = None
) -> Setup:
  """Puts a run together as far as shapes go: no weights, no data.

  Args:
    config: the run's.
    source: the model.
    mesh: the devices, which need not be there.
    device: what they are; None: those at hand.

  Raises:
    UserError: the config does not fit the model or the platform.
  """
  check_quantize(config.runtime.quantize, mesh.devices.flat[0])
  labels = trained(labels_of(config.model, source.model.shapes))
  trainable = set(labels)
  shapes, places = state_places(config, source, trainable, mesh)
  how = execution(config, source.config, device)
  objective = make_objective(config, source, how, mesh)
  step = TrainStep(
    objective=objective,
    optimizer=optimizer.make_optimizer(
      config.training,
      labels=labels,
      decay=decays(select(source.reference_names, trainable), source.undecayed),
    ),
    seed=config.training.seed,
    places=places,
  )
  return Setup(
    source=source,
    mesh=mesh,
    trainable=trainable,
    shapes={path: leaf.update(sharding=places.params[path]) for path, leaf in shapes.items()},
    how=how,
    objective=objective,
    step=step,
    places=places,
  )


def check_quantize(name: str, device: Any) -> None:
  """Refuses products in a format that the devices have none in.

  Raises:
    UserError: they would be computed in another one, and more slowly.
  """
  if name != "none" and not has_products(device, name):
    raise UserError(
      f"runtime.quantize={name!r}: {device.device_kind} has no such products (int8: NVIDIA of compute capability 8.0, "
      "TPU v5e; fp8: 8.9, TPU7x); set it to 'none'"
    )


def idle_on(config: TrainConfig, source: Source) -> list[str]:
  """A line for each setting that has no effect on this model or with this optimizer, for the log."""
  lines = optimizer.idle_settings(config.training)
  found = {
    "runtime.router_aux_loss_coef": config.runtime.router_aux_loss_coef != 0,
    "runtime.experts": config.runtime.experts != "auto",
  }
  if source.config.text.experts is not None:
    return lines
  return lines + [
    f"{path}={get(config, path)!r} has no effect: the model has no experts"
    for path, asks in found.items()
    if asks
  ]


def log_parameters(setup: Setup) -> None:
  """Tells what the model has and what trains, and on several devices where it lies."""
  if setup.mesh.size > 1:
    logging.info("Parameters:\n%s", "\n".join(placement_table(setup.shapes, setup.places)))
    for line in placement_warnings(setup.shapes, setup.places):
      logging.warning("%s", line)
  logging.info("Model:\n%s", parameter_table(setup.shapes, setup.abstract_state()))
  frozen = [path for path in EMBEDDINGS if path in setup.shapes and path not in setup.trainable]
  if setup.source.new_rows and frozen:
    logging.warning(
      "%d new row(s) of %s do not train and stay the mean of the old ones; model.freeze_llm=False without "
      "model.use_llm_lora trains both tables, model.unfreeze_lm_head=True the output's",
      *(setup.source.new_rows, " and ".join(frozen)),
    )


def make_objective(
  config: TrainConfig, source: Source, how: Execution, mesh: jax.sharding.Mesh
) -> SupervisedFineTuning | PreferenceOptimization:
  """What the config says is to be minimized."""
  forward: dict[str, Any] = {
    "model": source.model,
    "how": how,
    "normalize_type": config.data.normalize_type,
    "drop_path_rates": drop_path_rates(
      config.model.drop_path_rate, source, trainable_paths(config.model, source.model.shapes)
    ),
    "dropout": bool(source.specs),
    "shards": meshes.data_parallel_size(mesh),
    "all_gather": config.data.loss_reduction_all_gather,
    "router_loss_coef": config.runtime.router_aux_loss_coef,
  }
  asked = config.preference
  if asked.loss_type is None:
    return SupervisedFineTuning(**forward)
  return PreferenceOptimization(
    **forward,
    terms=asked.terms,
    settings=LossSettings(asked.beta, asked.label_smoothing),
    rpo_alpha=asked.rpo_alpha,
    reference=None if asked.precompute_reference else reference_policy(config, source),
    shares_prompts=shares_prompts(config, source),
  )


def shares_prompts(config: TrainConfig, source: Source) -> bool:
  """Whether the answers of a preference pair share their prompt's tokens.

  A window of attention counts along the row, in which a shared prompt stands too far from its second answer.
  """
  asked = config.preference
  return asked.loss_type is not None and asked.share_prompts and not any(source.config.text.windows)


def data_task(config: TrainConfig, source: Source) -> DataTask:
  """What the data are to the way to learn that the config asks for."""
  if config.preference.loss_type is None:
    return DATA
  return PairData(lines=PairLines(share_prompts=shares_prompts(config, source)))


def reference_policy(config: TrainConfig, source: Source) -> ReferencePolicy:
  """The policy as it is before the first step, without the adapters that are attached for this run.

  Adapters that the checkpoint brings are a part of it.
  """
  trainable = trainable_paths(config.model, source.model.shapes)
  return ReferencePolicy(
    model=source.without_fresh_adapters(),
    shares_features=not any(submodule_of(path) in ("vision_model", "mlp1") for path in trainable),
  )


def describe_copies(
  config: TrainConfig, source: Source, params: Mapping[str, Any], trainable: set[str]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and places of the frozen copies that the reference policy has of what trains.

  Kernels and tables are in the compute dtype, to which the policy's are rounded, too; what the model reads in float32
  (norms, biases, routers) stays so, or the reference would not be the policy that it is a copy of.

  Empty where the run has no reference policy in memory.

  Args:
    config: the run.
    source: the model.
    params: all parameters by path, or their shapes, with their shardings.
    trainable: the paths of those that train.
  """
  if config.preference.loss_type is None or config.preference.precompute_reference:
    return {}
  copied = select(params, trainable & set(reference_policy(config, source).model.shapes))
  half = jnp.bfloat16 if config.training.bf16 else jnp.float32

  def dtype(path: str) -> jnp.dtype:
    names = [name for name in source.model.axes[path] if name != "layers"]
    return half if len(names) > 1 and None not in names else jnp.float32

  return {
    COPIES + path: jax.ShapeDtypeStruct(leaf.shape, dtype(path), sharding=leaf.sharding)
    for path, leaf in copied.items()
  }


def reference_copies(
  config: TrainConfig, source: Source, params: Mapping[str, jax.Array], trainable: set[str]
) -> dict[str, jax.Array]:
  """What `describe_copies` describes."""
  described = describe_copies(config, source, params, trainable)
  originals = {path: params[path.removeprefix(COPIES)] for path in described}
  copy = jax.jit(
    lambda tree: {path: jnp.copy(value).astype(described[path].dtype) for path, value in tree.items()},
    out_shardings={path: leaf.sharding for path, leaf in described.items()},
  )
  return copy(originals)


def drop_path_rates(rate: float, source: Source, trainable: Iterable[str]) -> tuple[float, ...]:
  """The drop path rate of each layer of the ViT: rising linearly to `rate`, 0 where it is frozen, as in evaluation."""
  trains = layers_with(trainable, "vision_model", source.config.vision.num_layers)
  rates = np.where(trains, np.linspace(0.0, rate, len(trains)), 0.0)
  return tuple(rates.tolist()) if rates.any() else ()


def execution(config: TrainConfig, model: InternVLConfig, device: Device | None = None) -> Execution:
  """How a model's forward passes are computed on a device, by default the one at hand.

  Raises:
    UserError: kernels asked for by name cannot run there, or not this model.
  """
  remat = config.model.grad_checkpoint or config.training.gradient_checkpointing
  return Execution(
    dtype=jnp.bfloat16 if config.training.bf16 else jnp.float32,
    kernels=choose_kernels(model, device, attention=config.runtime.attention, experts=config.runtime.experts),
    remat=config.runtime.remat_policy if remat else None,
    scan_unroll=config.runtime.scan_unroll,
  )
