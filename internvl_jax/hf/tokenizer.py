"""Tokenizers, from a checkpoint's own files; code that a checkpoint brings is never run."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl_jax.errors import UserError

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.json",
  "chat_template.jinja",
)
"""What a tokenizer may consist of."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a checkpoint folder.

  Its tokenizer.json is taken as it stands where there is one: classes named in tokenizer_config.json may
  rebuild it, and differ from one release of transformers to the next.

  Raises:
    UserError: the folder has no tokenizer that can be read.
  """
  folder = Path(folder)
  try:
    if (folder / "tokenizer.json").is_file():
      return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except (OSError, ValueError, ImportError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(f"{folder}: no tokenizer could be read there ({reason})") from None


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
  """Copies a tokenizer's files byte for byte, so that every reader of the source reads the copy alike."""
  for name in FILES:
    if (Path(source) / name).is_file():
      shutil.copyfile(Path(source) / name, Path(target) / name)
