"""Merges LoRA adapters into the weights, and checks that the model computes the same."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from internvl_jax.batch import NO_IMAGE
from internvl_jax.compiler import FULL_PRECISION
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.models import functional, lora
from internvl_jax.models.base_weights import restored
from internvl_jax.models.internvl import Execution, InternVL
from internvl_jax.parallel.host_arrays import fetch

TOLERANCE = 1e-3
"""Largest difference of a logit that a merge may cause, in units of the largest logit (or of 1, if larger)."""

_TEXT_TOKENS = 32


def without_adapters(source: Source) -> Source:
  """The same model with its adapters merged, and no kernel quantized."""
  config = dataclasses.replace(
    source.config,
    vision=dataclasses.replace(source.config.vision, lora=None, quantize_base="none"),
    text=dataclasses.replace(source.config.text, lora=None, quantize_base="none"),
  )
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  fresh = source.fresh - lora.adapter_paths(source.fresh)
  return dataclasses.replace(source, config=config, model=model, fresh=fresh)


def merge_and_check(
  source: Source,
  params: Mapping[str, Any],
  readable: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> tuple[Source, dict[str, Any]]:
  """Merges the adapters, after comparing the logits of a fixed input with and without that, in float32.

  Args:
    source: the model.
    params: its parameters.
    readable: makes them ones that this host can read, where others hold some of them.

  Returns:
    The source without adapters, and its parameters, whose kernels are merged layer by layer as they are read.

  Raises:
    UserError: the logits differ by more than TOLERANCE.
  """
  if not lora.adapter_paths(params):
    return source, readable(params)
  apart, merged = probe(source, params), probe(source, params, merged=True)
  by_token = np.abs(merged - apart).max(axis=-1)
  # Rounding may turn a tie between two experts over, which changes all of that token's logits.
  difference = float(np.quantile(by_token, 0.9 if source.config.text.experts else 1.0))
  limit = TOLERANCE * max(1.0, float(np.abs(apart).max()))
  logging.info(
    "Merged the adapters: logits of a fixed input differ by at most %.3g (allowed: %.3g; largest logit: %.3g)",
    *(float(by_token.max()), limit, float(np.abs(apart).max())),
  )
  if not difference <= limit:  # NaN must not pass
    raise UserError(
      f"merging the adapters changed a logit by {difference:.3g}, more than the {limit:.3g} allowed, so the merged "
      "model is not written; keep the adapters apart (convert --lora peft), and report this"
    )
  scales = {part: spec.scale for part, spec in source.specs.items()}
  return without_adapters(source), lora.merge(restored(readable(params)), scales)


def probe(source: Source, params: Mapping[str, Any], *, merged: bool = False) -> np.ndarray:
  """Logits [1, S, V] of a fixed input of one tile and some tokens, in float32, with adapters merged or not."""
  config, rng = source.config, np.random.default_rng(0)
  side, P = config.vision.image_size, config.tokens_per_tile
  tile = rng.normal(size=(1, side, side, 3)).astype(np.float32)
  ids = rng.integers(0, config.text.vocab_size, (1, P + _TEXT_TOKENS)).astype(np.int32)
  index = np.full_like(ids, NO_IMAGE)
  index[0, 1 : 1 + P] = np.arange(P)

  @jax.jit
  def forward(params: dict[str, jax.Array]) -> jax.Array:
    model, how = source.model.bind(params), Execution()
    if merged:
      lora.compute_as_merged(model)
    features = model.extract_features(jnp.asarray(tile), how)
    x = model.embed(jnp.asarray(ids), jnp.asarray(index), features, how)
    hidden, _ = model.decode(x, how, positions=jnp.arange(ids.shape[1])[None], segment_ids=None)
    return model.logits(hidden)

  with jax.default_matmul_precision(FULL_PRECISION):
    return fetch(forward(dict(params)))
