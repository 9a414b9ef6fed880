"""Input and output embeddings of a checkpoint: whether they are tied, and how they grow with the tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.weights import Checkpoint
from internvl_jax.models.checkpoint_names import Row, Transform

EMBEDDING = "language_model.model.embed_tokens.embedding"
HEAD = "language_model.lm_head.kernel"

EMBEDDINGS = (EMBEDDING, HEAD)
"""The paths of the tables that have a row (the output's: a column) a token."""


def is_tied(raw: Mapping[str, Any], checkpoint: Checkpoint | None, table: Sequence[Row]) -> bool:
  """Whether the output embedding is the input embedding; the tensors count more than the config."""
  stated = config_io.says_tied(raw)
  if checkpoint is None:
    return bool(stated)
  head, embedding = row_of(table, HEAD).theirs[0], row_of(table, EMBEDDING).theirs[0]
  if head not in checkpoint.shapes:
    # transformers ties a model of the hf layout that says nothing. Otherwise the missing tensor is reported.
    return config_io.layout_of(raw) is config_io.HF if stated is None else stated
  if not stated or checkpoint.shapes[head] != checkpoint.shapes.get(embedding):
    return False
  if np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
    checkpoint.drop([head])
    return True
  logging.warning("config.json ties the embeddings, but %s differs from %s: taken as untied", head, embedding)
  return False


def grown(new_tokens: int, *, is_output: bool) -> Transform:
  """Embeddings [V, D] cut or grown to the vocabulary that the tokens just added end.

  New rows of the output embedding are the mean of the others, also where the checkpoint had spare rows; of the
  input embedding, rows that the checkpoint lacks are (the reference: `resize_token_embeddings`, then the mean
  into the output embedding).
  """

  def load(tensors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    old, size = tensors[0], shape[-1] if is_output else shape[0]
    kept = size - new_tokens if is_output else min(size, len(old))
    if kept > len(old):
      raise UserError(
        f"the tokenizer had {size - new_tokens} tokens before the image tokens were added, but the embedding has "
        f"{len(old)} rows; use the tokenizer that belongs to the model"
      )
    mean = old[:kept].astype(np.float32).mean(axis=0, keepdims=True).astype(old.dtype)
    grown = np.concatenate([old[:kept], np.repeat(mean, size - kept, axis=0)])
    return grown.T if is_output else grown

  return Transform(load, lambda x: [x.T if is_output else x], resizes=True)


def row_of(table: Sequence[Row], ours: str) -> Row:
  """The row of one of our paths."""
  return next(row for row in table if row.ours == ours)


def with_row(table: Sequence[Row], ours: str, **changes: Any) -> list[Row]:
  """The table with changes of the row of one of our paths."""
  return [dataclasses.replace(row, **changes) if row.ours == ours else row for row in table]
