"""Saving a model so that its folder stands alone: weights, config, tokenizer, preprocessor, generation config."""

import collections
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.errors import UserError
from internvl_jax.hf import config as config_io
from internvl_jax.hf import entries, weights
from internvl_jax.hf.config import Layout
from internvl_jax.hf.model import Source
from internvl_jax.hf.tokenizer import save_tokenizer
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.outputs import write_json

IMAGE_TOKEN = "<IMG_CONTEXT>"

# What transformers' InternVLProcessor asks its tokenizer for.
_TOKEN_NAMES = {
  "start_image_token": "<img>",
  "end_image_token": "</img>",
  "context_image_token": IMAGE_TOKEN,
  "video_token": "<video>",
}

# ChatML with images and videos in a message's content, for InternVLProcessor.apply_chat_template.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<IMG_CONTEXT>
{% elif part['type'] == 'video' -%}
<video>
{% elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def save_model(
  target: str | Path,
  source: Source,
  params: Mapping[str, Any],
  *,
  layout: Layout,
  dtype: jnp.dtype,
  tokenizer: PreTrainedTokenizerBase,
  normalize_type: str,
  eos_token_id: int | list[int] | None = None,
  settings: Mapping[str, Any] | None = None,
  writes: bool = True,
) -> None:
  """Writes a model that stands alone.

  In the internvl layout, the source's Python files come along, so that the reference's own code opens the folder.

  Args:
    target: the folder; made if missing, other files in it stay.
    source: where the model came from, its adapters merged (`adapters.merge_and_check`).
    params: all parameters by path, as arrays or to be read when they are written (`Source.lazy`).
    layout: of the files written.
    dtype: of the weights written.
    tokenizer: with the image tokens.
    normalize_type: statistics of the pixels, for preprocessor_config.json.
    eos_token_id: id that ends an answer; None keeps the source's.
    settings: entries of config.json that the run fixed, beside those of the model.
    writes: False for a process that only helps another one to read `params`, whose shards lie on several hosts.

  Raises:
    UserError: the layout has no form for the model.
  """
  target = Path(target)
  # Everything that can be refused comes before the first file.
  table = layout.table(config_io.family_of(source.raw), source.config)
  if IMAGE_TOKEN not in tokenizer.get_vocab():
    raise UserError(
      f"{source.folder}: its tokenizer has no token {IMAGE_TOKEN}; take the one of an InternVL model"
    )
  config = config_io.written_config(
    source.raw,
    source.config,
    layout,
    dtype=np.dtype(dtype).name,
    image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
    **(settings or {}),
  )
  generation = _generation(source.folder, eos_token_id)
  tensors = weights.tensors(params, table, np.dtype(dtype))
  if not writes:
    collections.deque(tensors, maxlen=0)
    return
  weights.save(target, tensors)
  write_json(target / "config.json", config)
  write_json(target / "generation_config.json", generation)
  save_tokenizer(tokenizer, source.folder, target, portable=layout is config_io.HF)
  if layout is config_io.HF:
    _write_processor(target, source.config, normalize_type, config)
  else:
    write_json(target / "preprocessor_config.json", _clip_preprocessor(source.config, normalize_type))
    for code in source.folder.glob("*.py"):
      shutil.copyfile(code, target / code.name)


def _generation(folder: Path, eos_token_id: int | list[int] | None) -> dict[str, Any]:
  path = folder / "generation_config.json"
  found = config_io.read_json(path) if path.is_file() else {}
  entries.check(f"{path}: ", found, entries.GENERATION)
  return found if eos_token_id is None else {**found, "eos_token_id": eos_token_id}


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


def _write_processor(
  target: Path, config: InternVLConfig, normalize_type: str, settings: Mapping[str, Any]
) -> None:
  """What transformers' InternVLProcessor reads beside the tokenizer."""
  mean, std = PIXEL_STATISTICS[normalize_type]
  side = config.vision.image_size
  image_processor = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "processor_class": "InternVLProcessor",
    "do_resize": True,
    "size": {"height": side, "width": side},
    "resample": 3,
    "crop_to_patches": bool(settings.get("dynamic_image_size", True)),
    "min_patches": settings.get("min_dynamic_patch", 1),
    "max_patches": settings.get("max_dynamic_patch", 12),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
    "do_convert_rgb": True,
  }
  write_json(target / "preprocessor_config.json", image_processor)
  processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile}
  write_json(target / "processor_config.json", processor)
  path = target / "tokenizer_config.json"
  found = json.loads(path.read_text(encoding="utf-8"))
  extra = found.get("extra_special_tokens")
  names = {**extra, **_TOKEN_NAMES} if isinstance(extra, dict) else _TOKEN_NAMES
  write_json(path, {**found, "processor_class": "InternVLProcessor", "extra_special_tokens": names})
  if settings.get("template") == "internvl2_5" and not (target / "chat_template.jinja").exists():
    if "chat_template" not in found:
      (target / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
