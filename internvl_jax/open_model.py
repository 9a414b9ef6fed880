"""Opens the model of a run as its configuration changes it, with its tokenizer; reads no weights."""

import dataclasses
import os

from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import published, vocabulary
from internvl_jax.hf.changes import Changes
from internvl_jax.hf.model import (
  Source,
  base_folder,
  open_parts,
  open_source,
  source_of_config,
  with_projector,
)
from internvl_jax.hf.tokenizer import add_image_tokens, has_tokenizer, load_tokenizer
from internvl_jax.inference_settings import differences, read_stated
from internvl_jax.models.flash import FlashConfig
from internvl_jax.models.lora import LoRASpec
from internvl_jax.parallel import distributed
from internvl_jax.task_arguments import FlashTrainingConfig


def open_model(config: TrainConfig, *, with_weights: bool = True) -> tuple[Source, PreTrainedTokenizerBase]:
  """The model's description, with what the config changes about it, and its tokenizer with the image tokens.

  Without weights, nothing but the config and the tokenizer needs to be there.

  Raises:
    UserError: the checkpoint cannot be used as the config says.
  """
  model = config.model
  tokenizer, changes = _open_tokenizer(config, with_weights=with_weights)
  read = with_weights and not config.runtime.random_init
  if not model.model_name_or_path:
    assert model.vision_path and model.llm_path, "validate() comes first"
    parts = {"vision_path": model.vision_path, "llm_path": model.llm_path, "mlp_path": model.mlp_path}
    return open_parts(**parts, changes=changes, with_weights=read), tokenizer
  source = open_source(model.model_name_or_path, changes, with_weights=read)
  check_template(config, source)
  tell_differences(config, source, tokenizer)
  return (with_projector(source, model.mlp_path) if model.mlp_path else source), tokenizer


def _open_tokenizer(config: TrainConfig, *, with_weights: bool) -> tuple[PreTrainedTokenizerBase, Changes]:
  """The tokenizer with the image tokens, and the changes with the rows that its tokens need."""
  name = config.model.model_name_or_path or config.model.llm_path or ""
  folder = base_folder(name, with_weights=with_weights)
  tokenizer = load_tokenizer(folder)
  added = add_image_tokens(tokenizer)
  if added:
    logging.info("Added %d image tokens to the tokenizer; it has %d tokens now", added, len(tokenizer))
  runtime = config.runtime
  size, new_rows = vocabulary.fit_embeddings(
    tokenizer, folder, added=added, grow=runtime.grow_vocabulary, with_weights=not runtime.random_init
  )
  vocabulary.check_adapter(tokenizer, name)
  return tokenizer, dataclasses.replace(changes_of(config), vocab_size=size, new_tokens=new_rows)


def open_shapes(config: TrainConfig) -> Source:
  """The model's shapes alone, from config.json and, where there is one, the tokenizer; no weights.

  A published size is not looked up on the hub: its shapes are known.

  Raises:
    UserError: the model cannot be used as the config says.
  """
  name, vision, llm = (
    getattr(config.model, key) for key in ("model_name_or_path", "vision_path", "llm_path")
  )
  size = published.size_of(name) if name and not os.path.isdir(name) else None
  if size is not None:
    # Its router is there once the consistency stage was run.
    router = _router(config.flash) if config.flash.stage != "none" else None
    return source_of_config(published.config_of(size), dataclasses.replace(changes_of(config), flash=router))
  knows_tokens = has_tokenizer(base_folder(name or llm or "", with_weights=False))
  changes = _open_tokenizer(config, with_weights=False)[1] if knows_tokens else changes_of(config)
  if name:
    return open_source(name, changes, with_weights=False)
  assert vision and llm, "validate() comes first"
  return open_parts(vision_path=vision, llm_path=llm, mlp_path=None, changes=changes, with_weights=False)


def changes_of(config: TrainConfig) -> Changes:
  """What the config makes different about the model that the checkpoint holds."""
  model = config.model
  return Changes(
    image_size=config.data.force_image_size,
    select_layer=model.vision_select_layer,
    downsample_ratio=config.data.down_sample_ratio,
    ps_version=model.ps_version,
    unfreeze_vit_layers=model.unfreeze_vit_layers,
    vision_lora=LoRASpec.of(config.lora, model.use_backbone_lora),
    text_lora=LoRASpec.of(config.lora, model.use_llm_lora),
    quantize=config.runtime.quantize,
    quantize_base=config.lora.quantize_base,
    flash=_router(config.flash) if config.flash.stage == "consistency" else None,
  )


def _router(asked: FlashTrainingConfig) -> FlashConfig:
  """What the consistency stage gives a model that has no router."""
  return FlashConfig(relative_threshold=asked.relative_threshold, absolute_threshold=asked.absolute_threshold)


def check_template(config: TrainConfig, source: Source) -> None:
  """Refuses a template that is not the checkpoint's, unless the config says that this is meant."""
  found, asked = source.raw.get("template"), config.data.conv_style
  if found is None or found == asked or config.runtime.allow_other_template:
    return
  raise UserError(
    f"data.conv_style={asked!r}, but the checkpoint was trained with template {found!r} "
    f"({source.folder}/config.json): set it to that, or runtime.allow_other_template=True to teach the model another"
  )


def tell_differences(config: TrainConfig, source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
  """Says which settings of the run, which count, are not what the checkpoint says of itself."""
  try:
    stated = read_stated(source, tokenizer)
    found = differences(stated, config.data)
    theirs = layouts.model_config(source.raw)
    found += [
      f"{flag}={ours!r} ({theirs!r})"
      for flag, ours, theirs in (
        ("model.ps_version", source.config.ps_version, theirs.ps_version),
        ("model.vision_select_layer", source.config.select_layer, theirs.select_layer),
      )
      if ours != theirs
    ]
  except UserError as error:
    logging.warning("What the checkpoint says of how it is asked is not read: %s", error)
    return
  if found and distributed.is_first():
    # Recipes change the numbers of tiles on purpose.
    usual = all("_dynamic_patch=" in line for line in found)
    level = logging.INFO if usual else logging.WARNING
    logging.log(
      level, "The run differs from what the checkpoint (%s) says: %s", source.folder, "; ".join(found)
    )
