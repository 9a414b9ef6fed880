"""Compiles a full-size training step for a TPU slice, without a TPU: bytes a chip, and what travels between chips.

  pip install -e '.[plan]'
  JAX_OPTIMIZATION_LEVEL=O1 python scripts/compile_for_tpu.py [--model 8b] [--topology v5e:4x4] [--mesh fsdp=16]
      [--rows 1] [--tokens 8192] [--tiles 40] [--zero_stage 0] [--hlo out.txt]

Everything trains, in bfloat16 on float32 master weights, layers are recomputed (remat "full"). Rows and tiles
are those of a data shard. Nothing is read, and nothing is run. O1 compiles three times faster than the default.
"""

import collections
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX starts, or libtpu looks for a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from internvl_jax import optim
from internvl_jax.arguments import MeshConfig, ModelArguments, TrainingArguments
from internvl_jax.batch import SFTBatch
from internvl_jax.models import functional
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.vit import VisionConfig
from internvl_jax.objectives import SupervisedFineTuning
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.parallel.table import placement_warnings
from internvl_jax.state import TrainState, opt_state_shardings, with_dtypes
from internvl_jax.step import TrainStep
from internvl_jax.trees import select

_MODEL = flags.DEFINE_enum("model", "8b", ["8b", "30b-a3b"], "InternVL2.5-8B or InternVL3.5-30B-A3B.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "The slice.")
_MESH = flags.DEFINE_string("mesh", "fsdp=16", "Sizes of the mesh's axes.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of a data shard.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of a row.", lower_bound=1)
_TILES = flags.DEFINE_integer("tiles", 40, "Tiles of a data shard's pool.", lower_bound=0)
_LAYERS = flags.DEFINE_integer("layers", None, "Layers of each stack, to look at a program faster.")
_ZERO = flags.DEFINE_integer("zero_stage", 0, "DeepSpeed's stage.", lower_bound=0, upper_bound=3)
_HLO = flags.DEFINE_string("hlo", None, "Where to write the compiled program.")

VISION = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_layers": 24,
  "num_heads": 16,
  "patch_size": 14,
  "image_size": 448,
}
TEXTS: dict[str, dict[str, Any]] = {
  "8b": {
    "vocab_size": 92553,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "qkv": "grouped",
  },
  "30b-a3b": {
    "vocab_size": 151674,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_layers": 48,
    "num_heads": 32,
    "num_kv_heads": 4,
    "head_dim": 128,
    "qk_norm": True,
    "experts": MoEConfig(num_experts=128, top_k=8, intermediate_size=768, normalize_top_k=True),
  },
}


def main(argv: Sequence[str]) -> None:
  """Compiles, and prints what the program needs."""
  del argv
  sizes = {axis: int(size) for axis, size in (part.split("=") for part in _MESH.value.split(","))}
  topology = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value)
  mesh = meshes.make_mesh(MeshConfig(**{"data": 1, **sizes}), topology.devices, zero_stage=_ZERO.value)
  step, inputs = step_and_shapes(mesh)
  start = time.perf_counter()
  program = jax.jit(step.__call__, donate_argnums=0).lower(*inputs).compile()
  print(f"{_MODEL.value} on {_TOPOLOGY.value}, {_MESH.value}: {time.perf_counter() - start:.0f} s to compile")
  memory = program.memory_analysis()
  state, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  print(
    f"GiB a chip: {state / 2**30:.2f} state and batch + {temporary / 2**30:.2f} temporary = "
    f"{(state + temporary) / 2**30:.2f}"
  )
  text = program.as_text()
  for (kind, shapes), count in sorted(collectives(text).items()):
    print(f"{count:>4} {kind:<20} {shapes}")
  if _HLO.value:
    Path(_HLO.value).write_text(text, encoding="utf-8")


def collectives(text: str) -> collections.Counter:
  """How often a compiled program's text holds each exchange: (kind, shapes of its results); a loop's body once."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf"= (\(?\w+\[[^=]*?) ({kinds})(?:-start)?\(", text)
  return collections.Counter((kind, re.sub(r"\{[^}]*\}", "", shapes)) for shapes, kind in found)


def step_and_shapes(mesh: jax.sharding.Mesh) -> tuple[TrainStep, tuple]:
  """The step, and its inputs as shapes that know where they lie."""
  depth = {"num_layers": _LAYERS.value} if _LAYERS.value else {}
  config = InternVLConfig(
    vision=VisionConfig(**{**VISION, **depth}), text=DecoderConfig(**{**TEXTS[_MODEL.value], **depth})
  )
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  trainable = optim.trainable_paths(ModelArguments(), model.shapes)
  optimizer = optim.make_optimizer(TrainingArguments(), {path: path for path in trainable})
  shapes = with_dtypes(model, trainable, bf16=True)
  places = rules.state_shardings(model.axes, shapes, trainable, mesh, zero_stage=_ZERO.value)
  for line in placement_warnings(shapes, places):
    print(line)
  shards = meshes.data_parallel_size(mesh)
  how = Execution(dtype=jnp.bfloat16, remat="full")
  step = TrainStep(
    model=model,
    objective=SupervisedFineTuning(how=how, normalize_type="imagenet", fused_loss=True, shards=shards),
    optimizer=optimizer,
    max_grad_norm=1.0,
    shards=shards,
    all_gather=False,
    seed=0,
    places=places,
  )
  params: Any = select(shapes, trainable)
  opt_state = jax.eval_shape(optimizer.init, params)
  everywhere = rules.replicated(mesh)
  state = TrainState(
    _placed(jax.ShapeDtypeStruct((), np.int32), everywhere),
    {path: _placed(leaf, places.params[path]) for path, leaf in params.items()},
    jax.tree.map(_placed, opt_state, opt_state_shardings(opt_state, places)),
  )
  batch = jax.tree.map(_placed, batch_shapes(shards), rules.batch_shardings(mesh))
  return step, (state, {}, batch, _placed(jax.ShapeDtypeStruct((), np.float32), everywhere))


def batch_shapes(shards: int) -> SFTBatch:
  """Shapes of one micro-batch."""
  ids = jax.ShapeDtypeStruct((1, _ROWS.value * shards, _TOKENS.value), np.int32)
  side = VISION["image_size"]
  return SFTBatch(
    input_ids=ids,
    targets=ids,
    loss_weight=jax.ShapeDtypeStruct(ids.shape, np.float32),
    positions=ids,
    segment_ids=ids,
    image_index=ids,
    tiles=jax.ShapeDtypeStruct((1, shards, _TILES.value, side, side, 3), np.uint8),
  )


def _placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


if __name__ == "__main__":
  app.run(main)
