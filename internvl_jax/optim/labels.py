"""Which parameters train, and which of them weight decay applies to."""

import re
from collections.abc import Iterable, Mapping

from internvl_jax.arguments import ModelArguments
from internvl_jax.errors import UserError
from internvl_jax.hf.changes import first_trained
from internvl_jax.models.flash import PARTS, UNUSED
from internvl_jax.models.lora import adapter_paths
from internvl_jax.trees import LAYER_RANGE, first_match, submodule_of


def decays(names: Mapping[str, str], undecayed: str) -> dict[str, bool]:
  """Which parameters weight decay applies to, by the rule of the Trainer that trains the family.

  Spared is everything inside a PyTorch LayerNorm (our norms that have a bias), and what `undecayed` is found in.
  By transformers 4.49 those are biases and what has "layernorm" in its name, and all of LLaMA's norms, whose class
  asks for it. RMS norms with other names (Qwen2's last one, all of InternLM2's and of the 6B ViT's), layer scales
  and embeddings do decay; so the reference's runs have it.

  Args:
    names: the reference's name of every parameter, by path: a norm of one family decays, of another it does
      not, for its name.
    undecayed: a regular expression over names in lower case (`Source.undecayed`).
  """

  def spared(path: str, name: str) -> bool:
    layer, _, leaf = path.rpartition(".")
    in_layer_norm = leaf == "scale" and f"{layer}.bias" in names
    return in_layer_norm or re.search(undecayed, name.lower()) is not None

  return {path: not spared(path, name) for path, name in names.items()}


FROZEN, ADAPTERS = "frozen", "adapters"
"""Labels beside the names of the model's parts; see `labels_of`."""


def labels_of(model: ModelArguments, paths: Iterable[str], stage: str = "none") -> dict[str, str]:
  """Labels every parameter by what of it trains, as optax's masks and partitions take it.

  A label is "frozen", "adapters", or the part of the model ("vision_model", "mlp1", "language_model", ...) that the
  parameter trains in. Adapters freeze the rest of their part. A Flash's second projector trains in the stage "consistency"
  only, and its router in the stage "router", where all else is frozen whatever the flags say. That anything trains is a rule
  of the configuration.

  Args:
    model: the freeze flags.
    paths: all parameters.
    stage: flash.stage.

  Raises:
    UserError: a flag thaws what the model does not have, or the flags do not tell whether adapters train.
  """
  paths = list(paths)
  if stage == "router":
    return {path: submodule_of(path) if _routes(path) else FROZEN for path in paths}
  adapters = adapter_paths(paths)
  adapted = set(map(submodule_of, adapters))
  _check_adapters(model, adapted)
  frozen = {
    "vision_model": model.freeze_backbone,
    "mlp1": model.freeze_mlp,
    "language_model": model.freeze_llm,
  } | dict.fromkeys(adapted, True)
  patterns = [(re.escape(path), ADAPTERS) for path in adapters]
  patterns += [(re.escape(path), submodule_of(path)) for path in _thawed(model, paths)]
  patterns += [(rf"{part}\..*", FROZEN if is_frozen else part) for part, is_frozen in frozen.items()]
  # The forward pass of fine-tuning runs nothing of a Flash's own.
  patterns += [
    (rf"{part}\..*", part if stage == "consistency" and part == "mlp2" else FROZEN)
    for part in PARTS
    if any(submodule_of(path) == part for path in paths)
  ]
  return first_match(patterns, paths)


def _routes(path: str) -> bool:
  """Whether a parameter is one of the router that is used."""
  return submodule_of(path) in PARTS and submodule_of(path) != "mlp2" and not path.startswith(UNUSED)


def trained(labels: Mapping[str, str]) -> dict[str, str]:
  """The labels of the parameters that train."""
  return {path: label for path, label in labels.items() if label != FROZEN}


def trainable_paths(model: ModelArguments, paths: Iterable[str], stage: str = "none") -> set[str]:
  """The parameters that train, by the freeze flags; see `labels_of`."""
  return set(trained(labels_of(model, paths, stage)))


def _check_adapters(model: ModelArguments, parts: set[str]) -> None:
  """Refuses adapters of a checkpoint where the flags freeze their part and do not ask for adapters."""
  flags = {
    "vision_model": ("freeze_backbone", "use_backbone_lora"),
    "language_model": ("freeze_llm", "use_llm_lora"),
  }
  for part in parts:
    freeze, rank = flags[part]
    if getattr(model, freeze) and not getattr(model, rank):
      raise UserError(
        f"model.{freeze}=True with model.{rank}=0, but the checkpoint has adapters of {part}: set model.{rank} to their "
        "rank to train them, or merge them first (python -m internvl_jax.convert --lora merge)"
      )


def _thawed(model: ModelArguments, paths: list[str]) -> list[str]:
  """What trains inside a frozen part: the last layers of the ViT, the output embedding."""
  thawed = []
  if model.unfreeze_lm_head:
    thawed = [path for path in paths if path.startswith("language_model.lm_head.")]
    if not thawed:
      raise UserError(
        "model.unfreeze_lm_head=True, but the model's output embedding is its input embedding; set it to False"
      )
  if model.unfreeze_vit_layers:
    spans = {path: LAYER_RANGE.search(path) for path in paths if submodule_of(path) == "vision_model"}
    depth = max(int(span[2]) for span in spans.values() if span)
    # The stack is split there, so no range of layers is on both sides of it.
    start = first_trained(model.unfreeze_vit_layers, depth) or 0
    thawed += [path for path, span in spans.items() if span and int(span[1]) >= start]
  return thawed
