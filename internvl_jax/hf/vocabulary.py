"""Checks that every id of a tokenizer has a row in the model's embeddings.

Beyond a table's end there is nothing to look up: the numbers are not finite, so that no step changes anything and
answers are empty.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax.errors import UserError
from internvl_jax.hf import hub, peft, weights
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.model import base_folder
from internvl_jax.hf.tokenizer import has_tokenizer, load_tokenizer, placeholder_tokens

CONFIG = "config.json"

# The input and output embeddings under all names that families and layouts have for them.
_TABLE = re.compile(
  r"(?:base_model\.|language_model\.|model\.)*(?:embed_tokens|tok_embeddings|lm_head|output)(?:\.base_layer)?\.weight"
)
_REMEDY = (
  "use the tokenizer that belongs to the model, train with runtime.grow_vocabulary=True, which makes rows as for the "
  "image tokens, or resize the embeddings where the tokens were added"
)


def open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a checkpoint (see `open_source`), of which every id has a row; weights are not read.

  Raises:
    UserError: it cannot be read, or does not fit the model.
  """
  folder = base_folder(name)
  tokenizer = load_tokenizer(folder)
  fit_embeddings(tokenizer, folder)
  check_adapter(tokenizer, name)
  return tokenizer


def check(name: str | Path) -> None:
  """Opens the tokenizer of a checkpoint, if it has one, for programs that need none.

  Raises:
    UserError: see `open_tokenizer`.
  """
  if has_tokenizer(base_folder(name)):
    open_tokenizer(name)


def fit_embeddings(
  tokenizer: PreTrainedTokenizerBase,
  folder: Path,
  *,
  added: int = 0,
  grow: bool = False,
  with_weights: bool = True,
) -> tuple[int | None, int]:
  """The number of rows that a checkpoint's embeddings need for a tokenizer, and how many of them are new.

  Args:
    tokenizer: the tokenizer.
    folder: the checkpoint's; where it has no weights, its config.json says how many rows there are.
    added: tokens that were just added to the tokenizer: for these rows are made.
    grow: whether rows are made for other tokens without one, too.
    with_weights: False does not look for weights, because none will be read.

  Returns:
    The rows that the tables must have, and how many of them, the last ones, are new; (None, 0) if they stay.

  Raises:
    UserError: a token has no row, or the checkpoint's files contradict each other.
  """
  ids = tokenizer.get_vocab()
  size = max(ids.values(), default=-1) + 1
  rows = table_rows(folder, with_weights=with_weights)
  stored = min([n for name, n in rows.items() if name != CONFIG] or rows.values(), default=size)
  # Exports in the hf layout, ours too, name these without a row. In a text, `ChatTokenizer` refuses them.
  spared = placeholder_tokens(folder)
  lacking = sorted(
    (i, token) for token, i in ids.items() if stored <= i < size - added and token not in spared
  )
  if lacking and not grow:
    raise UserError(_without_rows(folder, rows, stored, lacking))
  if lacking:
    logging.info("The embeddings grow from %d to %d rows, for %s", stored, size, _named(lacking))
  if lacking or added:
    added = max(added, size - stored)
  else:
    _check_agreement(folder, rows)
    _check_image_token(folder, ids)
  _tell_ends(folder, size if added else stored)
  return (size, added) if added else (None, 0)


def table_rows(folder: Path, *, with_weights: bool = True) -> dict[str, int]:
  """Rows of a checkpoint's tables of embeddings, by their origin: a tensor's name, or "config.json".

  Args:
    folder: of a whole model or of a language model alone. What cannot be read there is left for those who need it.
    with_weights: whether to look at the weights, if there are any.
  """
  rows = {}
  if (folder / CONFIG).is_file():
    raw = config_io.read_json(folder / CONFIG)
    entry = next((raw[key] for key in ("llm_config", "text_config") if isinstance(raw.get(key), dict)), raw)
    if isinstance(found := entry.get("vocab_size"), int):
      rows[CONFIG] = found
  if with_weights and any(folder.glob("*.safetensors")):
    try:
      shapes = weights.open_checkpoint(folder).shapes
    except UserError as error:
      logging.warning(
        "Rows of embeddings are those of config.json, since the weights cannot be opened: %s", error
      )
      return rows
    rows |= {name: shape[0] for name, shape in shapes.items() if _TABLE.fullmatch(name) and shape}
  return rows


def check_adapter(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
  """Refuses an adapter that was trained with tokens that its base model's tokenizer does not have.

  Args:
    tokenizer: the base model's.
    name: what the user named, an adapter or not.

  Raises:
    UserError: a token that is missing, or has another id.
  """
  folder = hub.local_folder(str(name))
  if not (peft.is_adapter(folder) and has_tokenizer(folder)):
    return
  base = tokenizer.get_vocab()
  for token, index in sorted(load_tokenizer(folder).get_vocab().items(), key=lambda item: item[1]):
    if base.get(token) != index:
      other = f"has for {base[token]}" if token in base else "lacks"
      raise UserError(
        f"{folder}: the adapter was trained with {token!r} as token {index}, which the tokenizer of its base model "
        f"{other}; merge the adapter where it was trained, and save the model with that tokenizer"
      )


def _named(lacking: list[tuple[int, str]]) -> str:
  (index, token), last = lacking[0], lacking[-1][0]
  others = len(lacking) - 1
  more = f" and {others} more token{'s' if others > 1 else ''} up to id {last}" if others else ""
  return f"the token {token!r} (id {index}){more}"


def _without_rows(folder: Path, rows: Mapping[str, int], stored: int, lacking: list[tuple[int, str]]) -> str:
  says = next(name for name, n in rows.items() if n == stored)
  return (
    f"{folder}: the tokenizer has {_named(lacking)}, but the embeddings have {stored} rows, for ids up to {stored - 1} "
    f"({says}); {_REMEDY}"
  )


def _check_agreement(folder: Path, rows: Mapping[str, int]) -> None:
  if len(set(rows.values())) > 1:
    told = ", ".join(f"{n} in {name}{' (vocab_size)' * (name == CONFIG)}" for name, n in rows.items())
    raise UserError(
      f"{folder}: the embeddings have differing numbers of rows: {told}; take config.json and weights from one "
      "checkpoint, or save it again where the embeddings were resized"
    )


def _check_image_token(folder: Path, ids: Mapping[str, int]) -> None:
  """Refuses a config (hf layout) whose image token is not the tokenizer's."""
  stated = _read(folder / CONFIG).get("image_token_id")
  known = ids.get("<IMG_CONTEXT>")
  if isinstance(stated, int) and known is not None and stated != known:
    raise UserError(
      f"{folder / CONFIG}: image_token_id={stated}, but <IMG_CONTEXT> has id {known} in the tokenizer; take both from "
      f"one checkpoint, or set it to {known}"
    )


def _tell_ends(folder: Path, rows: int) -> None:
  """Warns of stop ids that have no row in the embeddings."""
  found = _read(folder / "generation_config.json").get("eos_token_id")
  for index in found if isinstance(found, list) else [found]:
    if isinstance(index, int) and index >= rows:
      logging.warning(
        "%s: no answer ends by eos_token_id=%d, since the embeddings have %d rows",
        *(folder / "generation_config.json", index, rows),
      )


def _read(path: Path) -> dict[str, Any]:
  return config_io.read_json(path) if path.is_file() else {}
