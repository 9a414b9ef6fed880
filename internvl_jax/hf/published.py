"""The published sizes of InternVL, as config.json holds them, for commands that must work without a checkpoint.

Sizes are those of the language models' own releases and of the two ViTs. A vocabulary is the number of tokens of
the language model's tokenizer and the nine that InternVL adds, which is what the reference resizes embeddings to.
That 92553 (InternLM2), 151674 (Qwen2.5) and 128265 (Llama 3) are so is also seen in configs that others publish
(transformers' and MindSpeed-MM's tests and examples), and that Qwen3's image token is 151671, the third of nine
after 151669. The others follow from the rule alone. A checkpoint's own config.json decides.

Only what shapes depend on is meant to be exact: the frequencies of Phi-3 are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]

_NEW_TOKENS = 9

_VIT_300M: Config = {
  "model_type": "intern_vit_6b",  # The class has this name for both sizes.
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "patch_size": 14,
  "image_size": 448,
  "norm_type": "layer_norm",
  "qkv_bias": True,
  "qk_normalization": False,
  "layer_norm_eps": 1e-6,
  "initializer_factor": 0.1,
}
_VIT_6B: Config = {
  **_VIT_300M,
  "hidden_size": 3200,
  "intermediate_size": 12800,
  "num_hidden_layers": 45,
  "num_attention_heads": 25,
  "norm_type": "rms_norm",
  "qkv_bias": False,
  "qk_normalization": True,
}


def _llm(
  model_type: str, tokens: int, hidden: int, layers: int, heads: tuple[int, int], ffn: int, **others: Any
) -> Config:
  """A language model's config; `tokens` are its tokenizer's, `heads` those of queries and of keys."""
  return {
    "model_type": model_type,
    "vocab_size": tokens + _NEW_TOKENS,
    "hidden_size": hidden,
    "num_hidden_layers": layers,
    "num_attention_heads": heads[0],
    "num_key_value_heads": heads[1],
    "intermediate_size": ffn,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    **others,
  }


def _qwen2(tokens: int, *sizes: Any) -> Config:
  return _llm("qwen2", tokens, *sizes, use_sliding_window=False)


def _qwen3(*sizes: Any, model_type: str = "qwen3", **others: Any) -> Config:
  others = {
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    **others,
  }
  return _llm(model_type, 151669, *sizes, **others)


def _experts(width: int) -> Config:
  return {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": width,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }


def _internlm2(*sizes: Any) -> Config:
  scaling = {"type": "dynamic", "factor": 2.0}
  return _llm("internlm2", 92544, *sizes, bias=False, rms_norm_eps=1e-5, rope_scaling=scaling)


_PHI3 = _llm(
  "phi3",
  32011,
  *(3072, 32, (32, 32), 8192),
  rope_theta=1e4,
  rms_norm_eps=1e-5,
  max_position_embeddings=131072,
  original_max_position_embeddings=4096,
  sliding_window=262144,
  rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
)
_GPT_OSS = _llm(
  "gpt_oss",
  200019,
  *(2880, 24, (64, 8), 2880),
  head_dim=64,
  attention_bias=True,
  num_local_experts=32,
  num_experts_per_tok=4,
  sliding_window=128,
  max_position_embeddings=131072,
  rms_norm_eps=1e-5,
  rope_theta=150000.0,
  rope_scaling={
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
  },
)
_LLAMA = {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}

_INTERNLM2_20B = _internlm2(6144, 48, (48, 8), 16384)
_QWEN2_5_0_5B = _qwen2(151665, 896, 24, (14, 2), 4864)
_QWEN2_5_32B = _qwen2(151665, 5120, 64, (40, 8), 27648)
_QWEN2_5_72B = _qwen2(151665, 8192, 80, (64, 8), 29568)

_PARTS: dict[str, tuple[str, Config, Config]] = {
  "2-1b": ("InternVL2-1B", _VIT_300M, _qwen2(151646, 896, 24, (14, 2), 4864)),
  "2-2b": ("InternVL2-2B", _VIT_300M, _internlm2(2048, 24, (16, 8), 8192)),
  "2-4b": ("InternVL2-4B", _VIT_300M, _PHI3),
  "2-8b": ("InternVL2-8B", _VIT_300M, _internlm2(4096, 32, (32, 8), 14336)),
  "2-26b": ("InternVL2-26B", _VIT_6B, _INTERNLM2_20B),
  "2-40b": (
    "InternVL2-40B",
    _VIT_6B,
    _llm("llama", 64000, 7168, 60, (56, 8), 20480, **_LLAMA, rope_theta=5e6),
  ),
  "2-76b": (
    "InternVL2-Llama3-76B",
    _VIT_6B,
    _llm("llama", 128256, 8192, 80, (64, 8), 28672, **_LLAMA, rope_theta=5e5),
  ),
  "2.5-1b": ("InternVL2_5-1B", _VIT_300M, _QWEN2_5_0_5B),
  "2.5-2b": ("InternVL2_5-2B", _VIT_300M, _internlm2(2048, 24, (16, 8), 8192)),
  "2.5-4b": ("InternVL2_5-4B", _VIT_300M, _qwen2(151665, 2048, 36, (16, 2), 11008)),
  "2.5-8b": ("InternVL2_5-8B", _VIT_300M, _internlm2(4096, 32, (32, 8), 14336)),
  "2.5-26b": ("InternVL2_5-26B", _VIT_6B, _INTERNLM2_20B),
  "2.5-38b": ("InternVL2_5-38B", _VIT_6B, _QWEN2_5_32B),
  "2.5-78b": ("InternVL2_5-78B", _VIT_6B, _QWEN2_5_72B),
  "3-1b": ("InternVL3-1B", _VIT_300M, _QWEN2_5_0_5B),
  "3-2b": ("InternVL3-2B", _VIT_300M, _qwen2(151665, 1536, 28, (12, 2), 8960)),
  "3-8b": ("InternVL3-8B", _VIT_300M, _qwen2(151665, 3584, 28, (28, 4), 18944)),
  "3-9b": (
    "InternVL3-9B",
    _VIT_300M,
    _llm(
      "internlm3",
      128512,
      *(4096, 48, (32, 2), 10240),
      head_dim=128,
      bias=False,
      qkv_bias=False,
      rms_norm_eps=1e-5,
      rope_theta=5e7,
    ),
  ),
  "3-14b": ("InternVL3-14B", _VIT_300M, _qwen2(151665, 5120, 48, (40, 8), 13824)),
  "3-38b": ("InternVL3-38B", _VIT_6B, _QWEN2_5_32B),
  "3-78b": ("InternVL3-78B", _VIT_6B, _QWEN2_5_72B),
  "3.5-1b": ("InternVL3_5-1B", _VIT_300M, _qwen3(1024, 28, (16, 8), 3072)),
  "3.5-2b": ("InternVL3_5-2B", _VIT_300M, _qwen3(2048, 28, (16, 8), 6144)),
  "3.5-4b": ("InternVL3_5-4B", _VIT_300M, _qwen3(2560, 36, (32, 8), 9728)),
  "3.5-8b": ("InternVL3_5-8B", _VIT_300M, _qwen3(4096, 36, (32, 8), 12288)),
  "3.5-14b": ("InternVL3_5-14B", _VIT_300M, _qwen3(5120, 40, (40, 8), 17408)),
  "3.5-20b-a4b": ("InternVL3_5-GPT-OSS-20B-A4B-Preview", _VIT_300M, _GPT_OSS),
  "3.5-30b-a3b": ("InternVL3_5-30B-A3B", _VIT_300M, _qwen3(2048, 48, (32, 4), 6144, **_experts(768))),
  "3.5-38b": ("InternVL3_5-38B", _VIT_6B, _qwen3(5120, 64, (64, 8), 25600)),
  "3.5-241b-a28b": (
    "InternVL3_5-241B-A28B",
    _VIT_6B,
    _qwen3(4096, 94, (64, 4), 12288, **_experts(1536)),
  ),
}

SIZES: tuple[str, ...] = tuple(_PARTS)
"""Generation and size: "2.5-8b" is InternVL2.5-8B."""

_STAGES = re.compile(r"-(Instruct|Pretrained|MPO|CPT|HF|hf)$")


def config_of(size: str) -> Mapping[str, Any]:
  """The config.json of a published size, by its name in `SIZES`."""
  _, vision, llm = _PARTS[size]
  return {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "vision_config": vision,
    "llm_config": llm,
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v2",
    "force_image_size": 448,
    "tie_word_embeddings": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
  }


def hub_id(size: str) -> str:
  """The hub id of a published size."""
  return f"OpenGVLab/{_PARTS[size][0]}"


def size_of(name: str) -> str | None:
  """The size that a hub id names, whatever stage of training it holds; None if it is none of these."""
  stage = name.split("@")[0]
  while (shorter := _STAGES.sub("", stage)) != stage:
    stage = shorter
  return {hub_id(size): size for size in SIZES}.get(stage)
