"""Attention's kernels are compiled for NVIDIA's cards, without one: memory, registers and shared memory."""

import jax
import pytest

from internvl_jax.chips import GPUS
from internvl_jax.models.attention import Mask, attention
from tests.support.cards import apart, compile_for, needs_compiler

MIB = 2**20

CASES = {
  # B, T, N, K, H, dtype, and what the mask has.
  "packed": (1, 8192, 32, 8, 128, "bfloat16", {"causal": True, "segments": True}),
  "packed, narrow heads": (1, 8192, 14, 2, 64, "bfloat16", {"causal": True, "segments": True}),
  "ViT-300M": (40, 1025, 16, 16, 64, "bfloat16", {"causal": False}),
  "ViT-6B": (40, 1025, 25, 25, 128, "bfloat16", {"causal": False}),
  "gpt-oss": (1, 8192, 64, 8, 64, "bfloat16", {"causal": True, "segments": True, "windows": (128, 8192)}),
  "pairs": (1, 8192, 28, 4, 128, "bfloat16", {"causal": True, "segments": True, "parent": True}),
  "heads of 96": (1, 4096, 32, 32, 96, "bfloat16", {"causal": True, "segments": True}),
  "float32": (1, 4096, 8, 2, 128, "float32", {"causal": True, "segments": True}),
}


SPILL = {("ViT-6B", "a100-80g"), ("ViT-6B", "rtx4090")}
"""Smaller blocks would not, and leave Hopper's cards half of their widest products."""


def measure(card, case, options=()):
  """Bytes of temporaries, inputs and outputs of attention, forward and backward, compiled for a card."""
  B, T, N, K, H, dtype, has = CASES[case]
  windows = tuple(has.get("windows", ()))
  heads = lambda n: jax.ShapeDtypeStruct((B, T, n, H), dtype)  # noqa: E731
  tokens = lambda dtype: jax.ShapeDtypeStruct((B, T), dtype)  # noqa: E731
  shapes = {
    "arrays": (heads(N), heads(K), heads(K), jax.ShapeDtypeStruct((N,), "float32") if windows else None),
    "segments": tokens("int32") if has.get("segments") else None,
    "parent": tokens("int32") if has.get("parent") else None,
    "window": jax.ShapeDtypeStruct((), "int32") if windows else None,
  }

  def run(given, g):
    mask = Mask(
      causal=has["causal"],
      windows=windows,
      **{name: given[name] for name in ("segments", "parent", "window")},
    )

    def attend(q, k, v, sinks):
      return attention(q, k, v, mask, sinks=sinks, backend="triton")

    out, pull = jax.vjp(attend, *given["arrays"])
    return out, pull(g)

  compiled = compile_for(card, run, (shapes, heads(N)), **dict(options))
  memory = compiled.memory_analysis()
  return {
    "temporaries": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
    "kernels": compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'),
  }


@pytest.mark.cuda_aot
@needs_compiler
@pytest.mark.parametrize("card", ["a100-80g", "rtx4090", "h100", "b200"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_in_linear_memory_and_without_spilling(card, case):
  """No array of scores, no copies of k and v, and all that a program holds in registers and shared memory."""
  refuse = [["xla_gpu_fail_ptx_compilation_on_register_spilling", (case, card) not in SPILL]]
  found = apart("test_attention_aot", "measure", card, case, refuse)
  print(card, case, {name: round(value / MIB, 1) if value > MIB else value for name, value in found.items()})
  assert found["kernels"] == 3
  # Where heads are not a power of two wide, copies that are.
  copies = 2.5 * found["arguments"] if case == "heads of 96" else 0
  assert found["temporaries"] <= 12 * MIB + copies


@pytest.mark.cuda_aot
@needs_compiler
@pytest.mark.parametrize("card", sorted(GPUS))
def test_every_card_is_known_to_the_kernels(card):
  assert apart("test_attention_aot", "measure", card, "packed, narrow heads")["kernels"] == 3
