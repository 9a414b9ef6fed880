"""The task interface: samples, batch, objective and hooks of a way to learn. Packages above never ask which task it is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from transformers import PreTrainedTokenizerBase

from internvl_jax.batch import TokenBatch
from internvl_jax.callbacks import Callback
from internvl_jax.config import TrainConfig
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.task import DataTask
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.hf.model import Source
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.step import Objective
from internvl_jax.watchdog import Watchdog

Program = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of all parameters by path and of more inputs, and the shapes of these."""

Shapes = Mapping[str, Any]
"""Parameters, or their shapes with shardings, by path."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RunContext:
  """What a run has opened when its task's hooks are made.

  Attributes:
    config: all settings.
    source: the model.
    tokenizer: the model's.
    objective: what the task makes of the model.
    mesh: the devices.
    chat: the tokenizer.
    make_loader: `TrainLoader`, but for the leaves of the config that it takes first.
    watchdog: is told what the run is at.
  """

  config: TrainConfig
  source: Source
  tokenizer: PreTrainedTokenizerBase
  objective: Any
  mesh: jax.sharding.Mesh
  make_loader: Callable[..., TrainLoader]
  chat: ChatTokenizer
  watchdog: Watchdog


class Hooks(Protocol):
  """What a task does at certain moments of a run."""

  @property
  def data(self) -> DataTask:
    """The task's data, with what a run knows beside."""
    ...

  @property
  def needs_start(self) -> bool:
    """Whether `prepare` takes all parameters as the run began with them, also where it goes on from a checkpoint."""
    ...

  @property
  def evaluates(self) -> bool:
    """Whether there is something that `evaluate` scores; known once `prepare` was called."""
    ...

  def before_weights(self, loader: TrainLoader) -> None:
    """Is called before the model's weights are read, while the devices' memory is free; on all hosts at once.

    Args:
      loader: of the run.
    """
    ...

  def source(self, loader: TrainLoader) -> TrainLoader:
    """Where batches come from: the loader of the data, or what stands in its place and asks it for samples."""
    ...

  def callbacks(self, log: RunLog) -> Sequence[Callback]:
    """What of the task watches the loop."""
    ...

  def prepare(self, params: Mapping[str, jax.Array], loader: TrainLoader, *, resumes: bool) -> None:
    """Is called before the first step, on all hosts at once.

    Args:
      params: the parameters by path, as they are in the checkpoint: all, or those that do not train.
      loader: of the run.
      resumes: the run goes on from a checkpoint.
    """
    ...

  def first_batch(self, params: dict[str, jax.Array], batch: Any) -> None:
    """Sees the first batch of a run that begins, and raises if something is wrong.

    Raises:
      UserError: what.
    """
    ...

  def evaluate(self, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Scores held-out samples: metrics by the names that they are logged under; empty where there are none."""
    ...


class PlainHooks:
  """The hooks of a task that does nothing beside its steps; those of others inherit what they do not need.

  Attributes:
    data: the task's.
  """

  needs_start = False
  evaluates = False

  def __init__(self, data: DataTask):
    """Keeps the data."""
    self.data = data

  def source(self, loader: TrainLoader) -> TrainLoader:
    """The loader itself."""
    return loader

  def callbacks(self, log: RunLog) -> Sequence[Callback]:
    """None."""
    del log
    return ()

  def before_weights(self, loader: TrainLoader) -> None:
    """Does nothing."""

  def prepare(self, params: Mapping[str, jax.Array], loader: TrainLoader, *, resumes: bool) -> None:
    """Does nothing."""

  def first_batch(self, params: dict[str, jax.Array], batch: Any) -> None:
    """Does nothing."""

  def evaluate(self, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Scores nothing."""
    del params
    return {}


def _nothing_beside(objective: Any, mesh: jax.sharding.Mesh, batch: Any) -> Mapping[str, Program]:
  del objective, mesh, batch
  return {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task:
  """A way to learn: its parts, of which most have a default.

  Attributes:
    name: what it is called, in the name of the file `<name>_results.json`.
    data: kind of line, and how samples become batches.
    make_objective: makes what is minimized, from the fields of `objectives.ForwardPass`.
    batch: the NamedTuple of a batch, whose fields declare their axes.
    sizes: function of a row's tokens S -> sizes of the axes that are the batch's own, by their letters.
    twice: the parts of the model that the objective runs a second time ("language_model", ...).
    abstract_copies: function (parameters or their shapes, paths of those that train) -> shapes and shardings of further
      frozen arrays, by a path that begins with `copy_prefix`; each is a copy of the parameter that the rest names.
    copy_prefix: what the paths of those copies begin with.
    held_out: setting -> meta file of held-out samples, or None.
    frame_name: the text before the number of a video's frame, for those who serve the model; None is the layout's.
    shown_terms: metrics of its objective that log lines show: name -> text with a format, "margin {:.3g}".
    beside: function (objective, mesh, shapes of a step's batch) -> programs on the devices that it runs beside the step, for
      plans: name -> function of all parameters and of more inputs, and the shapes of these.
    open_hooks: makes what it does at certain moments of a run; None: nothing.
  """

  name: str
  data: DataTask
  make_objective: Callable[..., Objective]
  batch: type = TokenBatch
  sizes: Callable[[int], Mapping[str, int]] = lambda tokens: {}
  twice: tuple[str, ...] = ()
  abstract_copies: Callable[[Shapes, set[str]], dict[str, jax.ShapeDtypeStruct]] = lambda params, trainable: {}
  copy_prefix: str = ""
  held_out: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  frame_name: str | None = None
  shown_terms: Mapping[str, str] = dataclasses.field(default_factory=dict)
  beside: Callable[[Any, jax.sharding.Mesh, Any], Mapping[str, Program]] = _nothing_beside
  open_hooks: Callable[[RunContext], Hooks] | None = None

  def hooks(self, context: RunContext) -> Hooks:
    """What it does at certain moments of a run."""
    return PlainHooks(self.data) if self.open_hooks is None else self.open_hooks(context)
