"""LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors beside a base model.

Keys are those of the base model's modules in memory, with `base_model.model.` before them; the base model is the
whole InternVL.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.errors import UserError
from internvl_jax.hf import dtypes, entries, hub, saving, weights
from internvl_jax.hf.files import ADAPTER, read_json, shown
from internvl_jax.hf.model_config import Layout
from internvl_jax.hf.weights import Checkpoint, Rename
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.lora import MARK, LoRASpec, adapter_paths
from internvl_jax.outputs import explained, write_json
from internvl_jax.storage.paths import AnyPath, filled, path_of
from internvl_jax.storage.snapshots import url_of
from internvl_jax.trees import LAYER_RANGE, select, submodule_of

CONFIG, WEIGHTS = "adapter_config.json", ADAPTER

MERGE_FIRST = (
  "To use it, merge it where PEFT is: PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(new), "
  "and open what that writes, with the base model's tokenizer beside it"
)
"""The way out for adapters that cannot be kept apart."""

# Entries of adapter_config.json that are read, or that do not affect what a trained adapter computes.
_READ = ("base_model_name_or_path", "lora_alpha", "alpha_pattern", "lora_dropout", "use_dora", "use_rslora")
_INERT = (
  "r",  # The tensors have it.
  "rank_pattern",
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
  "auto_mapping",
  "ensure_weight_tying",
  "eva_config",
  "corda_config",
  "inference_mode",
  "init_lora_weights",
  "loftq_config",
  "lora_ga_config",
  "low_cpu_mem_usage",
  "megatron_core",  # Which library, where megatron_config asks for one.
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
)

IN_TENSORS = ".lora_"
"""What the name of every adapter's tensor has in it."""

# The place of a layer's index in a tensor's name, which tables give as {i}.
_LAYERS = ".layers.{i}."
_LAYER = re.compile(r"(\.layers?\.)\d+\.")

# Entries with the one value that is supported; all others must be empty.
_CONSTANTS: dict[str, Any] = {"peft_type": "LORA", "bias": "none"}


def is_adapter(folder: Path) -> bool:
  """Whether a folder holds an adapter and no model: some trainers save the base model's config.json beside it."""
  others = (path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS)
  return (folder / CONFIG).is_file() and (not (folder / "config.json").is_file() or not any(others))


def base_of(folder: Path) -> str:
  """The base model that an adapter's config names; a relative path may start at the adapter's folder.

  In a bucket, one that begins with "./" or "../" does.

  Raises:
    UserError: it names none.
  """
  config = read_json(folder / CONFIG)
  entries.check(f"{folder / CONFIG}: ", config, entries.ADAPTER)
  name = config.get("base_model_name_or_path")
  if not name:
    raise UserError(
      f"{folder / CONFIG}: base_model_name_or_path is missing; set it to the base model's folder"
    )
  if (url := url_of(folder)) and name.startswith(("./", "../")):
    for part in name.split("/"):
      url = url.parent if part == ".." else url / part
    return str(url)
  beside = Path(os.path.normpath(folder / name))
  if beside.is_dir():
    return str(beside)
  revision = config.get("revision")
  return f"{name}@{revision}" if revision and hub.is_hub_id(name) and "@" not in name else name


def add_adapter(
  folder: Path, checkpoint: Checkpoint, layout: Layout, table: Sequence[Row]
) -> dict[str, LoRASpec]:
  """Adds an adapter's tensors to those of its base model.

  Returns:
    The adapters of each part of the model that has some.

  Raises:
    UserError: a kind of adapter that is not supported.
  """
  config = read_json(folder / CONFIG)
  _check_config(folder / CONFIG, config)
  renames = ((r"^base_model\.model\.", ""), *layout.renames)
  if held := [name for name in checkpoint.shapes if IN_TENSORS in name]:
    raise UserError(
      f"{folder}: its base model has adapters itself ({checkpoint.where[held[0]].parent}: {len(held)} tensors as "
      f"{checkpoint.key(held[0])}); merge those first (python -m internvl_jax.convert --lora merge), and name the result as "
      f"base_model_name_or_path in {CONFIG}"
    )
  if not (folder / WEIGHTS).is_file():
    raise UserError(f"{folder / WEIGHTS}: no such file; save the adapter with safe_serialization=True")
  adapter = weights.open_checkpoint(folder / WEIGHTS, Rename(renames))
  dtypes.refuse_quantized(adapter.types, adapter.key, adapter.where, None)
  specs: dict[str, LoRASpec] = {}
  for part, modules in _adapted(adapter, table).items():
    specs[part] = _spec(folder, config, part, modules, layout)
  checkpoint.replace(adapter)
  return specs


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
  """Refuses what would make the adapter compute something else."""
  for key, found in config.items():
    if key in _CONSTANTS and found != _CONSTANTS[key]:
      raise UserError(f"{path}: {key}={shown(found)} is not supported; expected {_CONSTANTS[key]!r}")
    if key not in (*_READ, *_INERT, *_CONSTANTS) and found:
      raise UserError(f"{path}: {key}={shown(found)} is not supported; expected it empty. {MERGE_FIRST}")
  entries.check(f"{path}: ", config, entries.ADAPTER)


def _adapted(adapter: Checkpoint, table: Sequence[Row]) -> dict[str, list[tuple[str, str, int]]]:
  """By part of the model: (path in its layer, module's key, rank) of all adapted linear maps.

  Adapters elsewhere, and keys that no row has, are left for who opens the model to refuse.
  """
  rows = {row.theirs[0]: row.ours for row in table if row.ours.endswith(f"{MARK}a") and _LAYERS in row.ours}
  found: dict[str, list[tuple[str, str, int]]] = {}
  for name, shape in adapter.shapes.items():
    if ours := rows.get(_LAYER.sub(r"\1{i}.", name)):
      path = ours.removesuffix(f"{MARK}a").split(_LAYERS)[-1]
      found.setdefault(submodule_of(ours), []).append((path, name.removesuffix(".lora_A.weight"), shape[0]))
  return found


def _spec(
  folder: Path, config: Mapping[str, Any], part: str, modules: list[tuple[str, str, int]], layout: Layout
) -> LoRASpec:
  ranks = {rank for _, _, rank in modules}
  alphas = {_alpha(config, layout.module(key)) for _, key, _ in modules}
  if len(ranks) > 1 or len(alphas) > 1:
    raise UserError(
      f"{folder / CONFIG}: the adapters of {part} have ranks {sorted(ranks)} and alphas {sorted(alphas)}; one of each "
      "is supported for a part"
    )
  return LoRASpec(
    rank=ranks.pop(),
    alpha=alphas.pop(),
    dropout=config.get("lora_dropout", 0.0),
    targets=tuple(sorted({re.escape(path) for path, _, _ in modules})),
    use_dora=config.get("use_dora", False),
    use_rslora=config.get("use_rslora", False),
  )


def _alpha(config: Mapping[str, Any], module: str) -> float:
  for pattern, alpha in (config.get("alpha_pattern") or {}).items():
    if re.fullmatch(rf"(.*\.)?({pattern})", module):
      return float(alpha)
  return float(config.get("lora_alpha", 8))


def formless(paths: Iterable[str], table: Sequence[Row]) -> list[str]:
  """The adapted linear maps, by their paths, whose adapters a layout has no names for: it splits what ours fuses."""
  known = {row.ours for row in table}
  found = {LAYER_RANGE.sub(".layers.{i}.", path) for path in adapter_paths(paths)} - known
  return sorted({path.split(MARK)[0] for path in found})


def save_adapter(
  folder: str | AnyPath,
  params: Mapping[str, Any],
  specs: Mapping[str, LoRASpec],
  layout: Layout,
  table: Sequence[Row],
  *,
  base: str,
  writes: bool = True,
) -> None:
  """Writes the adapters among `params` in float32.

  Args:
    folder: made if missing.
    params: parameters by path; all but adapters are left out.
    specs: the adapters of each part of the model that has some.
    layout: of the base model.
    table: its names.
    base: the base model's folder or hub id, which may end in @revision.
    writes: False for a process that only helps another one to read `params`, whose shards are on several hosts.

  Raises:
    UserError: the layout has no form for an adapter (it splits a projection that ours fuses).
  """
  folder = path_of(folder)
  adapters = select(params, adapter_paths(params))
  tensors = {
    f"base_model.model.{layout.module(key)}": tensor
    for key, tensor in saving.tensors(adapters, table, np.dtype(np.float32))
  }
  if not writes:
    return
  modules = sorted({re.sub(r"\.lora_\w+(\.weight)?$", "", key) for key in tensors})
  config = _adapter_config(
    specs, [module.removeprefix("base_model.model.") for module in modules], layout, base
  )
  with (
    explained(folder, "the adapter", lambda: "make room and start the same command again"),
    filled(folder) as local,
  ):
    saving.write_file(tensors, local / WEIGHTS)
    write_json(local / CONFIG, config)


def _adapter_config(
  specs: Mapping[str, LoRASpec], modules: list[str], layout: Layout, base: str
) -> dict[str, Any]:
  name, _, revision = base.partition("@") if hub.is_hub_id(base) else (base, "", "")
  main = specs.get("language_model") or next(iter(specs.values()))
  other = {part: spec for part, spec in specs.items() if spec is not main}
  roots = {part: re.escape(layout.module(layout.prefix[part])) + r"\..*" for part in other}
  shapes = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module)) for module in modules})
  return {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": name,
    "revision": revision or None,
    "inference_mode": True,
    "r": main.rank,
    "lora_alpha": main.alpha,
    "lora_dropout": main.dropout,
    "target_modules": "|".join(shapes),
    "rank_pattern": {roots[part]: spec.rank for part, spec in other.items()},
    "alpha_pattern": {roots[part]: spec.alpha for part, spec in other.items()},
    "use_dora": main.use_dora,
    "use_rslora": main.use_rslora,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
  }
