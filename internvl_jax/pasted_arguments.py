"""Answers arguments of the reference that were pasted on a command line of this package: all at once, with the command to copy."""

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from internvl_jax.nearest_recipe import OURS, nearest
from internvl_jax.recipe_files import FLAG
from internvl_jax.reference_arguments import is_argument, left_out_of, parse

_RECIPE = re.compile(rf"--?{FLAG}(=|$)")


def explain_pasted(args: Sequence[str], command: str, is_flag: Callable[[str], bool]) -> str | None:
  """What to say of a command line that has arguments of the reference; None if it has none.

  Args:
    args: the command line, without the program.
    command: the program: "python -m internvl_jax.train".
    is_flag: whether the command has a flag of that name.
  """
  own, pasted = _split(args, is_flag)
  names = [word[2:].partition("=")[0].replace("-", "_") for word in pasted if word.startswith("--")]
  known = [f"--{name}" for name in names if is_argument(name)]
  if not known:
    return None
  given = parse(pasted)
  left, lost = left_out_of(given)
  values = {path: value for path, value in given.values.items() if path not in OURS}
  if not any(_RECIPE.match(word) for word in own):
    own = [f"--{FLAG}", nearest(values).spec, *own]
  words = [*own, *(f"--{FLAG}.{path}={_text(value)}" for path, value in values.items())]
  subject = "is an argument" if len(known) == 1 else "are arguments"
  return "\n".join(
    [
      f"{', '.join(known)} {subject} of the reference's programs; here, recipes have fields for them, which are set by",
      f"  {command} {shlex.join(words)}",
      *(f"{flag}: left out; {why}" for flag, why in (lost | left).items()),
      *(message for _, message in given.problems),
    ]
  )


def _split(args: Sequence[str], is_flag: Callable[[str], bool]) -> tuple[list[str], list[str]]:
  """This package's words, and others with the words that follow them."""
  own: list[str] = []
  pasted: list[str] = []
  into = own
  for word in args:
    if re.match(r"--?[A-Za-z]", word):
      name = word.lstrip("-").partition("=")[0]
      ours = name.startswith((f"{FLAG}.", f"no{FLAG}.")) or is_flag(name)
      into = own if ours else pasted
    into.append(word)
  return own, pasted


def _text(value: Any) -> str:
  """A value as it is typed on the command line."""
  return f"({','.join(map(str, value))},)" if isinstance(value, tuple) else str(value)
