"""Measures that compiling the training step does not take longer for a deeper model.

  python benchmarks/bench_compile.py [--width 256] [--repeats 2]

Compiles the whole step of a ViT and a decoder of 4 layers each, then of 48 layers each, in turn, and prints the
seconds and the ratio. Nothing is run.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

from internvl_jax.arguments import MeshConfig, ModelArguments, TrainingArguments
from internvl_jax.batch import SFTBatch
from internvl_jax.models import functional
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.models.towers.internvit import InternViTConfig
from internvl_jax.objectives import SupervisedFineTuning
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.optim.optimizer import make_optimizer
from internvl_jax.parallel import mesh as meshes
from internvl_jax.state import TrainState
from internvl_jax.step import TrainStep

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
  config = model_config(depth, width)
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  trainable = trainable_paths(ModelArguments(), model.shapes)
  optimizer = make_optimizer(
    TrainingArguments(weight_decay=0.1), {path: path for path in trainable}, "bias|layernorm"
  )
  objective = SupervisedFineTuning(
    how=Execution(remat="full"),
    normalize_type="imagenet",
    fused_loss=True,
    drop_path_rates=(0.1,) * depth,
  )
  shards = meshes.data_parallel_size(meshes.make_mesh(MeshConfig(), jax.devices()[:1]))
  step = TrainStep(
    model=model,
    objective=objective,
    optimizer=optimizer,
    max_grad_norm=1.0,
    shards=shards,
    all_gather=False,
    seed=0,
  )
  params = dict(model.shapes)
  state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(optimizer.init, params))  # pyright: ignore
  start = time.perf_counter()
  jax.jit(step.__call__).lower(state, {}, batch(), jax.ShapeDtypeStruct((), np.float32)).compile()
  return time.perf_counter() - start


def model_config(depth: int, width: int) -> InternVLConfig:
  """A model with both stacks of one depth and width."""
  vision = InternViTConfig(
    hidden_size=width,
    intermediate_size=4 * width,
    num_layers=depth,
    num_heads=width // 64,
    patch_size=14,
    image_size=224,
  )
  text = DecoderConfig(
    vocab_size=1024,
    hidden_size=width,
    intermediate_size=4 * width,
    num_layers=depth,
    num_heads=width // 64,
    num_kv_heads=width // 64,
    head_dim=64,
    qkv_bias=True,
  )
  return InternVLConfig(vision=vision, text=text)


def batch() -> SFTBatch:
  """Shapes of two rows of 512 tokens and two tiles."""
  rows = (1, 2, 512)
  ids = jax.ShapeDtypeStruct(rows, np.int32)
  return SFTBatch(
    input_ids=ids,
    targets=ids,
    loss_weight=jax.ShapeDtypeStruct(rows, np.float32),
    positions=ids,
    segment_ids=ids,
    image_index=ids,
    tiles=jax.ShapeDtypeStruct((1, 1, 2, 224, 224, 3), np.uint8),
  )


if __name__ == "__main__":
  app.run(main)
