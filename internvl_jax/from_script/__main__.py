"""Turns a launch script of the reference into a recipe, and prints what that says differently from the nearest published one.

  python -m internvl_jax.from_script --help
  python -m internvl_jax.from_script my_finetune.sh [NAME=VALUE ...] [--output my_finetune.py] [--launch N] [-- ARG ...]

bash runs the script, with the variables NAME and the arguments ARG, in a folder that is thrown away; stand-ins for torchrun,
srun, deepspeed, accelerate and python take down what they were to start. No other program of yours is executed, nothing outside
of that folder is written, nothing is fetched. docs/from_script.md tells what that rests on.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError

_OUTPUT = flags.DEFINE_string(
  "output", None, "The recipe to write; the script's name, ending in .py, in this folder if unset."
)
_LAUNCH = flags.DEFINE_integer(
  "launch", None, "Which training it is, of a script that starts several.", lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Write over an existing file.")


def main(argv: Sequence[str]) -> None:
  """Reads the script, writes the recipe, prints."""
  script, variables, arguments = _positional(argv[1:])
  output = Path(_OUTPUT.value or f"{Path(script).stem}.py")
  if output.suffix != ".py":
    raise UserError(f"--output={output}: a recipe's name ends in .py")
  if output.exists() and not _OVERWRITE.value:
    raise UserError(f"{output} is there already; name another file with --output, or add --overwrite")
  from internvl_jax.from_script.run import convert

  text, said = convert(script, variables, arguments, number=_LAUNCH.value, file=str(output))
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(text, encoding="utf-8")
  print(f"{said}\nwritten: {output}; to train:\n  python -m internvl_jax.train --config {output}")


def _positional(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
  """The script, its variables, and its arguments, which follow "--"."""
  at = words.index("--") if "--" in words else len(words)
  ours, arguments = list(words[:at]), list(words[at + 1 :])
  if not ours:
    raise UserError("name a script: python -m internvl_jax.from_script my_finetune.sh")
  script, *settings = ours
  if not os.path.isfile(script):
    raise UserError(f"{script!r}: no such file; the script comes first, then NAME=VALUE")
  for word in settings:
    if not re.match(r"[A-Za-z_]\w*=", word):
      raise UserError(f"{word!r} is no NAME=VALUE; arguments of the script follow --")
  return script, dict(word.split("=", 1) for word in settings), arguments


if __name__ == "__main__":
  cli.run_app(main, positional=True)
