"""A batch as text, to see what the model is taught before it is."""

import itertools

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, SFTBatch
from internvl_jax.data.sample import Sample
from internvl_jax.data.tokenize import IMAGE_CONTEXT, ChatTokenizer

_ROWS_SHOWN = 2


def show_batch(batch: SFTBatch, tokenizer: ChatTokenizer) -> str:
  r"""Returns the batch's shapes and its first rows decoded, with what is supervised between » and «.

  1 micro-batches of 32 rows of 48 tokens, 90% of them filled, 64 supervised; tiles 1x1x32x64x64x3
  row 0: <|im_start|>user\n<img><IMG_CONTEXT>x16</img>\nWhat?<|im_end|>\n<|im_start|>assistant\n»Yes<|im_end|>«\n
  """
  A, R, S = batch.input_ids.shape
  supervised = int((batch.targets != IGNORE_INDEX).sum())
  filled = float((batch.segment_ids > 0).mean())
  shapes = (
    f"{A} micro-batches of {R} rows of {S} tokens, {filled:.0%} of them filled, {supervised} supervised; "
    f"tiles {'x'.join(map(str, batch.tiles.shape))}"
  )
  return "\n".join(
    [shapes, *(f"row {row}: {_show_row(batch, row, tokenizer)}" for row in range(min(R, _ROWS_SHOWN)))]
  )


def show_sample(sample: Sample, tokenizer: ChatTokenizer) -> str:
  """Returns a sample as text, with what is supervised between » and «."""
  text = _show_tokens(sample.input_ids, sample.labels != IGNORE_INDEX, tokenizer)
  return f"{sample.where}, {len(sample.input_ids)} tokens, {len(sample.tiles)} tiles: {text}"


def _show_row(batch: SFTBatch, row: int, tokenizer: ChatTokenizer) -> str:
  """One row of the first micro-batch."""
  length = int((batch.segment_ids[0, row] > 0).sum())
  # A target stands one place before the token that it teaches.
  taught = np.concatenate([[False], (batch.targets[0, row] != IGNORE_INDEX)[: length - 1]])
  return _show_tokens(batch.input_ids[0, row, :length], taught, tokenizer)


def _show_tokens(ids: np.ndarray, taught: np.ndarray, tokenizer: ChatTokenizer) -> str:
  """Tokens as text; a run of image tokens is shown as one with its length."""
  pieces = []
  for (is_image, is_taught), run in itertools.groupby(
    range(len(ids)), key=lambda i: (ids[i] == tokenizer.image_token_id, taught[i])
  ):
    places = list(run)
    if is_image:
      text = f"{IMAGE_CONTEXT}x{len(places)}"
    else:
      text = tokenizer.decode(ids[places], special=True).replace("\n", "\\n")
    pieces.append(f"»{text}«" if is_taught else text)
  return "".join(pieces)
