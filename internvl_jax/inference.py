"""A finished checkpoint opened for answering: what `evaluate` and `generate` share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.arguments import DataTrainingArguments, MeshConfig
from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.hf import config as layouts
from internvl_jax.hf import entries
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.models.choice import choose_kernels
from internvl_jax.models.internvl import Execution
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
  """A checkpoint with its weights on the device, and the settings it was trained with."""

  source: Source
  params: dict[str, jax.Array]
  tokenizer: ChatTokenizer
  data: DataTrainingArguments
  how: Execution


def open_for_inference(folder: str | Path, *, bf16: bool, devices: int = 1) -> Inference:
  """Opens a checkpoint (see `open_source`); its config.json and preprocessor_config.json say how images are cut.

  Args:
    folder: the checkpoint.
    bf16: whether to compute in bfloat16.
    devices: how many share the weights, and with them heads and the cache (`mesh.tensor`).

  Raises:
    UserError: it cannot be run.
  """
  source = open_source(folder)
  data = data_settings(source)
  dtype = jnp.bfloat16 if bf16 else jnp.float32
  if not bf16:
    jax.config.update("jax_default_matmul_precision", "highest")
  shapes = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in source.model.shapes.items()}
  params = source.load(shapes, _places(source, shapes, devices))
  tokenizer = ChatTokenizer(load_tokenizer(source.folder), data.conv_style)
  how = Execution(dtype=dtype, kernels=choose_kernels(source.config))
  return Inference(source, params, tokenizer, data, how)


def _places(source: Source, shapes: dict[str, jax.ShapeDtypeStruct], devices: int) -> dict[str, Any]:
  """Where the weights go: whole on one device, or spread over several."""
  if devices > len(jax.devices()):
    raise UserError(f"--devices={devices}: there are {len(jax.devices())}")
  if devices == 1:
    return dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
  return dict(rules.weight_shardings(source.model.axes, shapes, mesh))


_RECORDED = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square")
_HF_SETTINGS = {"template": "internvl2_5", "dynamic_image_size": True, "use_thumbnail": True}


def recorded_settings(data: DataTrainingArguments) -> dict[str, Any]:
  """What a checkpoint's config.json records of the data settings, for `data_settings` to read."""
  recorded = {name: getattr(data, name) for name in _RECORDED}
  return {"template": data.conv_style, **recorded}


def data_settings(source: Source) -> DataTrainingArguments:
  """The data settings that a checkpoint's files record."""
  # A foreign checkpoint of the hf layout records nothing; all published ones have these settings.
  raw = {**(_HF_SETTINGS if source.layout is layouts.HF else {}), **source.raw}
  recorded = {name: raw[name] for name in _RECORDED if name in raw}
  if "template" not in raw:
    raise UserError(
      f"{source.folder}/config.json: 'template' is missing; set it to the name of the chat template"
    )
  return DataTrainingArguments(
    force_image_size=source.config.vision.image_size,
    down_sample_ratio=source.config.downsample_ratio,
    conv_style=raw["template"],
    normalize_type=_normalize_type(source.folder),
    **recorded,
  )


def _normalize_type(folder: Path) -> Any:
  """The name of the pixel statistics in preprocessor_config.json; the usual ones if there is no such file."""
  path = folder / "preprocessor_config.json"
  if not path.is_file():
    return "imagenet"
  found = layouts.read_json(path)
  entries.check(f"{path}: ", found, entries.PREPROCESSOR)
  statistics = (tuple(found.get("image_mean", ())), tuple(found.get("image_std", ())))
  for name, known in PIXEL_STATISTICS.items():
    if statistics == known:
      return name
  raise UserError(f"{path}: image_mean and image_std {statistics} are none of {', '.join(PIXEL_STATISTICS)}")
