"""The adapters of a model: those of the checkpoint, those that are requested, and those that are not supported."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.arguments import LoRAConfig
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf import peft, weights
from internvl_jax.hf.weights import Checkpoint
from internvl_jax.models import functional, lora
from internvl_jax.models.base_weights import as_kernels
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.lora import LoRASpec
from internvl_jax.trees import LAYER_RANGE, submodule_of


def recorded(raw: Mapping[str, Any], checkpoint: Checkpoint | None) -> dict[str, LoRASpec]:
  """The adapters that a reference's checkpoint holds, by part; their alpha is twice the rank.

  Raises:
    UserError: config.json and the tensors contradict each other.
  """
  specs, layout = {}, config_io.layout_of(raw)
  for part, flag in _RANK.items():
    name = flag.removeprefix("model.")
    rank = raw.get(name) or 0
    if checkpoint is not None:
      held = [key for key in checkpoint.shapes if key.startswith(layout.prefix[part]) and ".lora_A." in key]
      ranks = sorted({checkpoint.shapes[key][0] for key in held if checkpoint.shapes[key]}) or [0]
      if ranks != [rank]:
        said = f"config.json says {name}={rank}" if name in raw else f"config.json has no {name}"
        has = (
          f"has adapters of rank {', '.join(map(str, ranks))} in {part}"
          if held
          else f"has no adapters in {part}"
        )
        raise UserError(
          f"{checkpoint.place}: {said}, but the checkpoint {has}; set {name} in config.json to {ranks[-1]}"
          + (
            " (the adapters' alpha is then taken as twice that, as the reference trains them)" if held else ""
          )
        )
    # The reference trains with the defaults, and records the rank alone.
    if (spec := LoRASpec.of(LoRAConfig(), rank)) is not None:
      specs[part] = spec
  return specs


def combined_spec(part: str, requested: LoRASpec | None, stored: LoRASpec | None) -> LoRASpec | None:
  """The adapters that a part gets: the checkpoint's are trained on, with the dropout asked for."""
  if requested is None or stored is None:
    return stored or requested
  fields = {"rank": _RANK[part]} | {
    name: f"lora.{name}" for name in ("alpha", "use_dora", "use_rslora", "targets")
  }
  for field, flag in fields.items():
    ours, theirs = getattr(requested, field), getattr(stored, field)
    # Targets that are not asked for are the checkpoint's.
    if ours != theirs and ours != lora.DEFAULT_TARGETS:
      raise UserError(
        f"{flag} asks for {field} {ours}, but the checkpoint's adapters of {part} have {theirs}; set it to that, or "
        "merge them first: python -m internvl_jax.convert --lora merge"
      )
  return dataclasses.replace(stored, dropout=requested.dropout)


# Modules that take no adapter, by their names here and in checkpoints, and what to do instead.
_NO_PLACE = (
  (
    r"(.*\.)?(mlp1|multi_modal_projector|linear_[12])(\..*)?",
    "the projector takes no adapters: model.freeze_mlp=False trains it whole",
  ),
  (
    r"(.*\b(vision|vit).*\.)?(self_attn|attn|attention)?\.?([qkv]_proj|query|key|value)",
    "the ViT has q, k and v in one map: adapt attn.qkv",
  ),
  (r"(.*\.)?(lm_head|output)", "the head takes no adapters: model.unfreeze_lm_head=True trains it whole"),
  (
    r"(.*\.)?(embed_tokens|tok_embeddings|embeddings.*)",
    "embeddings take no adapters: model.freeze_llm=False trains them, with the language model",
  ),
  (r"(.*\.)?(gate|router|experts.*)", "routers and experts take no adapters"),
)


def _way_out(module: str) -> str:
  """What to do about a module that takes no adapter; empty where nothing is known."""
  name = module.replace("\\", "")
  return next((words for pattern, words in _NO_PLACE if re.fullmatch(pattern, name)), "")


def check_places(checkpoint: Checkpoint, placed: Mapping[str, tuple[int, ...]], table: Sequence[Row]) -> None:
  """Refuses a checkpoint with adapters of modules that take none here.

  Args:
    checkpoint: its tensors.
    placed: shapes of the model's adapter parameters that the checkpoint is to fill.
    table: its names.
  """
  known = {key for path, shape in placed.items() for key in weights.names_of(path, shape, table).keys.flat}
  others = [name for name in checkpoint.shapes if peft.IN_TENSORS in name and name not in known]
  if others:
    module = others[0].partition(peft.IN_TENSORS)[0]
    words = " (" + _way_out(module) + ")" if _way_out(module) else ""
    raise UserError(
      f"{checkpoint.where[others[0]]}: the adapter of {module} has no place{words}, nor have {len(others) - 1} more of its "
      f"tensors. {peft.MERGE_FIRST}"
    )


def check_targets(model: functional.ModelDef, specs: Mapping[str, LoRASpec]) -> None:
  """Refuses targets that name no linear map: a part without adapters would train whole, or not at all."""
  adapted = {(submodule_of(path), linear_map(path)) for path in lora.adapter_paths(model.shapes)}
  kernels = as_kernels(model.shapes)
  maps = {part: sorted({linear_map(path) for path in kernels if is_map(path, part)}) for part in specs}
  for part, spec in specs.items():
    if not any(found == part for found, _ in adapted):
      ways = [f"; {way}" for way in dict.fromkeys(map(_way_out, spec.targets)) if way]
      raise UserError(
        f"lora.targets={spec.targets} name no linear map of {part}; it has {', '.join(maps[part])}{''.join(ways)}; or set "
        f"{_RANK[part]}=0"
      )
  for target in {target for spec in specs.values() for target in spec.targets}:
    alone = LoRASpec(rank=1, alpha=1.0, targets=(target,))
    if target not in lora.DEFAULT_TARGETS and not any(alone.adapts(path) for _, path in adapted):
      known = sorted({path for paths in maps.values() for path in paths})
      way = f"; {_way_out(target)}" if _way_out(target) else ""
      raise UserError(f"lora.targets: {target!r} names no linear map; there are {', '.join(known)}{way}")


def linear_map(path: str) -> str:
  """The linear map in its layer that a kernel or an adapter's parameter belongs to."""
  return LAYER_RANGE.split(path)[-1].partition(lora.MARK)[0].removesuffix(".kernel")


def is_map(path: str, part: str) -> bool:
  """Whether a parameter is the kernel of a linear map in the layers of a part."""
  return submodule_of(path) == part and path.endswith(".kernel") and LAYER_RANGE.search(path) is not None


_RANK = {"vision_model": "model.use_backbone_lora", "language_model": "model.use_llm_lora"}
