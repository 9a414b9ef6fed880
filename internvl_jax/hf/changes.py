"""What a run changes about the model of a checkpoint: sizes, adapters, vocabulary."""

import dataclasses
from collections.abc import Mapping

from internvl_jax.errors import UserError
from internvl_jax.hf import flash
from internvl_jax.models.flash import FlashConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.lora import LoRASpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
  """What a run makes different about the model that a checkpoint holds; None and 0 leave it as it is.

  Attributes:
    image_size: side of a tile; the position embeddings are resized.
    select_layer, downsample_ratio, ps_version: see InternVLConfig.
    unfreeze_vit_layers: the first layer of the ViT that trains, counted as in Python; the stack is split there.
    vision_lora, text_lora: adapters. Where the checkpoint has some of the same rank, they are trained on.
    vocab_size: rows of the embeddings; the last `new_tokens` are of tokens that have none yet.
    new_tokens: how many.
    quantize: see InternVLConfig.
    quantize_base: the format of the frozen weights of the parts that have adapters; see DecoderConfig.
    stacked: see DecoderConfig.
    flash: the router that a model gets which has none.
  """

  image_size: int | None = None
  select_layer: int | None = None
  downsample_ratio: float | None = None
  ps_version: str | None = None
  unfreeze_vit_layers: int = 0
  vision_lora: LoRASpec | None = None
  text_lora: LoRASpec | None = None
  vocab_size: int | None = None
  new_tokens: int = 0
  quantize: str = "none"
  quantize_base: str = "none"
  stacked: bool = True
  flash: FlashConfig | None = None


UNCHANGED = Changes()
"""The model as the checkpoint has it."""


def changed(
  config: InternVLConfig, changes: Changes, specs: Mapping[str, LoRASpec | None], *, tied: bool
) -> InternVLConfig:
  """The model with the changes.

  Args:
    config: the model that a checkpoint holds.
    changes: what is different.
    specs: the adapters by part of the model; None for a part without.
    tied: whether the output embedding is the input embedding.

  Raises:
    UserError: the changes do not fit the model.
  """
  image_size = changes.image_size or config.vision.image_size
  ratio = changes.downsample_ratio or config.downsample_ratio
  stored = {part: changes.quantize_base if spec else "none" for part, spec in specs.items()}
  # A Flash merges the patches a second time.
  _check_tile(image_size, config.vision.patch_size, ratio, times=1 if config.flash is None else 2)
  vision = dataclasses.replace(
    config.vision,
    image_size=image_size,
    split=first_trained(changes.unfreeze_vit_layers, config.vision.num_layers),
    lora=specs["vision_model"],
    quantize_base=stored["vision_model"],
  )
  text = dataclasses.replace(
    config.text,
    vocab_size=changes.vocab_size or config.text.vocab_size,
    tie_word_embeddings=tied,
    stacked=changes.stacked,
    lora=specs["language_model"],
    quantize_base=stored["language_model"],
  )
  select_layer = config.select_layer if changes.select_layer is None else changes.select_layer
  made = InternVLConfig(
    vision=vision,
    text=text,
    select_layer=select_layer,
    downsample_ratio=ratio,
    ps_version=changes.ps_version or config.ps_version,
    flash=config.flash,
    quantize=changes.quantize,
  )
  _check_select_layer(made)
  flash.check_sizes(made)
  return made


def _check_select_layer(config: InternVLConfig) -> None:
  try:
    config.vision.layers_run(config.select_layer)
  except ValueError as error:
    raise UserError(str(error)) from None


def _check_tile(image_size: int, patch_size: int, ratio: float, *, times: int) -> None:
  # Pixel shuffle merges squares of patches, so a tile's side must hold a whole number of them.
  merged = round(1 / ratio)
  if abs(merged * ratio - 1) > 1e-6:
    raise UserError(
      f"data.down_sample_ratio={ratio:g} merges no whole number of patches; use 0.5, which all published models have"
    )
  merged **= times
  step = merged * patch_size
  if image_size % step:
    factor = "twice" if merged == 2 else f"{merged} times"
    why = "" if times == 1 else f", as {flash.NAME} needs it to compress a tile"
    raise UserError(
      f"data.force_image_size={image_size} is not a multiple of {factor} the ViT's patch_size={patch_size}{why}; use "
      f"{max(1, round(image_size / step)) * step}"
    )


def first_trained(start: int, num_layers: int) -> int | None:
  """The first layer that trains where `layers[start:]` do; None for all or none of them.

  Raises:
    UserError: `start` names no layer.
  """
  if start and not -num_layers <= start < num_layers:
    raise UserError(
      f"model.unfreeze_vit_layers={start} names no layer of a ViT of {num_layers}; use {-num_layers} to "
      f"{num_layers - 1}"
    )
  return start % num_layers or None
