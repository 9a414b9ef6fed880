"""An optimizer step over a tiny model on random rows, without any checkpoint or data."""

import jax
import numpy as np

from internvl_jax.arguments import MeshConfig, ModelArguments, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.models import functional
from internvl_jax.models.base_weights import as_kernels, quantized_kernels
from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.models.towers.internvit import InternViTConfig
from internvl_jax.models.weight_formats import format_of
from internvl_jax.optim.labels import decays, labels_of, trained
from internvl_jax.optim.optimizer import make_optimizer
from internvl_jax.parallel import batches, rules
from internvl_jax.parallel import mesh as meshes
from internvl_jax.state import TrainState, with_dtypes
from internvl_jax.step import TrainStep
from internvl_jax.tasks.sft.objective import SupervisedFineTuning
from internvl_jax.trees import select


def toy(vision_layers=2, text_layers=2, width=16, text=None, **vision):
  """A model of 2x2 patches merged into one token a tile."""
  return InternVLConfig(
    vision=InternViTConfig(
      hidden_size=width,
      intermediate_size=2 * width,
      num_layers=vision_layers,
      num_heads=2,
      patch_size=4,
      image_size=16,
      **vision,
    ),
    text=DecoderConfig(
      vocab_size=40,
      hidden_size=width,
      num_layers=text_layers,
      num_heads=4,
      num_kv_heads=2,
      **{"intermediate_size": 2 * width, "head_dim": 4, "qkv_bias": True, **(text or {})},
    ),
  )


def make_batch(rows=8, length=12, shards=1, accumulation=1, seed=0):
  """Rows of random tokens; every other row owns a tile, whose four tokens stand at its front."""
  rng = np.random.default_rng(seed)
  shape = (accumulation, rows, length)
  ids = rng.integers(0, 40, shape).astype("i4")
  lengths = rng.integers(8, length + 1, shape[:2])
  segments = (np.arange(length) < lengths[..., None]).astype("i4")
  targets = np.where((np.arange(length) >= 5) & (segments > 0), rng.integers(0, 40, shape), IGNORE_INDEX)
  index = np.full(shape, NO_IMAGE, "i4")
  pool = rows // 2 // shards
  for row in range(0, rows, 2):
    index[:, row, :4] = (row // 2 % pool) * 4 + np.arange(4)
  return TokenBatch(
    input_ids=ids,
    targets=targets.astype("i4"),
    loss_weight=(targets != IGNORE_INDEX).astype("f4"),
    positions=np.where(segments, np.arange(length), 0).astype("i4"),
    segment_ids=segments,
    image_index=index,
    tiles=rng.integers(0, 256, (accumulation, shards, pool, 16, 16, 3)).astype("u1"),
  )


def reshape_batch(batch, accumulation, shards):
  """The same rows dealt to other micro-batches and shards."""
  rows = batch.input_ids.shape[0] * batch.input_ids.shape[1] // accumulation
  tiles = batch.tiles.reshape(-1, *batch.tiles.shape[3:])
  pool = len(tiles) // accumulation // shards
  length = batch.input_ids.shape[-1]
  fields = {
    name: getattr(batch, name).reshape(accumulation, rows, length)
    for name in TokenBatch._fields
    if name != "tiles"
  }
  tile = np.where(fields["image_index"] == NO_IMAGE, 0, fields["image_index"]) // 4
  local = tile % pool * 4 + fields["image_index"] % 4
  fields["image_index"] = np.where(fields["image_index"] == NO_IMAGE, NO_IMAGE, local).astype("i4")
  return TokenBatch(**fields, tiles=tiles.reshape(accumulation, shards, pool, *tiles.shape[1:]))


_AROUND_ONE = ("scale", "ls1", "ls2", "magnitude")


def on_one_device(paths):
  """Where a state of these parameters lies: whole, on the first device."""
  mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
  kinds = ("params", "gradients", "moments")
  return rules.StateShardings(mesh, **{kind: dict.fromkeys(paths, rules.replicated(mesh)) for kind in kinds})


def quantized_as(shapes, values):
  """Parameters with the kernels among them stored as those of these shapes are."""
  values = dict(values)
  for path, parts in quantized_kernels(shapes).items():
    quantized = jax.jit(format_of(parts["codes"]).quantize)(values.pop(path))
    values |= {f"{path}.{part}": np.asarray(value) for part, value in quantized.items()}
  return {path: values[path] for path in shapes}


class Harness:
  """A step over a toy model, on a mesh."""

  def __init__(
    self,
    config,
    *,
    mesh=None,
    freeze=None,
    all_gather=True,
    fused=True,
    how=None,
    drop_path=0.0,
    dropout=False,
    router_loss_coef=0.0,
    training=None,
    zero_stage=0,
    fsdp_groups=1,
  ):
    self._programs = {}
    sizes = {"data": 1, **(mesh or {})}
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    self.mesh = meshes.make_mesh(MeshConfig(**sizes), devices, zero_stage=zero_stage)
    self.mesh = meshes.cut_fsdp(self.mesh, fsdp_groups) if fsdp_groups > 1 else self.mesh
    self.shards = meshes.data_parallel_size(self.mesh)
    self.model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
    labels = trained(labels_of(ModelArguments(**(freeze or {})), self.model.shapes))
    self.trainable = set(labels)
    training = training or TrainingArguments(weight_decay=0.1)
    decay = decays({path: path for path in self.trainable}, "bias|layernorm")
    optimizer = make_optimizer(training, labels=labels, decay=decay)
    shapes = with_dtypes(self.model, self.trainable, bf16=False)
    places = rules.state_shardings(self.model.axes, shapes, self.trainable, self.mesh, zero_stage=zero_stage)

    # Drawn by numpy: nothing to compile.
    rng = np.random.default_rng(0)
    values = {
      path: (rng.normal(size=leaf.shape, scale=0.2) + path.endswith(_AROUND_ONE)).astype("f4")
      for path, leaf in as_kernels(shapes).items()
    }
    params = jax.device_put(quantized_as(shapes, values), places.params)
    self.frozen = {path: value for path, value in params.items() if path not in self.trainable}
    self.state = TrainState.create(select(params, self.trainable), optimizer, places)
    layers = config.vision.num_layers
    objective = SupervisedFineTuning(
      model=self.model,
      how=how or Execution(),
      normalize_type="imagenet",
      fused_loss=fused,
      drop_path_rates=tuple(np.linspace(0.0, drop_path, layers).tolist()) if drop_path else (),
      dropout=dropout,
      shards=self.shards,
      all_gather=all_gather,
      router_loss_coef=router_loss_coef,
    )
    self.step = TrainStep(
      objective=objective,
      optimizer=optimizer,
      seed=0,
      places=places,
    )

  def inputs(self, batch, learning_rate=1e-2):
    batch = jax.device_put(batch, batches.batch_shardings(batch, self.mesh))
    return self.state, self.frozen, batch, np.float32(learning_rate)

  @property
  def program(self):
    """The jitted step, traced once for each shape of batch as long as the step is the same."""
    if self._programs.get("step") is not self.step:
      self._programs = {"step": self.step, "program": jax.jit(self.step.__call__)}
    return self._programs["program"]

  def run(self, batch, steps=1):
    for _ in range(steps):
      self.state, metrics = self.program(*self.inputs(batch))
    return metrics
