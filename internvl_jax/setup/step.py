"""What trains, where it is stored and how: the optimizer step of a config, as far as shapes go."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from internvl_jax.config import TrainConfig, get
from internvl_jax.errors import UserError
from internvl_jax.hf.embeddings import EMBEDDINGS
from internvl_jax.hf.model import Source
from internvl_jax.hf.weights import names_of
from internvl_jax.models.choice import choose_kernels
from internvl_jax.models.flash import PARTS
from internvl_jax.models.internvl import Execution, InternVLConfig
from internvl_jax.models.kernels import Device
from internvl_jax.models.quantized import has_products
from internvl_jax.optim import optimizer
from internvl_jax.optim.labels import decays, labels_of, trained
from internvl_jax.optim.rates import rate_scales, rates_text
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules, zero
from internvl_jax.parallel.placement_table import placement_table, placement_warnings
from internvl_jax.state import TrainState, parameter_table, with_dtypes
from internvl_jax.step import Objective, TrainStep
from internvl_jax.tasks import open_task
from internvl_jax.tasks.task import Task
from internvl_jax.trees import layers_with, select, submodule_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Setup:
  """A run before it has weights and data: what trains, its shardings and how; see `set_up`.

  Attributes:
    source: the model.
    mesh: the devices.
    labels: of the parameters that train, by path (`optim.labels`).
    rates: their peak learning rates by part, for the log; empty where all have the same.
    shapes: of all parameters by path, as they are stored, and where.
    how: how forward passes are computed.
    task: the way to learn.
    objective: what is minimized.
    step: the optimizer step.
    places: the shardings of the state.
  """

  source: Source
  mesh: jax.sharding.Mesh
  labels: dict[str, str]
  rates: str
  shapes: dict[str, jax.ShapeDtypeStruct]
  how: Execution
  task: Task
  objective: Objective
  step: TrainStep
  places: rules.StateShardings

  @property
  def trainable(self) -> set[str]:
    """The paths of the parameters that train."""
    return set(self.labels)

  def create_state(self, params: Mapping[str, jax.Array]) -> TrainState:
    """Makes the state before the first step from all parameters by path, sharded."""
    trained = select(params, self.trainable)
    return TrainState.create(trained, self.step.optimizer, self.places, self.objective.initial_running)

  def abstract_state(self) -> TrainState:
    """The shapes and shardings of what `create_state` makes."""
    trained = select(self.shapes, self.trainable)
    return TrainState.abstract(trained, self.step.optimizer, self.places, self.objective.initial_running)

  def abstract_frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of what does not train, copies that the task needs of what trains among them."""
    frozen = {path: leaf for path, leaf in self.shapes.items() if path not in self.trainable}
    return frozen | self.task.abstract_copies(self.shapes, self.trainable)

  def copies(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The copies that the task needs of what trains, from all parameters by path."""
    described = self.task.abstract_copies(params, self.trainable)
    originals = {path: params[path.removeprefix(self.task.copy_prefix)] for path in described}
    copy = jax.jit(
      lambda tree: {path: jnp.copy(value).astype(described[path].dtype) for path, value in tree.items()},
      out_shardings={path: leaf.sharding for path, leaf in described.items()},
    )
    return copy(originals)


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
  labels = trained(labels_of(config.model, source.model.shapes, config.flash.stage))
  trainable = set(labels)
  shapes, places = state_places(config, source, trainable, mesh)
  how = execution(config, source.config, device)
  task = open_task(config, source)
  objective = task.make_objective(
    model=source.model,
    how=how,
    normalize_type=config.data.normalize_type,
    drop_path_rates=drop_path_rates(config.model.drop_path_rate, source, trainable),
    dropout=bool(source.specs),
    shards=meshes.data_parallel_size(mesh),
    all_gather=config.data.loss_reduction_all_gather,
    router_loss_coef=config.runtime.router_aux_loss_coef,
  )
  scales = scales_of(config, source, labels)
  step = TrainStep(
    objective=objective,
    optimizer=optimizer.make_optimizer(
      config.training,
      labels=labels,
      decay=decays(select(source.reference_names, trainable), source.undecayed),
      scales=scales,
      axes=source.model.axes,
    ),
    seed=config.training.seed,
    places=places,
  )
  return Setup(
    source=source,
    mesh=mesh,
    labels=labels,
    rates=rates_text(scales, labels, config.training.learning_rate) if scales else "",
    shapes={path: leaf.update(sharding=places.params[path]) for path, leaf in shapes.items()},
    how=how,
    task=task,
    objective=objective,
    step=step,
    places=places,
  )


def scales_of(config: TrainConfig, source: Source, labels: Mapping[str, str]) -> dict[str, np.ndarray]:
  """What multiplies the learning rate of parameters that train; see `optim.rates.rate_scales`."""
  shapes, names = source.model.shapes, {}
  if config.training.lr_by_pattern:
    names = {path: names_of(path, shapes[path].shape, source.table).keys for path in labels}
  return rate_scales(config.training, labels, names, source.config.vision.num_layers)


def state_places(
  config: TrainConfig, source: Source, trainable: set[str], mesh: jax.sharding.Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], rules.StateShardings]:
  """Shapes of all parameters by path, as they are stored, and the shardings of the state."""
  shapes = with_dtypes(source.model, trainable, bf16=config.training.bf16)
  stage = zero.read_stage(config.training.deepspeed)
  return shapes, rules.state_shardings(source.model.axes, shapes, trainable, mesh, zero_stage=stage)


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
  """Logs what the model has and what trains, and on several devices its shardings."""
  if setup.mesh.size > 1:
    logging.info("Parameters:\n%s", "\n".join(placement_table(setup.shapes, setup.places)))
    for line in placement_warnings(setup.shapes, setup.places):
      logging.warning("%s", line)
  logging.info("Model:\n%s", parameter_table(setup.shapes, setup.abstract_state()))
  if setup.rates:
    logging.info("Peak learning rates: %s", setup.rates)
  if setup.source.config.flash is not None and not any(
    submodule_of(path) in PARTS for path in setup.trainable
  ):
    logging.info(
      "The router of this InternVL3.5-Flash is frozen; every tile has all of its tokens in training"
    )
  frozen = [path for path in EMBEDDINGS if path in setup.shapes and path not in setup.trainable]
  if setup.source.new_rows and frozen:
    logging.warning(
      "%d new row(s) of %s do not train and stay the mean of the old ones; model.freeze_llm=False without "
      "model.use_llm_lora trains both tables, model.unfreeze_lm_head=True the output's",
      *(setup.source.new_rows, " and ".join(frozen)),
    )


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
  device = device or Device.of(jax.devices()[0])
  remat = config.model.grad_checkpoint or config.training.gradient_checkpointing
  return Execution(
    dtype=jnp.bfloat16 if config.training.bf16 else jnp.float32,
    kernels=choose_kernels(model, device, attention=config.runtime.attention, experts=config.runtime.experts),
    remat=config.runtime.remat_policy if remat else None,
    scan_unroll=config.runtime.scan_unroll or _unroll(model, device, recomputes=remat),
  )


_MOST_UNROLLED, _LEAST_WIDTH = 12, 256


def _unroll(model: InternVLConfig, device: Device, *, recomputes: bool) -> int:
  """How many layers the body of a scan holds where nobody says it: all, of shallow models on CPUs.

  CPUs copy what a layer keeps for the backward pass into the scan's stacks and out of them, on one core: about 10 % of a step of
  two cores (benchmarks/step.py). Compiling takes longer for it, which narrow models do not earn back; and what layers
  recompute has to stay in a loop, outside of which XLA finds that it is there already and keeps it.
  """
  layers = max(model.vision.num_layers, model.text.num_layers)
  wide = min(model.vision.hidden_size, model.text.hidden_size) >= _LEAST_WIDTH
  return layers if device.platform == "cpu" and wide and layers <= _MOST_UNROLLED and not recomputes else 1
