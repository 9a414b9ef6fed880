"""A checkpoint's chat template (Jinja): found in its files, and rendered, to be compared with the template in use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from internvl_jax.hf import model_config as config_io


class RenderError(Exception):
  """A chat template that could not be rendered."""


def read_chat_template(folder: Path) -> tuple[Path, str] | None:
  """The chat template of a checkpoint and the file that has it; None if there is none.

  A processor's own files come before the tokenizer's, as transformers has it; of several named templates, "default".

  Raises:
    UserError: a file is no JSON object.
  """
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path, path.read_text(encoding="utf-8", errors="replace")
  for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
    path = folder / name
    found = config_io.read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
      named = [
        entry.get("template") for entry in found if isinstance(entry, dict) and entry.get("name") == "default"
      ]
      found = named[0] if named else None
    if isinstance(found, str):
      return path, found
  return None


def render(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Mapping[str, Any]]) -> str:
  """The prompt that a chat template makes of messages, up to where the answer begins; without a bos token.

  Raises:
    RenderError: it does not take such messages, or there is no jinja2.
  """
  try:
    found = tokenizer.apply_chat_template(
      [dict(message) for message in messages], chat_template=text, tokenize=False, add_generation_prompt=True
    )
  except Exception as error:  # A template is a program: it may raise whatever it likes.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise RenderError(f"{type(error).__name__}: {reason[:120]}") from error
  return str(found).removeprefix(str(tokenizer.bos_token or ""))
