"""A checkpoint's config.json: read into an InternVLConfig, written back with what the run changed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf.families import FAMILIES, Family
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.vit import VisionConfig

# Switches of the ViT whose other values would need other code.
_VISION_CONSTANTS = {"hidden_act": "gelu", "attention_dropout": 0.0, "dropout": 0.0, "num_channels": 3}


def read_config(folder: str | Path) -> dict[str, Any]:
  """The config.json of a checkpoint folder, as a dictionary.

  Raises:
    UserError: no such file, not JSON, or not an InternVL chat model in the `internvl` layout.
  """
  path = Path(folder) / "config.json"
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path}: no such file; a checkpoint folder has a config.json") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: not valid JSON ({error})") from None
  found = config.get("model_type") if isinstance(config, dict) else None
  if found != "internvl_chat":
    raise UserError(f"{path}: model_type is {found!r}, expected 'internvl_chat' (the `internvl` layout)")
  for key in ("vision_config", "llm_config"):
    if not isinstance(config.get(key), dict):
      raise UserError(f"{path}: {key!r} is missing")
  return config


def family_of(config: Mapping[str, Any]) -> Family:
  """The language model family of a checkpoint.

  Raises:
    UserError: a family that is not in the registry.
  """
  name = config["llm_config"].get("model_type")
  if name not in FAMILIES:
    raise UserError(
      f"config.json: llm_config.model_type={name!r} is not supported; known: {sorted(FAMILIES)}"
    )
  return FAMILIES[name]


def model_config(
  config: Mapping[str, Any],
  *,
  image_size: int | None = None,
  select_layer: int | None = None,
  downsample_ratio: float | None = None,
  ps_version: str | None = None,
) -> InternVLConfig:
  """The model that a config.json describes; arguments that are not None take the file's place.

  Raises:
    UserError: a missing entry, an unknown family, or a switch set to a value that this program would
      otherwise ignore.
  """
  family, vision = family_of(config), config["vision_config"]
  _check_constants("vision_config", vision, _VISION_CONSTANTS)
  _check_constants("llm_config", config["llm_config"], family.constants)
  try:
    image_size = int(image_size or config.get("force_image_size") or vision["image_size"])
    _check_tile(image_size, vision["patch_size"])
    return InternVLConfig(
      vision=VisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
        image_size=image_size,
        norm_type=vision.get("norm_type", "rms_norm"),
        qkv_bias=vision["qkv_bias"],
        qk_normalization=vision["qk_normalization"],
        layer_norm_eps=vision["layer_norm_eps"],
        initializer_factor=vision.get("initializer_factor", 0.1),
      ),
      text=family.decoder(config["llm_config"]),
      select_layer=config.get("select_layer", -1) if select_layer is None else select_layer,
      downsample_ratio=downsample_ratio or config["downsample_ratio"],
      ps_version=ps_version or config.get("ps_version", "v1"),
    )
  except KeyError as error:
    raise UserError(f"config.json: the entry {error} is missing") from None


def updated_config(
  config: Mapping[str, Any], model: InternVLConfig, *, dtype: str, **changes: Any
) -> dict[str, Any]:
  """A config.json for a model that was trained on: the original's entries, with what the run fixed.

  Args:
    config: the original.
    model: the model trained.
    dtype: of the weights written, e.g. "bfloat16".
    **changes: further entries of the top level, e.g. template.
  """
  return {
    **config,
    "vision_config": {**config["vision_config"], "image_size": model.vision.image_size},
    "force_image_size": model.vision.image_size,
    "select_layer": model.select_layer,
    "downsample_ratio": model.downsample_ratio,
    "ps_version": model.ps_version,
    "torch_dtype": dtype,
    **changes,
  }


def _check_constants(name: str, config: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
  for key, expected in constants.items():
    found = config.get(key, expected)
    if found != expected:
      raise UserError(f"config.json: {name}.{key}={found!r} is not supported; expected {expected!r}")


def _check_tile(image_size: int, patch_size: int) -> None:
  # Pixel shuffle merges 2x2 patches, so a tile's side must hold an even number of them.
  if image_size % (2 * patch_size):
    raise UserError(
      f"data.force_image_size={image_size} is not a multiple of twice the ViT's patch_size={patch_size}; "
      f"use {max(1, round(image_size / (2 * patch_size))) * 2 * patch_size}"
    )
