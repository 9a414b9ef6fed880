"""A checkpoint's config.json: read into an InternVLConfig, written back for either layout.

internvl   the reference's: vision_config, llm_config, template, ...   names as in its InternVLChatModel
hf         transformers' InternVLForConditionalGeneration: vision_config, text_config, image_token_id
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf import entries, flash, tables, towers
from internvl_jax.hf.families import FAMILIES, Family, complete, transformers_defaults
from internvl_jax.hf.files import read_json, shown
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.rope import DynamicRope, Rope
from internvl_jax.models.towers.tower import VisionConfig

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """One of the two forms of a checkpoint.

  Attributes:
    name: "internvl" or "hf".
    model_type: the entry of config.json.
    text: the entry of config.json that holds the language model's config.
    renames: (regular expression, replacement) for keys of older checkpoints.
    modules: (regular expression, replacement) from keys to the modules' names in memory, which adapters go by.
    prefix: where the parts begin, by our names of the parts.
    projector: names of the projector's tensors.
    model: (config.json, language model) -> the model.
  """

  name: str
  model_type: str
  text: str
  renames: tuple[tuple[str, str], ...]
  modules: tuple[tuple[str, str], ...]
  prefix: Config
  projector: list[Row]
  model: Callable[[Config, DecoderConfig], InternVLConfig]

  def module(self, key: str) -> str:
    """The name in memory of what a key of the checkpoint names."""
    for pattern, replacement in self.modules:
      key = re.sub(pattern, replacement, key)
    return key

  def table(self, family: Family, config: InternVLConfig) -> list[Row]:
    """Names of all tensors of a model of that family.

    Raises:
      UserError: the layout has no form for the family, or for the vision tower.
    """
    language = family.table
    if self is HF and not family.in_transformers:
      if family.as_llama is None:
        raise UserError(f"the hf layout has no form for {family.architecture}; write the internvl layout")
      language = family.as_llama(config.text)
    tower = towers.form_of(config.vision, self.name).table(config.vision)
    return [*tower, *self.projector, *flash.table(config, self.name), *language]


def read_config(folder: str | Path) -> dict[str, Any]:
  """The config.json of a checkpoint folder.

  Raises:
    UserError: no such file, not JSON, or not an InternVL model in one of the two layouts.
  """
  path = Path(folder) / "config.json"
  config = read_json(path)
  found = config.get("model_type")
  if not isinstance(found, str) or found not in LAYOUTS:
    known = " or ".join(f"{model_type!r} (layout {layout.name})" for model_type, layout in LAYOUTS.items())
    raise UserError(f"{path}: model_type is {shown(found)}, expected {known}")
  for key in ("vision_config", LAYOUTS[found].text):
    if not isinstance(config.get(key), dict):
      raise UserError(f"{path}: {key!r} is missing")
  return config


def layout_named(name: str) -> Layout:
  """The layout of that name."""
  return next(layout for layout in LAYOUTS.values() if layout.name == name)


def layout_of(config: Config) -> Layout:
  """The layout of a checkpoint, by its config.json."""
  return LAYOUTS[config["model_type"]]


def family_of(config: Config) -> Family:
  """The language model family of a checkpoint.

  Raises:
    UserError: a family that is not in the registry.
  """
  entry = layout_of(config).text
  name = config[entry].get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(
      f"config.json: {entry}.model_type={shown(name)} is not supported; known: {sorted(FAMILIES)}"
    )
  return FAMILIES[name]


def decoder_config(entry: str, config: Config) -> DecoderConfig:
  """The decoder that a language model's config describes; `entry` names the config in messages.

  Raises:
    UserError: an entry is missing, or has a value that would be ignored.
  """
  family = FAMILIES[config["model_type"]]
  entries.check(f"config.json: {entry}.", config, entries.LANGUAGE_MODEL)
  config = complete(config["model_type"], config)
  entries.check(f"config.json: {entry}.", config, entries.LANGUAGE_MODEL)
  _check_constants(entry, config, family.constants)
  try:
    decoder = family.decoder(config)
  except KeyError as error:
    raise UserError(f"config.json: the entry {entry}.{error.args[0]} is missing") from None
  except TypeError as error:  # Null, where another entry makes it mean something.
    raise UserError(f"config.json: {entry} has an entry of the wrong type ({error})") from None
  _check_heads(entry, decoder, config)
  return decoder


def model_config(config: Config) -> InternVLConfig:
  """The model that a config.json describes, its output embedding untied.

  Raises:
    UserError: a missing entry, an unknown family, or a switch set to a value that this program would
      otherwise ignore.
  """
  family_of(config)
  layout = layout_of(config)
  entries.check("config.json: ", config, entries.MODEL)
  entries.check("config.json: vision_config.", config["vision_config"], entries.VISION)
  low, high = (config.get(f"{name}_dynamic_patch") for name in ("min", "max"))
  if low and high and low > high:
    raise UserError(f"config.json: min_dynamic_patch={low} is above max_dynamic_patch={high}")
  for path, method in _quantizations(config).items():
    if method not in (None, "mxfp4"):
      raise UserError(
        f"config.json: {path}={shown(method)} is not supported; take the checkpoint that is not quantized"
      )
  text = decoder_config(layout.text, config[layout.text])
  try:
    model = layout.model(config, text)
  except KeyError as error:
    raise UserError(f"config.json: the entry {error} is missing") from None
  if model.vision.hidden_size % model.vision.num_heads:
    raise UserError(
      f"config.json: vision_config.hidden_size={model.vision.hidden_size} does not divide into "
      f"num_attention_heads={model.vision.num_heads}"
    )
  return model


def quantization(config: Config) -> str | None:
  """The entries of config.json on how the weights are quantized; None where there are none."""
  return " and ".join(f"{path}={shown(method)}" for path, method in _quantizations(config).items()) or None


def _quantizations(config: Config) -> dict[str, Any]:
  names = {"": config, **{name: config[name] for name in ("vision_config", layout_of(config).text)}}
  stated = {name: inner.get("quantization_config") for name, inner in names.items()}
  return {
    f"{name}.quantization_config.quant_method".lstrip("."): found.get("quant_method")
    for name, found in stated.items()
    if found and isinstance(found, dict)
  }


def says_tied(config: Config) -> bool | None:
  """Whether config.json ties the output embedding to the input's; None without an entry."""
  entries = (config, config[layout_of(config).text])
  stated = [entry["tie_word_embeddings"] for entry in entries if "tie_word_embeddings" in entry]
  return any(stated) if stated else None


# --- The internvl layout ------------------------------------------------------------------------------------


def vision_config(config: Config, layout: str) -> VisionConfig:
  """The tower that the `vision_config` of a layout describes, or in "internvl" the config.json of a tower alone.

  Raises:
    UserError: an unknown tower, or a switch set to a value that this program would otherwise ignore.
  """
  form = towers.form_named(config, layout)
  config = {**form.defaults, **config}
  _check_constants("vision_config", config, form.constants)
  return form.read(config)


def _internvl_model(config: Config, text: DecoderConfig) -> InternVLConfig:
  vision = vision_config(config["vision_config"], "internvl")
  return InternVLConfig(
    vision=dataclasses.replace(vision, image_size=config.get("force_image_size") or vision.image_size),
    text=text,
    select_layer=config.get("select_layer", -1),
    downsample_ratio=config["downsample_ratio"],
    ps_version=config.get("ps_version", "v1"),
    flash=flash.read(config),
  )


# Adapters as PEFT wraps them in place: the reference's LoRA checkpoints. A model that was wrapped again, to train
# adapters on a LoRA checkpoint, has the prefix twice.
_PEFT = (
  (r"(^|\.)(base_model\.model\.)+", r"\1"),
  (r"\.base_layer\.", "."),
  (r"\.(lora_A|lora_B)\.default\.", r".\1."),
  (r"\.lora_magnitude_vector\.default\.weight$", ".lora_magnitude_vector"),
)

INTERNVL = Layout(
  name="internvl",
  model_type="internvl_chat",
  text="llm_config",
  renames=_PEFT,
  modules=(),
  prefix={"vision_model": "vision_model", "language_model": "language_model"},
  projector=tables.INTERNVL_PROJECTOR,
  model=_internvl_model,
)


# --- The hf layout ------------------------------------------------------------------------------------------

_HF_CONSTANTS = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}


def _hf_model(config: Config, text: DecoderConfig) -> InternVLConfig:
  _check_constants("", config, _HF_CONSTANTS)
  flash.check_is_none(config)
  return InternVLConfig(
    vision=vision_config(config["vision_config"], "hf"),
    text=text,
    select_layer=config.get("vision_feature_layer", -1),
    downsample_ratio=config.get("downsample_ratio", 0.5),
    ps_version="v2",
  )


HF = Layout(
  name="hf",
  model_type="internvl",
  text="text_config",
  # Some exports have the names of the modules in memory.
  renames=(
    *_PEFT,
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
  ),
  modules=(
    (r"^language_model\.model\b", "model.language_model"),
    (r"^(vision_tower|multi_modal_projector)\b", r"model.\1"),
    (r"^language_model\.lm_head\b", "lm_head"),
  ),
  prefix={"vision_model": "vision_tower", "language_model": "language_model.model"},
  projector=tables.HF_PROJECTOR,
  model=_hf_model,
)

LAYOUTS = {layout.model_type: layout for layout in (INTERNVL, HF)}
"""The layouts by config.json's model_type."""


# --- Writing ------------------------------------------------------------------------------------------------


def written_config(
  config: Config, model: InternVLConfig, layout: Layout, *, dtype: str, image_token_id: int, **settings: Any
) -> dict[str, Any]:
  """The config.json of a model that is saved: the original's entries where the layout stays, and what changed.

  Args:
    config: the config.json that the model came with.
    model: the model, with its adapters merged.
    layout: of the checkpoint to be written.
    dtype: of the weights written, e.g. "bfloat16".
    image_token_id: id of <IMG_CONTEXT>.
    **settings: further entries of the reference's config, e.g. template. They are written in both layouts:
      transformers keeps what it does not know.

  Raises:
    UserError: the layout cannot hold the model.
  """
  config = {key: value for key, value in config.items() if key != "quantization_config"}
  text = _written_text(config, model, layout)
  tied = model.text.tie_word_embeddings
  same = layout_of(config) is layout
  vision = towers.form_of(model.vision, layout.name).write(model.vision)
  if same:
    vision = {**config["vision_config"], "image_size": vision["image_size"]}
  if layout is INTERNVL:
    return {
      **(config if same else {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}),
      "vision_config": vision,
      "llm_config": {**text, "tie_word_embeddings": tied},
      "force_image_size": model.vision.image_size,
      "select_layer": model.select_layer,
      "downsample_ratio": model.downsample_ratio,
      "ps_version": model.ps_version,
      **flash.written(model),
      "tie_word_embeddings": tied,
      "use_backbone_lora": 0,
      "use_llm_lora": 0,
      "torch_dtype": dtype,
      **settings,
    }
  if model.ps_version != "v2":
    raise UserError(
      f"the hf layout has no form for ps_version={model.ps_version!r}; write the internvl layout"
    )
  return {
    **(config if same else {}),
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "vision_config": vision,
    "text_config": {**text, "tie_word_embeddings": tied, "dtype": dtype},
    "image_token_id": image_token_id,
    "image_seq_length": model.tokens_per_tile,
    "downsample_ratio": model.downsample_ratio,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": model.select_layer,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": tied,
    "dtype": dtype,
    **settings,
  }


def _written_text(config: Config, model: InternVLConfig, layout: Layout) -> dict[str, Any]:
  text, family = dict(config[layout_of(config).text]), family_of(config)
  text.pop("quantization_config", None)  # What is written is not quantized; so at the top level.
  if layout is HF and layout_of(config) is not HF:
    text = _known_to_transformers(text) if family.in_transformers else _as_llama(text, family, model.text)
  if layout is INTERNVL and layout_of(config) is not INTERNVL:
    text = _with_old_rope_names(text)
  return {
    **text,
    "vocab_size": model.text.vocab_size,
    "architectures": [FAMILIES[text["model_type"]].architecture],
  }


def _known_to_transformers(text: Config) -> dict[str, Any]:
  """A config without the entries that transformers' class lacks: old dumps hold settings of generation."""
  known = {
    *transformers_defaults(text["model_type"], text),
    "model_type",
    "rope_theta",
    "rope_scaling",
    "num_experts",
  }
  own = {name: value for name, value in text.items() if name in known}
  return {name: value for name, value in own.items() if name not in ("torch_dtype", "dtype")}


def _with_old_rope_names(text: dict[str, Any]) -> dict[str, Any]:
  """A config with rope_theta and rope_scaling in place of rope_parameters, which the reference does not know."""
  parameters = dict(text.pop("rope_parameters", None) or {})
  if not parameters:
    return text
  theta = {"rope_theta": parameters.pop("rope_theta")} if "rope_theta" in parameters else {}
  kind = parameters.pop("rope_type", "default")
  parameters.pop("partial_rotary_factor", None)
  scaling = None if kind == "default" else {"type": kind, "rope_type": kind, **parameters}
  return {**text, **theta, "rope_scaling": scaling}


_LLAMA_KEEPS = (
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "initializer_range",
  "max_position_embeddings",
)


def _as_llama(config: Config, family: Family, model: DecoderConfig) -> dict[str, Any]:
  """The LLaMA config that computes what a model of a family unknown to transformers does."""
  if model.qkv_bias != model.o_bias:
    raise UserError(
      f"the hf layout has no form for {family.architecture} with qkv_bias={model.qkv_bias} and bias={model.o_bias}; "
      "write the internvl layout"
    )
  return {
    **{name: config[name] for name in _LLAMA_KEEPS if name in config},
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": model.hidden_size,
    "intermediate_size": model.intermediate_size,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads,
    "head_dim": model.head_dim,
    "rms_norm_eps": model.rms_norm_eps,
    "attention_bias": model.qkv_bias,
    "mlp_bias": model.mlp_bias,
    "rope_parameters": _rope_parameters(model.rope),
  }


def _rope_parameters(rope: Rope) -> dict[str, Any]:
  if isinstance(rope, DynamicRope):
    return {"rope_type": "dynamic", "rope_theta": rope.theta, "factor": rope.factor}
  if type(rope) is Rope:
    return {"rope_type": "default", "rope_theta": rope.theta}
  raise UserError(f"the hf layout has no LLaMA form for {rope}; write the internvl layout")


def _check_heads(entry: str, decoder: DecoderConfig, config: Config) -> None:
  """Refuses numbers of heads and experts that contradict each other, before they become an error about shapes."""
  N, K, H = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
  if N % K:
    raise UserError(f"config.json: {entry}.num_attention_heads={N} is no multiple of num_key_value_heads={K}")
  if H % 2 or H < 4:
    raise UserError(f"config.json: {entry} gives heads of the width {H}; expected an even one, from 4 on")
  if decoder.experts and config["num_experts_per_tok"] > config["num_local_experts"]:
    raise UserError(
      f"config.json: {entry}.num_experts_per_tok={config['num_experts_per_tok']} is above the "
      f"{config['num_local_experts']} experts"
    )


def _check_constants(name: str, config: Config, constants: Config) -> None:
  for key, expected in constants.items():
    found = config.get(key, expected)
    if found != expected:
      path = f"{name}.{key}" if name else key
      raise UserError(f"config.json: {path}={shown(found)} is not supported; expected {expected!r}")
