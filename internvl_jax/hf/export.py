"""Saves a self-contained checkpoint folder: weights, config, tokenizer, preprocessor, generation config."""

import collections
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.errors import UserError
from internvl_jax.hf import entries, saving
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.model import Source
from internvl_jax.hf.model_config import Layout
from internvl_jax.hf.tokenizer import save_for_processor, save_tokenizer
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.outputs import explained, write_json
from internvl_jax.storage.paths import AnyPath, filled, path_of

IMAGE_TOKEN = "<IMG_CONTEXT>"

WEIGHTS_FROM = "weights_from"
"""The entry of config.json that tells an average of weights, or an interpolation, from the last weights of a run."""

_AUTO_MAP = {
  "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
  "AutoModel": "modeling_internvl_chat.InternVLChatModel",
  "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """How a saved model is asked.

  Attributes:
    chat_template: in Jinja, for the layout that is written.
    video_token: what stands for a video in it.
    begins_with_bos: it begins a conversation with the bos token.
  """

  chat_template: str
  video_token: str
  begins_with_bos: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
  """The form in which a model is saved, and what its folder holds beside the weights.

  Attributes:
    layout: of the files.
    dtype: of the weights.
    tokenizer: with the image tokens.
    normalize_type: statistics of the pixels, for preprocessor_config.json.
    serving: how the model is asked; the hf layout needs it.
    eos_token_id: id that ends an answer; None keeps the source's.
    settings: entries of config.json that the run fixed, beside those of the model.
    code: a folder with the Python files of the internvl layout; None: the source's, if it has some.
    weights_from: which weights these are, where config.json has to tell ("the average of the weights ..."); None: it does not.
  """

  layout: Layout
  dtype: Any
  tokenizer: PreTrainedTokenizerBase
  normalize_type: str
  serving: Serving | None = None
  eos_token_id: int | list[int] | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  code: Path | None = None
  weights_from: str | None = None


def save_model(
  target: str | AnyPath,
  source: Source,
  params: Mapping[str, Any],
  files: ModelFiles,
  *,
  remedy: str = "make room and start the same command again",
  writes: bool = True,
) -> None:
  """Writes a self-contained checkpoint: weights, config.json, tokenizer, preprocessor, generation_config.json.

  In the internvl layout, the Python files of `files.code` or the source are copied, so that the reference's own code
  opens the folder.

  Args:
    target: the folder, or one of a bucket; made if missing, other files in it stay.
    source: where the model came from, its adapters merged (`adapters.merge_and_check`).
    params: all parameters by path, as arrays or to be read when they are written (`Source.lazy`).
    files: in which form.
    remedy: what to do where the disk is full.
    writes: False for a process that only helps another one to read `params`, whose shards are on several hosts.

  Raises:
    UserError: the layout has no form for the model, the disk is full, or the bucket refuses.
  """
  target, dtype = path_of(target), np.dtype(files.dtype)
  # Everything that can be refused comes before the first file.
  table = files.layout.table(config_io.family_of(source.raw), source.config)
  config, generation = _config(source, files), _generation(source, files)
  tensors = saving.tensors(params, table, dtype)
  if not writes:
    collections.deque(tensors, maxlen=0)
    return
  sizes = saving.tensor_bytes(params, table, dtype)
  with explained(target, "the model", lambda: remedy):
    saving.save(target, tensors, files_in_all=saving.count_files(sizes))
    with filled(target) as folder:
      write_json(folder / "config.json", config)
      write_json(folder / "generation_config.json", generation)
      if files.layout is config_io.HF:
        _save_hf_files(folder, source, files, config)
      else:
        _save_internvl_files(folder, source, files)


def _config(source: Source, files: ModelFiles) -> dict[str, Any]:
  """The config.json that is written."""
  ids = files.tokenizer.get_vocab()
  if IMAGE_TOKEN not in ids:
    raise UserError(
      f"{source.folder}: its tokenizer has no token {IMAGE_TOKEN}; take the one of an InternVL model"
    )
  config = config_io.written_config(
    source.raw,
    source.config,
    files.layout,
    dtype=np.dtype(files.dtype).name,
    image_token_id=ids[IMAGE_TOKEN],
    **files.settings,
  )
  # What it says of the source's weights is not true of others.
  config.pop(WEIGHTS_FROM, None)
  if files.weights_from is not None:
    config[WEIGHTS_FROM] = files.weights_from
  if files.layout is config_io.INTERNVL and files.code is not None:
    config["auto_map"] = auto_map(files.code)
  return config


def _generation(source: Source, files: ModelFiles) -> dict[str, Any]:
  """The generation_config.json that is written."""
  generation = generation_of(source.folder)
  return generation if files.eos_token_id is None else {**generation, "eos_token_id": files.eos_token_id}


def _save_hf_files(folder: Path, source: Source, files: ModelFiles, config: Mapping[str, Any]) -> None:
  assert files.serving is not None
  save_processor(
    folder, source.folder, source.config, files.tokenizer, files.normalize_type, config, files.serving
  )


def _save_internvl_files(folder: Path, source: Source, files: ModelFiles) -> None:
  save_tokenizer(files.tokenizer, source.folder, folder)
  if source.layout is config_io.HF and files.serving is not None:
    _replace_chat_template(folder, files.serving.chat_template)
  write_json(folder / "preprocessor_config.json", _clip_preprocessor(source.config, files.normalize_type))
  for file in (files.code or source.folder).glob("*.py"):
    shutil.copyfile(file, folder / file.name)


def auto_map(folder: Path) -> dict[str, Any]:
  """Where the code of the internvl layout in a folder has its classes, for the auto_map of config.json.

  Raises:
    UserError: the folder has no such code.
  """
  path = folder / "config.json"
  found = config_io.read_json(path).get("auto_map") if path.is_file() else None
  classes: Any = found if isinstance(found, dict) and found else _AUTO_MAP
  lacking = missing_code(classes, folder)
  if lacking or not any(folder.glob("*.py")):
    raise UserError(
      f"{folder}: {' and '.join(lacking) or '*.py'} is not there; name the folder of a checkpoint of the internvl layout "
      "with its code, such as OpenGVLab's of the same size"
    )
  return dict(classes)


def missing_code(classes: Mapping[str, Any], folder: Path) -> list[str]:
  """The Python files that an auto_map names and a folder lacks; those of other repositories are not looked for."""
  names = [str(name) for name in classes.values() if "--" not in str(name)]
  files = sorted({f"{name.split('.')[0]}.py" for name in names})
  return [file for file in files if not (folder / file).is_file()]


def has_code(source: Source) -> bool:
  """Whether an export in the internvl layout opens by code that the source brings."""
  classes = source.raw.get("auto_map") if source.layout is config_io.INTERNVL else None
  return isinstance(classes, dict) and bool(classes) and not missing_code(classes, source.folder)


def generation_of(folder: Path) -> dict[str, Any]:
  """A checkpoint's generation_config.json; an empty one if there is none."""
  path = folder / "generation_config.json"
  found = config_io.read_json(path) if path.is_file() else {}
  entries.check(f"{path}: ", found, entries.GENERATION)
  return found


def _clip_preprocessor(config: InternVLConfig, normalize_type: str) -> dict[str, Any]:
  mean, std = PIXEL_STATISTICS[normalize_type]
  side = config.vision.image_size
  return {
    "image_processor_type": "CLIPImageProcessor",
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_resize": True,
    "size": side,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": side,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
  }


def save_processor(
  target: Path,
  source_folder: Path,
  config: InternVLConfig,
  tokenizer: PreTrainedTokenizerBase,
  normalize_type: str,
  settings: Mapping[str, Any],
  serving: Serving,
) -> None:
  """Writes what transformers' InternVLProcessor reads: tokenizer, chat template, processors of images and videos.

  Args:
    target: the folder, which must be there.
    source_folder: where the tokenizer came from.
    config: the model.
    tokenizer: with the image tokens.
    normalize_type: statistics of the pixels.
    settings: how images are cut, by the names of `DataTrainingArguments`.
    serving: how the model is asked.
  """
  names = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": serving.video_token,
  }
  save_for_processor(
    tokenizer,
    source_folder,
    target,
    chat_template=serving.chat_template,
    begins_with_bos=serving.begins_with_bos,
    names=names,
  )
  for name, content in _processor_files(config, normalize_type, settings).items():
    write_json(target / name, content)


def _processor_files(
  config: InternVLConfig, normalize_type: str, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """The files of transformers' processors of images and videos, by name; see `save_processor`."""
  mean, std = PIXEL_STATISTICS[normalize_type]
  side = config.vision.image_size
  pixels = {
    "processor_class": "InternVLProcessor",
    "do_resize": True,
    "size": {"height": side, "width": side},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
    "do_convert_rgb": True,
  }
  # One tile is said by the numbers of tiles: the processor asks for cutting, whatever this file says.
  dynamic = settings.get("dynamic_image_size", True)
  image_processor = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "crop_to_patches": True,
    "min_patches": settings.get("min_dynamic_patch", 1) if dynamic else 1,
    "max_patches": settings.get("max_dynamic_patch", 12) if dynamic else 1,
  }
  video_processor = {"video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False}
  return {
    "preprocessor_config.json": {**image_processor, **pixels},
    "video_preprocessor_config.json": {**video_processor, **pixels},
    "processor_config.json": {
      "processor_class": "InternVLProcessor",
      "image_seq_length": config.tokens_per_tile,
    },
  }


def _replace_chat_template(folder: Path, chat_template: str) -> None:
  """Gives a tokenizer of the hf layout the chat template of the internvl layout, which says <image>."""
  (folder / "chat_template.json").unlink(missing_ok=True)
  (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
  path = folder / "tokenizer_config.json"
  found = config_io.read_json(path) if path.is_file() else {}
  # The processor's names, of which one may be a token for videos that this layout has no use for.
  others = {key: value for key, value in found.items() if key not in ("chat_template", "processor_class")}
  if isinstance(others.get("extra_special_tokens"), dict):
    del others["extra_special_tokens"]
  write_json(path, others)
