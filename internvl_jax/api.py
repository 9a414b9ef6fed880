"""The package in Python: what the commands do, by functions. `import internvl_jax` has all of it.

    model = internvl_jax.open_model("OUTPUT_DIR")
    model.answer("What is on the mat?", images=["cat.jpg"])

Errors are those of the commands: a `UserError` has one line for each problem, with the value and the remedy.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from internvl_jax import cli
from internvl_jax.config import FIELDS, TrainConfig
from internvl_jax.config_checks import validate
from internvl_jax.environment import set_environment
from internvl_jax.errors import UserError
from internvl_jax.recipe_files import explain_unknown, load_recipe
from internvl_jax.storage.paths import output_path, path_of

if TYPE_CHECKING:
  from internvl_jax.answering.model import Model

Name: TypeAlias = str | os.PathLike[str]
"""A checkpoint: its folder, its hub id, or the URL of its folder in a bucket."""


def load_config(recipe: str | None = None, fields: Mapping[str, Any] | None = None) -> TrainConfig:
  """The configuration of a run.

  >>> config = load_config("internvl2_5/finetune:1b", {"data.meta_path": "my_meta.json"})
  >>> config.training.learning_rate = 1e-5
  >>> config.model.freeze_backbone, config.data.meta_path
  (True, 'my_meta.json')
  >>> load_config(fields={"training.learningrate": 1e-5})
  Traceback (most recent call last):
  internvl_jax.errors.UserError: training.learningrate: there is no such field; did you mean training.learning_rate?

  Args:
    recipe: a recipe's name, or a Python file, with its argument after a colon; None: the defaults of all fields.
    fields: values by the fields' paths, which go before the recipe's. Values are checked by what takes the configuration.

  Raises:
    UserError: there is no such recipe or field.
  """
  config = TrainConfig() if recipe is None else load_recipe(recipe)
  if unknown := [path for path in fields or {} if path not in FIELDS]:
    raise UserError("\n".join(explain_unknown(path).replace("--config.", "") for path in unknown))
  for path, value in (fields or {}).items():
    leaf, name = path.split(".")
    setattr(getattr(config, leaf), name, value)
  return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A run that has ended, or was told to stop.

  Attributes:
    output_dir: where its files are; the model, if it is `complete`.
    complete: all steps were taken, and the model is saved. A run that was stopped goes on by another call of `train`.
    history: what was logged, an entry for each time: `step`, `epoch`, `loss`, `learning_rate`, ...
  """

  output_dir: str
  complete: bool
  history: list[dict[str, Any]]


def train(config: TrainConfig, *, log: bool = True) -> Trained:
  """Trains a model as `python -m internvl_jax.train` does, or goes on with it from its newest checkpoint.

  >>> trained = train(load_config("my_recipe.py", {"training.max_steps": 2}), log=False)
  >>> [entry["step"] for entry in trained.history if "loss" in entry]
  [1, 2]

  Args:
    config: of the run; see `load_config`.
    log: whether to log as the command does, to stderr.

  Raises:
    UserError: the configuration cannot work, or the data or a checkpoint is wrong.
  """
  set_environment()
  if log:
    cli.set_up_logging()
  from internvl_jax.train.run import train as run

  complete = run(config)
  output_dir = config.training.output_dir
  assert output_dir is not None, "validate() comes first"
  state = json.loads((path_of(output_dir) / "trainer_state.json").read_text())
  return Trained(output_dir=output_dir, complete=complete, history=state["log_history"])


def open_model(model: Name, *, bf16: bool = False, devices: int = 1) -> "Model":
  """Opens a checkpoint to ask it, by the settings of its own files.

  >>> model = open_model("OUTPUT_DIR")
  >>> questions = [Question("What is this?", images=["cat.jpg"]), Question("Who are you?")]
  >>> len(model.answers(questions, max_new_tokens=2))
  2
  >>> list(model.stream("What is this?", images=["cat.jpg"], max_new_tokens=2))
  ['...']
  >>> chat = model.chat(temperature=0.7, seed=1, max_new_tokens=2)
  >>> chat.ask("Which is larger?", images=["cat.jpg", "cat.jpg"]), chat.ask("Why?")
  ('...', '...')
  >>> model.answer("What?", images=["dog.jpg"])
  Traceback (most recent call last):
  internvl_jax.data.where.DataError: the question: image not found: .../dog.jpg; check the question

  Args:
    model: a checkpoint in either layout, a PEFT adapter, a hub id or a bucket's URL.
    bf16: whether to compute in bfloat16.
    devices: how many share the weights, and with them heads and the cache.

  Raises:
    UserError: it cannot be run.
  """
  set_environment()
  from internvl_jax.answering.model import Model
  from internvl_jax.inference import open_for_inference

  return Model(open_for_inference(os.fspath(model), bf16=bf16, devices=devices))


def convert(
  src: Name,
  dst: Name,
  layout: Literal["internvl", "hf"],
  *,
  lora: Literal["merge", "peft"] = "merge",
  dtype: Literal["auto", "bfloat16", "float32"] = "auto",
  code: Name | None = None,
) -> None:
  """Writes a checkpoint in a layout, as `python -m internvl_jax.convert` does.

  >>> convert("OUTPUT_DIR", "converted", "hf")
  >>> verify("OUTPUT_DIR", against="converted").differences["logits"] < 1e-4
  True

  Args:
    src: the checkpoint.
    dst: a folder that is new or empty, here or in a bucket.
    layout: names and config to write.
    lora: what becomes of adapters: merged into the weights, or apart in PEFT's form.
    dtype: of the weights written; "auto": bfloat16 if the source's are.
    code: a folder whose Python files the internvl layout brings along; None: the source's.

  Raises:
    UserError: the source cannot be read, the layout has no form for it, or `dst` is not empty.
  """
  import jax.numpy as jnp

  from internvl_jax.conversion import convert as write
  from internvl_jax.hf.model_config import layout_named

  numbers = {"auto": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
  given = (
    ("layout", layout, ("internvl", "hf")),
    ("lora", lora, ("merge", "peft")),
    ("dtype", dtype, numbers),
  )
  for name, value, known in given:
    if value not in known:
      raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
  write(
    os.fspath(src),
    output_path(os.fspath(dst), "dst"),
    layout_named(layout),
    lora=lora,
    dtype=numbers[dtype],
    code=None if code is None else os.fspath(code),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
  """What a checkpoint computes, beside other numbers.

  Attributes:
    outputs: arrays by name: `logits`, `loss`, `features`, ...
    differences: the largest difference of each array that was compared.
  """

  outputs: dict[str, np.ndarray]
  differences: dict[str, float]


def verify(model: Name, inputs: Name | None = None, *, against: Name | None = None) -> Verification:
  """Runs a checkpoint in float32, as `python -m internvl_jax.verify` does, and compares it.

  Args:
    model: the checkpoint.
    inputs: an .npz of arrays to run on, which are also compared with where they have an output's name; None: a fixed input.
    against: another checkpoint to compare with.

  Raises:
    UserError: a checkpoint or the file cannot be used, or arrays have other shapes.
  """
  from internvl_jax import compiler, verification

  compiler.use_full_precision()
  arrays = None if inputs is None else verification.read_inputs(os.fspath(inputs))
  outputs = verification.compute(os.fspath(model), arrays)
  others = (arrays or {}) if against is None else verification.compute(os.fspath(against), arrays)
  both = [name for name in outputs if name in others]
  for name in both:
    if outputs[name].shape != others[name].shape:
      raise UserError(f"{name}: shapes differ: {outputs[name].shape} and {others[name].shape}")
  differences = {name: float(np.abs(outputs[name] - others[name]).max()) for name in both}
  return Verification(outputs=outputs, differences=differences)


def plan(
  config: TrainConfig,
  topology: str,
  *,
  tokens: int | None = None,
  tiles: int | None = None,
  search: bool = False,
) -> dict[str, Any]:
  """Compiles the training step for devices that need not be there, as `python -m internvl_jax.plan` does.

  Prints the report, and returns it as plain values.

  Args:
    config: of the run.
    topology: the devices, "v5e:4x4" or "h100:8"; of a search their kind, "v5e", or the most of them.
    tokens: of a row; None: the most that the configuration makes.
    tiles: of a row; None likewise.
    search: look for the fewest devices that fit.

  Raises:
    UserError: the configuration cannot work, or no compiler for these devices is installed.
  """
  validate(config, "plan")
  from internvl_jax.aot.planning import Request, compile_once, search_fewest

  request = Request(topology=topology, tokens=tokens, tiles=tiles)
  return (search_fewest if search else compile_once)(config, request)
