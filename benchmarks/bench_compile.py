"""Measures that compiling the training step does not take longer for a deeper model.

  python benchmarks/bench_compile.py [--width 256] [--repeats 2]

Compiles the whole step of a ViT and a decoder of 4 layers each, then of 48 layers each, in turn, and prints the
seconds and the ratio. Nothing is run.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from internvl_jax.aot.program import BatchShape, compile_step, plan_step
from internvl_jax.aot.target import open_target
from internvl_jax.config import TrainConfig
from internvl_jax.hf.model import source_of_config

_WIDTH = flags.DEFINE_integer("width", 256, "Width of both stacks.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Compilations of each model.")

DEPTHS = (4, 48)


def main(argv: Sequence[str]) -> None:
  """Prints a line for each depth, and the ratio of the medians."""
  del argv
  seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
  for _ in range(_REPEATS.value):
    for depth in DEPTHS:
      seconds[depth].append(compile_seconds(depth, _WIDTH.value))
  for depth, times in seconds.items():
    print(
      f"{depth:>3} + {depth} layers: {', '.join(f'{t:.1f}' for t in times)} s to trace, lower and compile"
    )
  first, last = (statistics.median(seconds[depth]) for depth in DEPTHS)
  print(f"ratio of the medians: {last / first:.2f}")


def compile_seconds(depth: int, width: int) -> float:
  """Seconds to trace, lower and compile the step of a model with that many layers in each stack."""
  config = TrainConfig()
  config.model.drop_path_rate = 0.1
  target = open_target("cpu:1")
  shape = BatchShape(accumulation=1, rows=2, tokens=512, tiles=1, side=224)
  compiled = compile_step(
    plan_step(config, target, shape, source_of_config(model_config(depth, width))), target
  )
  return compiled.lower_seconds + compiled.compile_seconds


def model_config(depth: int, width: int) -> dict[str, Any]:
  """The config.json of a model with both stacks of one depth and width."""
  sizes = {
    "hidden_size": width,
    "intermediate_size": 4 * width,
    "num_hidden_layers": depth,
    "num_attention_heads": width // 64,
  }
  return {
    "model_type": "internvl",
    "vision_config": {
      "model_type": "internvl_vision",
      "image_size": [224, 224],
      "patch_size": [14, 14],
      **sizes,
    },
    "text_config": {"model_type": "qwen2", "vocab_size": 1024, "num_key_value_heads": width // 64, **sizes},
    "image_token_id": 5,
  }


if __name__ == "__main__":
  app.run(main)
