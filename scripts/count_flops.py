"""Counts what a training step of InternVL2.5-8B costs when parts of it are frozen, at full size and without weights.

  python scripts/count_flops.py [--tokens 8192] [--tiles 40]

Matrix products are counted from the step's jaxpr, loops as often as they run; no rematerialisation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from internvl_jax.arguments import ModelArguments, TrainingArguments
from internvl_jax.batch import TokenBatch
from internvl_jax.metrics.flops import count_flops
from internvl_jax.models import functional
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.towers.internvit import InternViTConfig
from internvl_jax.optim.labels import decays, labels_of, trained
from internvl_jax.optim.optimizer import make_optimizer
from internvl_jax.state import TrainState, with_dtypes
from internvl_jax.step import TrainStep
from internvl_jax.tasks.sft.objective import SupervisedFineTuning
from internvl_jax.trees import count, select

_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of the row.", lower_bound=1)
_TILES = flags.DEFINE_integer("tiles", 40, "Tiles of the row.", lower_bound=0)

VISION = InternViTConfig(
  hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, patch_size=14, image_size=448
)
TEXT = DecoderConfig(
  vocab_size=92553,
  hidden_size=4096,
  intermediate_size=14336,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  qkv="grouped",
)

CASES: dict[str, dict[str, Any]] = {
  "everything trains": {},
  "ViT frozen": {"freeze_backbone": True},
  "ViT frozen but its last 4 of 24 layers": {"freeze_backbone": True, "unfreeze_vit_layers": -4},
  "LLM frozen": {"freeze_llm": True},
  "ViT and LLM frozen (projector only)": {"freeze_backbone": True, "freeze_llm": True},
  "LoRA of rank 16 on the LLM, the rest frozen": {
    "freeze_backbone": True,
    "freeze_mlp": True,
    "freeze_llm": True,
    "use_llm_lora": 16,
  },
}


def main(argv: Sequence[str]) -> None:
  """Prints a line for each case."""
  del argv
  print(f"forward pass of the ViT over {_TILES.value} tiles: {vision_forward(_TILES.value) / 1e12:.1f} TFLOP")
  print(f"{'':<45}{'TFLOP a step':>14}{'trained':>16}{'optimizer GiB':>15}")
  for name, frozen in CASES.items():
    flops, trained = cost(frozen, tiles=_TILES.value, tokens=_TOKENS.value)
    print(f"{name:<45}{flops / 1e12:>14.1f}{trained:>16,}{8 * trained / 2**30:>15.2f}")


def vision_forward(tiles: int) -> int:
  """FLOPs of a forward pass of the ViT."""
  model = functional.define(lambda rngs: InternVL(InternVLConfig(vision=VISION, text=TEXT), rngs=rngs))
  pixels = jax.ShapeDtypeStruct((tiles, VISION.image_size, VISION.image_size, 3), np.float32)
  return count_flops(lambda params, pixels: model.bind(params).vision_model(pixels), model.shapes, pixels)


def cost(frozen: dict[str, Any], *, tiles: int, tokens: int) -> tuple[int, int]:
  """FLOPs of the step, and parameters that train."""
  arguments = ModelArguments(**frozen)
  thawed, rank = arguments.unfreeze_vit_layers, arguments.use_llm_lora
  config = InternVLConfig(
    vision=dataclasses.replace(VISION, split=thawed % VISION.num_layers if thawed else None),
    text=dataclasses.replace(TEXT, lora=LoRASpec(rank=rank, alpha=2.0 * rank) if rank else None),
  )
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  labels = trained(labels_of(arguments, model.shapes))
  trainable = set(labels)
  decay = decays({path: path for path in labels}, "bias|layernorm")
  optimizer = make_optimizer(TrainingArguments(), labels=labels, decay=decay)
  step = TrainStep(
    model=model,
    objective=SupervisedFineTuning(how=Execution(), normalize_type="imagenet", fused_loss=True),
    optimizer=optimizer,
    shards=1,
    all_gather=False,
    seed=0,
  )
  shapes = with_dtypes(model, trainable, bf16=True)
  params: Any = select(shapes, trainable)
  frozen_params = {path: leaf for path, leaf in shapes.items() if path not in trainable}
  state: Any = jax.ShapeDtypeStruct((), np.int32)
  state = TrainState(state, params, jax.eval_shape(optimizer.init, params))
  rate = jax.ShapeDtypeStruct((), np.float32)
  return count_flops(step.__call__, state, frozen_params, batch(tokens, tiles), rate), count(params)


def batch(tokens: int, tiles: int) -> TokenBatch:
  """Shapes of one row."""
  ids = jax.ShapeDtypeStruct((1, 1, tokens), np.int32)
  return TokenBatch(
    input_ids=ids,
    targets=ids,
    loss_weight=jax.ShapeDtypeStruct(ids.shape, np.float32),
    positions=ids,
    segment_ids=ids,
    image_index=ids,
    tiles=jax.ShapeDtypeStruct((1, 1, tiles, VISION.image_size, VISION.image_size, 3), np.uint8),
  )


if __name__ == "__main__":
  app.run(main)
