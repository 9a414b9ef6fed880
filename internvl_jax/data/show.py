"""A batch as text, to see what the model is taught before it is."""

import itertools

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, SFTBatch
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


def _show_row(batch: SFTBatch, row: int, tokenizer: ChatTokenizer) -> str:
  """One row of the first micro-batch; a run of image tokens is shown as one with its length."""
  length = int((batch.segment_ids[0, row] > 0).sum())
  ids = batch.input_ids[0, row, :length]
  # A target stands one place before the token that it teaches.
  taught = np.concatenate([[False], (batch.targets[0, row] != IGNORE_INDEX)[: length - 1]])
  pieces = []
  for (is_image, is_taught), run in itertools.groupby(
    range(length), key=lambda i: (ids[i] == tokenizer.image_token_id, taught[i])
  ):
    places = list(run)
    if is_image:
      text = f"{IMAGE_CONTEXT}x{len(places)}"
    else:
      text = tokenizer.decode(ids[places], special=True).replace("\n", "\\n")
    pieces.append(f"»{text}«" if is_taught else text)
  return "".join(pieces)
