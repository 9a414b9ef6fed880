"""A checkpoint folder as a whole: opened into a definition and parameters, saved so that it stands alone."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.hf import config as config_io
from internvl_jax.hf import families, tokenizer, weights
from internvl_jax.models import functional
from internvl_jax.models.internvl import InternVL, InternVLConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A checkpoint folder that has been looked at, with no number read yet.

  Attributes:
    folder: where it lies.
    raw: its config.json.
    config: the model it describes, the run's changes included.
    model: the model's definition.
  """

  folder: Path
  raw: Mapping[str, Any]
  config: InternVLConfig
  model: functional.ModelDef[InternVL]

  @property
  def table(self) -> list[families.Row]:
    """Names of the checkpoint's tensors."""
    return [*families.VISION_TABLE, *families.PROJECTOR_TABLE, *config_io.family_of(self.raw).table]

  def build(self, rngs: nnx.Rngs) -> InternVL:
    """The module with fresh parameters."""
    return InternVL(self.config, rngs=rngs)

  def load(
    self, shapes: Mapping[str, jax.ShapeDtypeStruct], place: Mapping[str, jax.sharding.Sharding]
  ) -> dict[str, jax.Array]:
    """Reads the parameters, each straight to where `place` says; see `weights.load`."""
    return weights.load(weights.Checkpoint(self.folder), self.table, shapes, place.__getitem__)

  def initialize(
    self,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    place: Mapping[str, jax.sharding.Sharding],
    *,
    seed: int,
  ) -> dict[str, jax.Array]:
    """Draws fresh parameters, each made where `place` says."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
      params = functional.initialize(self.build, key)
      return {path: value.astype(shapes[path].dtype) for path, value in params.items()}

    # The hardware's generator compiles in a moment; the default one is unrolled for every parameter.
    return jax.jit(draw, out_shardings=dict(place))(jax.random.key(seed, impl="rbg"))


def open_source(folder: str | Path, **overrides: Any) -> Source:
  """Looks at a checkpoint folder; `overrides` as in `hf.config.model_config`.

  Raises:
    UserError: no such checkpoint, or one that this program cannot run.
  """
  raw = config_io.read_config(folder)
  config = config_io.model_config(raw, **overrides)
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  return Source(Path(folder), raw, config, model)


def save_model(
  target: str | Path,
  source: Source,
  params: Mapping[str, jax.Array],
  *,
  dtype: jnp.dtype,
  normalize_type: str,
  eos_token_id: int,
  changes: Mapping[str, Any],
) -> None:
  """Writes a model that stands alone: weights, config, tokenizer, preprocessor, generation config.

  The config's classes come along where the source has them, so that the reference's own code opens it.

  Args:
    target: the folder; made if missing, other files in it stay.
    source: where the model came from.
    params: all parameters by path.
    dtype: of the weights written.
    normalize_type: statistics of the pixels, for preprocessor_config.json.
    eos_token_id: id that ends an answer.
    changes: entries of config.json that the run fixed, beside those of the model.
  """
  target = Path(target)
  weights.save(target, params, source.table, dtype=np.dtype(dtype))
  raw = config_io.updated_config(source.raw, source.config, dtype=np.dtype(dtype).name, **changes)
  _write(target / "config.json", raw)
  _write(target / "preprocessor_config.json", _preprocessor(source.config, normalize_type))
  _write(target / "generation_config.json", _generation(source.folder, eos_token_id))
  tokenizer.copy_tokenizer(source.folder, target)
  for code in source.folder.glob("*.py"):
    shutil.copyfile(code, target / code.name)


def _write(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _preprocessor(config: InternVLConfig, normalize_type: str) -> dict[str, Any]:
  mean, std = PIXEL_STATISTICS[normalize_type]
  side = config.vision.image_size
  return {
    "image_processor_type": "CLIPImageProcessor",
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_resize": True,
    "size": side,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": side,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
  }


def _generation(folder: Path, eos_token_id: int) -> dict[str, Any]:
  path = folder / "generation_config.json"
  found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  return {**found, "eos_token_id": eos_token_id}
