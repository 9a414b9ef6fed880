"""The registry of language model families: a config reader, a table of names, a line each.

A new dense family is a table of names in `hf.tables` and a line here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf import entries, tables
from internvl_jax.hf.files import shown, shown_error
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.gpt_oss import GptOssMLPConfig
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope

Config = Mapping[str, Any]

UNDECAYED = {
  "4.49": r"bias|layernorm|rmsnorm",
  "4.55": r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)",
}
"""Names that Hugging Face's Trainer spares weight decay, by the release of transformers. All releases spare PyTorch's
LayerNorm as well, and 4.49 also the classes that ask for it: of ours, those of LLaMA and InternLM3."""

# Their other norms have "layernorm" in their names.
_SPARED_BY_CLASS = UNDECAYED["4.49"] + r"|^language_model\.(?:base_model\.model\.)?model\.norm\."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A language model family.

  Attributes:
    architecture: the class that the checkpoint's config names.
    decoder: the language model's config -> what our decoder needs.
    table: names in the checkpoint.
    constants: switches of the config whose other values would need other code: they are checked, so that no
      switch of a checkpoint is ignored.
    defaults: entries of the config that may be left out. Families that transformers knows have its defaults.
    in_transformers: transformers has the family, so the `hf` layout can hold it as it is.
    as_llama: for a family that transformers lacks: its table under LLaMA's names, which it is stored under in
      the `hf` layout.
    undecayed: a regular expression; weight decay spares what it is found in, of the reference's names in lower
      case. It gives the reference's optimizer groups, which depend on the release of transformers that
      trains the family: see UNDECAYED and docs/training.md.
  """

  architecture: str
  decoder: Callable[[Config], DecoderConfig]
  table: list[Row]
  constants: Config
  defaults: Config = dataclasses.field(default_factory=dict)
  in_transformers: bool = True
  as_llama: Callable[[DecoderConfig], list[Row]] | None = None
  undecayed: str = UNDECAYED["4.49"]


def complete(model_type: str, config: Config) -> dict[str, Any]:
  """A language model's config with the entries that it left out at the family's defaults."""
  family = FAMILIES[model_type]
  known = transformers_defaults(model_type, config) if family.in_transformers else {}
  if "rope_scaling" in config:  # The old name, under which null is no scaling.
    known.pop("rope_parameters", None)
  own = dict(config)
  for names in _ALIASES:
    stated = [config[name] for name in names if name in config]
    own |= dict.fromkeys(names, stated[0]) if stated else {}
  return {**known, **family.defaults, **own}


# Names of one entry; which of them is in use depends on the release of transformers that wrote the config.
_ALIASES = (("num_experts", "num_local_experts"),)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def transformers_defaults(model_type: str, config: Config) -> dict[str, Any]:
  """The config that transformers gives a model of these sizes; some of its defaults follow from them."""
  from transformers import CONFIG_MAPPING  # Imported late: it takes a second that `--help` need not wait for.

  sizes = {name: config[name] for name in _SIZES if isinstance(config.get(name), int)}
  try:
    known = CONFIG_MAPPING[model_type](**sizes).to_dict()
  except Exception as error:  # Its checks of sizes raise what the release at hand likes.
    raise UserError(f"config.json: transformers refuses the sizes {sizes} ({shown_error(error)})") from error
  # Apart, as under the old names: a config that states one of the two leaves the other at its default.
  scaling = dict(known["rope_parameters"])
  return {**known, "rope_theta": scaling.pop("rope_theta"), "rope_parameters": scaling}


# --- Rotary embeddings --------------------------------------------------------------------------------------


def read_rope(config: Config) -> Rope:
  """The rotary embedding of a config, under the old names (rope_theta, rope_scaling) or the new (rope_parameters).

  Raises:
    UserError: a kind that is not supported, or an entry that it needs and that is missing.
  """
  name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
  scaling = dict(config.get(name) or {})
  entries.check(f"config.json: {name}.", scaling, entries.ROPE)
  theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
  kind = scaling.get("rope_type") or scaling.get("type") or "default"
  for stated in (config, scaling):
    if (found := stated.get("partial_rotary_factor")) not in (None, 1.0):
      raise UserError(f"config.json: partial_rotary_factor={found} is not supported; expected 1.0")
  try:
    if kind == "default":
      return Rope(theta=theta)
    if kind == "linear":
      return LinearRope(theta=theta, factor=scaling["factor"])
    longest: int = config["max_position_embeddings"]
    trained: int = (
      scaling.get("original_max_position_embeddings")
      or config.get("original_max_position_embeddings")
      or longest
    )
    if kind == "dynamic":
      return DynamicRope(theta=theta, factor=scaling["factor"], trained_length=longest)
    if kind == "llama3":
      names = ("factor", "low_freq_factor", "high_freq_factor")
      if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"config.json: {name}: low_freq_factor must be below high_freq_factor")
      return Llama3Rope(theta=theta, trained_length=trained, **{n: scaling[n] for n in names})
    if kind in ("longrope", "su"):
      return LongRope(
        theta=theta,
        short_factors=tuple(scaling["short_factor"]),
        long_factors=tuple(scaling["long_factor"]),
        trained_length=trained,
        stretch=scaling.get("factor") or longest / trained,
        attention_factor=scaling.get("attention_factor"),
      )
    if kind == "yarn":
      if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        raise UserError(
          "config.json: the entries mscale and mscale_all_dim of a rope of type 'yarn' are not supported"
        )
      names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
      options = {name: scaling[name] for name in names if scaling.get(name) is not None}
      return YarnRope(theta=theta, factor=scaling["factor"], trained_length=trained, **options)
  except KeyError as error:
    raise UserError(f"config.json: {error} is missing, which rope type {kind!r} needs") from None
  known = "default, linear, dynamic, llama3, longrope, su, yarn"
  raise UserError(f"config.json: rope type {shown(kind)} is not supported; known: {known}")


# --- Readers ------------------------------------------------------------------------------------------------


def _sizes(config: Config) -> dict[str, Any]:
  """What all families' configs call alike."""
  heads = config["num_attention_heads"]
  if not config.get("head_dim") and config["hidden_size"] % heads:
    raise UserError(
      f"config.json: hidden_size={config['hidden_size']} does not divide into num_attention_heads={heads}, and there is no "
      "head_dim"
    )
  head_dim = config.get("head_dim") or config["hidden_size"] // heads
  rope = read_rope(config)
  if isinstance(rope, LongRope):
    lengths = {len(rope.short_factors), len(rope.long_factors)}
    if lengths != {head_dim // 2}:
      raise UserError(
        f"config.json: short_factor and long_factor have {sorted(lengths)} numbers; heads of {head_dim} need "
        f"{head_dim // 2}"
      )
  return {
    "vocab_size": config["vocab_size"],
    "hidden_size": config["hidden_size"],
    "intermediate_size": config["intermediate_size"],
    "num_layers": config["num_hidden_layers"],
    "num_heads": heads,
    "num_kv_heads": config.get("num_key_value_heads") or heads,
    "head_dim": head_dim,
    "rms_norm_eps": config["rms_norm_eps"],
    "rope": rope,
  }


def _qwen2(config: Config) -> DecoderConfig:
  return DecoderConfig(**_sizes(config), qkv_bias=True)


def _llama(config: Config) -> DecoderConfig:
  bias = config["attention_bias"]
  return DecoderConfig(**_sizes(config), qkv_bias=bias, o_bias=bias, mlp_bias=config["mlp_bias"])


def _qwen3(config: Config) -> DecoderConfig:
  bias = config["attention_bias"]
  return DecoderConfig(**_sizes(config), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen3_moe(config: Config) -> DecoderConfig:
  experts = MoEConfig(
    num_experts=config["num_experts"],
    top_k=config["num_experts_per_tok"],
    intermediate_size=config["moe_intermediate_size"],
    normalize_top_k=config["norm_topk_prob"],
  )
  return dataclasses.replace(_qwen3(config), experts=experts)


def _gpt_oss(config: Config) -> DecoderConfig:
  experts = GptOssMLPConfig(
    num_experts=config["num_local_experts"],
    top_k=config["num_experts_per_tok"],
    intermediate_size=config["intermediate_size"],
    limit=config["swiglu_limit"],
    alpha=config["swiglu_alpha"],
  )
  bias, n = config["attention_bias"], config["num_hidden_layers"]
  kinds = config.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
  if len(kinds) != n or not set(kinds) <= {"full_attention", "sliding_attention"}:
    raise UserError(
      f"config.json: layer_types has {len(kinds)} entries of {sorted(set(kinds))}; expected {n} of 'full_attention' and "
      "'sliding_attention'"
    )
  windows = tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
  return DecoderConfig(
    **_sizes(config), qkv_bias=bias, o_bias=bias, experts=experts, sinks=True, windows=windows
  )


def _phi3(config: Config) -> DecoderConfig:
  windows = (config["sliding_window"],) * config["num_hidden_layers"]
  return DecoderConfig(**_sizes(config), qkv="concatenated", fused_gate_up=True, windows=windows)


def _internlm2(config: Config) -> DecoderConfig:
  bias = config["bias"]
  return DecoderConfig(**_sizes(config), qkv="grouped", qkv_bias=bias, o_bias=bias)


def _internlm2_as_llama(config: DecoderConfig) -> list[Row]:
  return tables.llama_from_grouped_heads(
    config.num_heads // config.num_kv_heads, config.num_kv_heads, config.head_dim
  )


def _internlm3(config: Config) -> DecoderConfig:
  bias = config["bias"]
  return DecoderConfig(**_sizes(config), qkv_bias=config["qkv_bias"], o_bias=bias, mlp_bias=bias)


_SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
_FULL = {**_SILU, "use_sliding_window": False}

FAMILIES: dict[str, Family] = {
  "qwen2": Family(architecture="Qwen2ForCausalLM", decoder=_qwen2, table=tables.USUAL, constants=_FULL),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    decoder=_qwen3,
    table=tables.USUAL,
    constants=_FULL,
    undecayed=UNDECAYED["4.55"],
  ),
  "llama": Family(
    architecture="LlamaForCausalLM",
    decoder=_llama,
    table=tables.USUAL,
    constants={**_SILU, "pretraining_tp": 1},
    undecayed=_SPARED_BY_CLASS,
  ),
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    decoder=_phi3,
    table=tables.USUAL,
    constants={**_SILU, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    decoder=_qwen3_moe,
    table=tables.QWEN3_MOE,
    constants={**_FULL, "decoder_sparse_step": 1, "mlp_only_layers": []},
    undecayed=UNDECAYED["4.55"],
  ),
  "gpt_oss": Family(
    architecture="GptOssForCausalLM",
    decoder=_gpt_oss,
    table=tables.GPT_OSS,
    constants=_SILU,
    defaults={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    undecayed=UNDECAYED["4.55"],
  ),
  "internlm2": Family(
    architecture="InternLM2ForCausalLM",
    decoder=_internlm2,
    table=tables.INTERNLM2,
    constants={"hidden_act": "silu"},
    defaults={"bias": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    in_transformers=False,
    as_llama=_internlm2_as_llama,
  ),
  "internlm3": Family(
    architecture="InternLM3ForCausalLM",
    decoder=_internlm3,
    table=tables.USUAL,
    constants=_SILU,
    defaults={"bias": False, "qkv_bias": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    in_transformers=False,
    as_llama=lambda config: tables.USUAL,
    undecayed=_SPARED_BY_CLASS,
  ),
}
"""Language model families by the `model_type` of a checkpoint's language model config."""
