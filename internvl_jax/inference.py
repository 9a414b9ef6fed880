"""A finished checkpoint opened for answering: what `evaluate` and `generate` share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from internvl_jax import compiler
from internvl_jax.arguments import DataTrainingArguments, MeshConfig
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.hf.changes import Changes
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.inference_settings import read_stated
from internvl_jax.models.choice import choose_kernels
from internvl_jax.models.internvl import Execution, InternVLConfig
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
  """A checkpoint with its weights on the device, and its own settings of prompts and images.

  Attributes:
    source: the checkpoint.
    params: its weights.
    tokenizer: of questions and answers, with its template and system message.
    data: how images are cut and normalized.
    how: how the forward pass is computed.
    stop_ids: ids that end an answer.
    max_new_tokens: longest answer by the checkpoint's generation_config.json; None without an entry.
  """

  source: Source
  params: dict[str, jax.Array]
  tokenizer: ChatTokenizer
  data: DataTrainingArguments
  how: Execution
  stop_ids: tuple[int, ...]
  max_new_tokens: int | None


def open_for_inference(folder: str | Path, *, bf16: bool, devices: int = 1) -> Inference:
  """Opens a checkpoint (see `open_source`) for answering, with the settings of its own files (see `read_stated`).

  Args:
    folder: the checkpoint.
    bf16: whether to compute in bfloat16.
    devices: how many share the weights, and with them heads and the cache (`mesh.tensor`).

  Raises:
    UserError: it cannot be run.
  """
  source = open_source(folder, by_layer(devices))
  # Before the weights are read, which takes long.
  files = open_tokenizer(folder)
  stated = read_stated(source, files)
  stated.log()
  tokenizer = ChatTokenizer(files, stated.template, rows=source.config.text.vocab_size)
  stop_ids = tuple(dict.fromkeys((tokenizer.stop_token_id, *stated.generation.stop_ids)))
  ends = (repr(tokenizer.decode([i], special=True)) for i in stop_ids)
  logging.info("An answer ends at %s", ", ".join(ends))
  for note in stated.generation.notes:
    logging.warning("%s", note)
  how = execution(source.config, bf16=bf16)
  return Inference(
    source=source,
    params=load_params(source, how, devices),
    tokenizer=tokenizer,
    data=stated.data,
    how=how,
    stop_ids=stop_ids,
    max_new_tokens=stated.generation.max_new_tokens,
  )


def execution(config: InternVLConfig, *, bf16: bool) -> Execution:
  """How answers of a model are computed, in bfloat16 or in full float32."""
  if not bf16:
    compiler.use_full_precision()
  return Execution(dtype=jnp.bfloat16 if bf16 else jnp.float32, kernels=choose_kernels(config))


def load_params(source: Source, how: Execution, devices: int = 1) -> dict[str, jax.Array]:
  """A checkpoint's weights in the dtype that is computed in, on so many devices.

  Raises:
    UserError: there are fewer devices, or the weights cannot be read.
  """
  shapes = {path: jax.ShapeDtypeStruct(leaf.shape, how.dtype) for path, leaf in source.model.shapes.items()}
  return source.load(shapes, _places(source, shapes, devices))


def by_layer(devices: int = 1) -> Changes:
  """What is different about a model that only answers: on a CPU, each layer's weights are arrays of their own."""
  return Changes(stacked=devices > 1 or jax.default_backend() != "cpu")


def _places(source: Source, shapes: dict[str, jax.ShapeDtypeStruct], devices: int) -> dict[str, Any]:
  """The shardings of the weights: whole on one device, or sharded over several."""
  if devices > len(jax.devices()):
    raise UserError(f"--devices={devices}: there are {len(jax.devices())}")
  if devices == 1:
    return dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
  return dict(rules.weight_shardings(source.model.axes, shapes, mesh))
