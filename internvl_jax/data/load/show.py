"""A batch as text, to see what the model is taught before it is."""

import itertools
from typing import Any

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, Batch, TokenBatch
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.sample.tokenize import IMAGE_CONTEXT, ChatTokenizer, ChatTokens, common_prompt

_ROWS_SHOWN = 2


def show_batch(batch: Batch, tokenizer: ChatTokenizer) -> str:
  r"""The batch's shapes and its first rows decoded, with what is supervised between » and «.

  1 micro-batches of 32 rows of 48 tokens, 90% of them filled, 64 supervised; tiles 1x1x32x64x64x3
  row 0: <|im_start|>user\n<img><IMG_CONTEXT>x16</img>\nWhat?<|im_end|>\n<|im_start|>assistant\n»Yes<|im_end|>«\n
  """
  batch = batch.rows
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


def show_sample(sample: Sample, tokenizer: ChatTokenizer, lines: LineSchema) -> str:
  r"""A sample as text, with what is supervised between » and «; the prompt of several answers once, then them.

  toy.jsonl:3 (dataset 'toy'), 45 tokens, 1 tiles: <|im_start|>user\n...<|im_start|>assistant\n»Yes<|im_end|>«\n

  toy.jsonl:4 (dataset 'toy'), 45 + 46 tokens, 1 tiles:
    question: <|im_start|>user\n...<|im_start|>assistant\n
    chosen: »Yes<|im_end|>«\n
    rejected: »No<|im_end|>«\n
  """
  chats = sample.conversations()
  tokens = " + ".join(str(len(chat.input_ids)) for chat in chats)
  shared = f" ({sample.shared} of them shared)" if sample.shared else ""
  about = f"{sample.where}, {tokens} tokens{shared}, {len(sample.tiles)} tiles:"
  if len(chats) == 1:
    return f"{about} {_show_segment(chats[0], tokenizer)}"
  start = common_prompt(chats)
  prompt = ChatTokens(*(part[:start] for part in chats[0]))
  answers = [ChatTokens(*(part[start:] for part in chat)) for chat in chats]
  named = zip(lines.names, [prompt, *answers], strict=True)
  return "\n".join([about, *(f"  {name}: {_show_segment(part, tokenizer)}" for name, part in named)])


def as_json(sample: Sample, lines: LineSchema) -> dict[str, Any]:
  """A sample's `input_ids` and `labels` as lists; of several answers, those of each, by its name."""
  found = [
    {"input_ids": part.input_ids.tolist(), "labels": part.labels.tolist()} for part in sample.conversations()
  ]
  return found[0] if len(found) == 1 else dict(zip(lines.names[1:], found, strict=True))


def _show_segment(part: ChatTokens, tokenizer: ChatTokenizer) -> str:
  return _show_tokens(part.input_ids, part.labels != IGNORE_INDEX, tokenizer)


def _show_row(batch: TokenBatch, row: int, tokenizer: ChatTokenizer) -> str:
  """One row of the first micro-batch; where a segment goes on from tokens that another one shows, it says so."""
  ids, segments, positions = (x[0, row] for x in (batch.input_ids, batch.segment_ids, batch.positions))
  length = int((segments > 0).sum())
  # A target is one place before the token that it is the label of.
  taught = np.concatenate([[False], (batch.targets[0, row] != IGNORE_INDEX)[: length - 1]])
  starts = np.flatnonzero(np.diff(segments[:length], prepend=0))
  cuts = [0, *starts[positions[starts] > 0].tolist(), length]
  parts = [_show_tokens(ids[a:b], taught[a:b], tokenizer) for a, b in itertools.pairwise(cuts)]
  shared = [f"[shared prompt of {positions[cut]} tokens]" for cut in cuts[1:-1]]
  return parts[0] + "".join(map(str.__add__, shared, parts[1:]))


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
