"""The optimizer: one optax transformation from gradients to what is added to the parameters.

    gradients -> clip -> OPTIMIZERS[training.optim] -> weight decay, decay to the start -> learning rate
              -> ADDITIONS of training.optim_args -> updates

Only parameters that train go through it, by path; what is frozen has neither gradient nor state. `update` takes two
keyword arguments: `grad_norm` and `learning_rate`, see `transformations`.

A new optimizer is a line of OPTIMIZERS, a new thing done to updates or kept of the weights a line of ADDITIONS. The arrays
of their states are placed by their shapes (`state.opt_state_shardings`) and saved under their names.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.optim.anchor import decay_to_start
from internvl_jax.optim.average import average_weights
from internvl_jax.optim.eight_bit import scale_by_adam_8bit
from internvl_jax.optim.rates import PARTS
from internvl_jax.optim.transformations import clip_by_global_norm, scale_by_learning_rate
from internvl_jax.trees import LAYER_RANGE

_MOMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What turns gradients into a direction, still to be scaled by minus the learning rate.

  Attributes:
    make: the transformation by its arguments. Those that have a number or a flag as their default can be set by
      training.optim_args, if no field of `training` sets them.
    fields: the arguments that fields of `training` set, by name.
    takes_axes: whether it also takes the names of the parameters' axes, as `axes`.
  """

  make: Callable[..., optax.GradientTransformation]
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  takes_axes: bool = False

  def arguments(self) -> dict[str, float | bool]:
    """The arguments that training.optim_args can set, and their defaults."""
    parameters = inspect.signature(self.make).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in self.fields}
    return {name: value for name, value in defaults.items() if isinstance(value, bool | int | float)}


def _adafactor(
  *, decay_rate: float = 0.8, clip_threshold: float = 1.0, epsilon: float = 1e-30
) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235) without momentum, at the learning rate that is given, as Hugging Face's Trainer has it.

  Mean squares are kept by row and column for matrices whose two longest axes have at least 128 entries, else for each
  number. Updates are clipped by their root mean square, layer by layer.
  """

  def clip(path: str, update: jax.Array) -> jax.Array:
    leading = (update.ndim - 2 if path.endswith(".kernel") else 1) if LAYER_RANGE.search(path) else 0
    square = jnp.mean(jnp.square(update), axis=tuple(range(leading, update.ndim)), keepdims=True)
    return update / jnp.maximum(1, jnp.sqrt(square) / clip_threshold)

  def clip_all(updates: Any, params: Any) -> Any:
    del params
    return {path: clip(path, update) for path, update in updates.items()}

  return optax.chain(
    optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=epsilon), optax.stateless(clip_all)
  )


def _sgd(*, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
  """Stochastic gradient descent, by default without momentum and so without state."""
  return optax.trace(momentum, nesterov) if momentum else optax.identity()


def _lion(*, b1: float, b2: float) -> optax.GradientTransformation:
  """Lion (arXiv:2302.06675): the sign of a momentum."""
  return optax.scale_by_lion(b1, b2)


def _muon(
  *,
  b1: float,
  b2: float,
  eps: float,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  rms: float = 0.2,
) -> optax.GradientTransformation:
  """Muon for the matrices of the layers, each layer's by itself, and Adam for all other parameters.

  Updates of matrices have the root mean square `rms`, which is that of AdamW's, so that AdamW's learning rates and decay
  suit (arXiv:2502.16982). Nesterov's momentum is optax's, of which the bias is corrected: in the first tens of steps, its
  directions differ from those of torch.optim.Muon.
  """

  def kinds(params: Any) -> Any:
    return {
      path: "matrix" if LAYER_RANGE.search(path) and path.endswith(".kernel") else "other" for path in params
    }

  def dimensions(updates: Any) -> Any:
    # Axes before these two, of layers and of experts, are those of a batch.
    return jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), updates)

  def to_rms(updates: Any, params: Any) -> Any:
    # Orthogonalized, a matrix has the root mean square 1 / sqrt(its longer side).
    return jax.tree.map(lambda update: rms * max(update.shape[-2:]) ** 0.5 * update, updates)

  orthogonalized = contrib.scale_by_muon(
    ns_steps=ns_steps, beta=momentum, nesterov=nesterov, weight_dimension_numbers=dimensions
  )
  matrix = optax.chain(orthogonalized, optax.stateless(to_rms))
  return optax.partition({"matrix": matrix, "other": optax.scale_by_adam(b1, b2, eps)}, kinds)


_BETAS = {"b1": "adam_beta1", "b2": "adam_beta2"}
_ADAM = {**_BETAS, "eps": "adam_epsilon"}
_ADAMW = Optimizer(optax.scale_by_adam, _ADAM)
_ADAMW_8BIT = Optimizer(scale_by_adam_8bit, _ADAM, takes_axes=True)

OPTIMIZERS: dict[str, Optimizer] = {
  "adamw_torch": _ADAMW,
  "adamw_torch_fused": _ADAMW,
  "adamw_torch_xla": _ADAMW,
  "adamw_apex_fused": _ADAMW,
  "adamw_bnb_8bit": _ADAMW_8BIT,
  "adamw_8bit": _ADAMW_8BIT,
  "adamw_torch_8bit": _ADAMW_8BIT,
  "paged_adamw_8bit": _ADAMW_8BIT,
  "adafactor": Optimizer(_adafactor),
  "lion_32bit": Optimizer(_lion, _BETAS),
  "muon": Optimizer(_muon, _ADAM),
  "sgd": Optimizer(_sgd),
}
"""The optimizers by training.optim, under Hugging Face's names. AdamW is the same under all of its names."""


ADDITIONS: dict[str, Callable[[float, Mapping[str, str]], optax.GradientTransformation]] = {
  # Takes the updates as they are added to the weights: the last one.
  "ema_decay": lambda decay, labels: average_weights(decay),
}
"""What training.optim_args adds to any optimizer, in this order: functions of a number and of the labels of what trains."""


_REPLACED = {f"{label}_rate": field for field, label in PARTS.items()}
"""What training.optim_args of version 0.2 multiplied rates by -> the field that says the rate."""


def make_optimizer(
  training: TrainingArguments,
  *,
  labels: Mapping[str, str],
  decay: Mapping[str, bool],
  scales: Mapping[str, np.ndarray] = types.MappingProxyType({}),
  axes: Mapping[str, Sequence[str | None]] = types.MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run, see above.

  Args:
    training: its settings.
    labels: of the parameters that train, by path (`labels.labels_of`).
    decay: which of them decay (`labels.decays`).
    scales: what multiplies the learning rate of some of them (`rates.rate_scales`).
    axes: the names of parameters' axes (`ModelDef.axes`), as far as they are known.

  Raises:
    UserError: training.optim_args are not arguments of it.
  """
  optimizer = OPTIMIZERS[training.optim]
  given = _arguments(training, optimizer)
  fields = {name: getattr(training, field) for name, field in optimizer.fields.items()}
  own = {name: value for name, value in given.items() if name not in ADDITIONS}
  own |= {"axes": axes} if optimizer.takes_axes else {}
  chain = optax.chain(
    optimizer.make(**fields, **own),
    optax.add_decayed_weights(training.weight_decay, mask=dict(decay)),
    *([decay_to_start(training.l2_to_start)] if training.l2_to_start else []),
    scale_by_learning_rate(scales),
    *(add(given[name], labels) for name, add in ADDITIONS.items() if name in given),
  )
  return clip_by_global_norm(chain, training.max_grad_norm)


def _arguments(training: TrainingArguments, optimizer: Optimizer) -> dict[str, Any]:
  """training.optim_args, "name=value,name=value", as values of their types."""
  found: dict[str, Any] = {}
  for entry in (training.optim_args or "").replace(" ", "").split(","):
    if entry:
      name, _, text = entry.partition("=")
      found[name] = _value(training, optimizer, name, text)
  return found


def _value(training: TrainingArguments, optimizer: Optimizer, name: str, text: str) -> float | bool:
  where = f"training.optim_args={training.optim_args!r}"
  if name in optimizer.fields:
    raise UserError(f"{where}: set training.{optimizer.fields[name]} in place of {name}")
  if name in _REPLACED:
    raise UserError(f"{where}: set training.{_REPLACED[name]} in place of {name}, to the rate itself")
  own = optimizer.arguments()
  if name not in own and name not in ADDITIONS:
    known = ", ".join([*own, *ADDITIONS])
    raise UserError(f"{where}: training.optim={training.optim!r} has no argument {name!r}; there are {known}")
  kind = type(own.get(name, 0.0))
  try:
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{where}: {name} must be {wanted}, not {text!r}") from None


def problems(training: TrainingArguments) -> Iterator[str]:
  """What keeps the optimizer's settings from being used, for training.optim that is one of OPTIMIZERS."""
  pull = training.learning_rate * training.l2_to_start
  if pull >= 1:
    yield (
      f"training.l2_to_start={training.l2_to_start:g} times training.learning_rate={training.learning_rate:g} is {pull:g}: each "
      "step would carry the weights past where they began; lower it until the product is well below 1"
    )
  try:
    make_optimizer(training, labels={}, decay={})
  except UserError as error:
    yield str(error)


def idle_settings(training: TrainingArguments) -> list[str]:
  """A line for each setting that training.optim does not read and that was set."""
  default = TrainingArguments()
  read = OPTIMIZERS[training.optim].fields.values()
  paged = training.optim.startswith("paged_")
  lines = (
    [f"training.optim={training.optim!r}: moments stay on the devices, nothing is paged"] if paged else []
  )
  return lines + [
    f"training.{name}={getattr(training, name)!r} has no effect with training.optim={training.optim!r}"
    for name in _MOMENTS
    if name not in read and getattr(training, name) != getattr(default, name)
  ]
