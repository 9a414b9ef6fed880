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
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.inference_settings import read_stated
from internvl_jax.models.choice import choose_kernels
from internvl_jax.models.internvl import Execution
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
  source = open_source(folder)
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
  dtype = jnp.bfloat16 if bf16 else jnp.float32
  if not bf16:
    compiler.use_full_precision()
  shapes = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in source.model.shapes.items()}
  params = source.load(shapes, _places(source, shapes, devices))
  how = Execution(dtype=dtype, kernels=choose_kernels(source.config))
  return Inference(
    source=source,
    params=params,
    tokenizer=tokenizer,
    data=stated.data,
    how=how,
    stop_ids=stop_ids,
    max_new_tokens=stated.generation.max_new_tokens,
  )


def _places(source: Source, shapes: dict[str, jax.ShapeDtypeStruct], devices: int) -> dict[str, Any]:
  """The shardings of the weights: whole on one device, or sharded over several."""
  if devices > len(jax.devices()):
    raise UserError(f"--devices={devices}: there are {len(jax.devices())}")
  if devices == 1:
    return dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
  return dict(rules.weight_shardings(source.model.axes, shapes, mesh))
