"""A tiny model with adapters of every kind, whose numbers are drawn from their names.

`scripts/record_adapters.py` records what PEFT computes with them.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from internvl_jax.hf.model import Changes, Source, open_source
from internvl_jax.hf.weights import names_of
from internvl_jax.models.lora import LoRASpec, adapter_paths
from tests.support import families
from tests.support.toy import ASSETS

BASE = "qwen2"
"""Which of the families' cases the adapters are put on."""

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def recording(kind: str) -> Path:
  return ASSETS / "adapters" / f"{kind}.npz"


def open_adapted(base: Path, kind: str) -> tuple[Source, dict[str, jax.Array]]:
  """A model with adapters on both parts, and all parameters; none of the adapters' numbers is zero."""
  text = LoRASpec(rank=3, alpha=5.0, **KINDS[kind])
  # PEFT has no form for adapters of our one map to q, k and v.
  vision = dataclasses.replace(text, rank=2, alpha=7.0, targets=("proj", "fc1", "fc2"))
  source = open_source(base, Changes(text_lora=text, vision_lora=vision))
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE), seed=0)
  drawn = {
    path: families.draw(path, params[path].shape) * np.float32(families.STD) + path.endswith("magnitude")
    for path in adapter_paths(params)
  }
  return source, {**params, **{path: jax.device_put(value, PLACE) for path, value in drawn.items()}}


def gradient_norms(source: Source, grads: dict[str, np.ndarray]) -> dict[str, float]:
  """The norm of each adapter parameter's gradient, by PEFT's name for it."""
  norms = {}
  for path in adapter_paths(grads):
    names = names_of(path, grads[path].shape, source.table)
    for cell in np.ndindex(*names.keys.shape[:-1]):
      name = "base_model.model." + source.layout.module(names.keys[cell][0]).removesuffix(".weight")
      norms[name] = float(np.linalg.norm(np.asarray(grads[path][cell], np.float64)))
  return norms
