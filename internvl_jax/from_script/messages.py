"""What bash says when a script fails, and the lines of the script that it means."""

import os
import re
from collections.abc import Iterator

from internvl_jax.from_script.stand_ins import Call

_MESSAGE = re.compile(r"^([^+:\n][^:\n]*): line (\d+): ([^`\n].*)$", re.MULTILINE)
_UNBOUND = re.compile(r"([A-Za-z_]\w*): unbound variable$")
_MISSING = re.compile(
  r"^[^+:\n][^:\n]*: (?:line \d+: )?(cd: )?([^:\n]+): No such file or directory$", re.MULTILINE
)

# Of builtins that fail where the script runs, and change nothing about its arguments.
_HARMLESS = ("ulimit:", "wait:", "kill:", "disown:", "bind:", "fg:", "bg:", "trap:", "stty:")


def unbound_variable(told: str) -> tuple[str, str, int] | None:
  """The first variable without a value: the file, its name, the line."""
  for file, line, message in _MESSAGE.findall(told):
    if found := _UNBOUND.match(message):
      return file, found[1], int(line)
  return None


def other_errors(told: str) -> bool:
  """Whether bash said that it failed for another reason than a variable without a value."""
  return any(
    not message.startswith(_HARMLESS) and not message.endswith("unbound variable")
    for _, _, message in _MESSAGE.findall(told)
  )


def missing_paths(told: str) -> list[tuple[bool, str]]:
  """Paths that were not there: whether it was to be the current folder, and the path."""
  return [(bool(is_cd), path.strip("'`")) for is_cd, path in _MISSING.findall(told)]


def explain_errors(script: str, told: str) -> list[str]:
  """A line for each time that bash said that it failed, without repetitions."""
  found = dict.fromkeys(_MESSAGE.findall(told))
  return [_explain(script, error) for error in found if not error[2].startswith(_HARMLESS)]


def _explain(script: str, error: tuple[str, str, str]) -> str:
  file, line, message = error
  place = f"{script if is_of(script, file) else file}, line {line}"
  if message.endswith("unbound variable"):
    name = message.partition(":")[0]
    remedy = (
      "give the script's arguments after --" if name.startswith("$") else f"add {name}=... to the command"
    )
    return f"{place}: {name} has no value; {remedy}"
  if "restricted" in message:
    return (
      f"{place}: {message} (this machine has no way to keep what a script writes in a folder of its own, so it runs in "
      "restricted bash); take it out, or name the program without its folder"
    )
  return f"{place}: {message}"


def is_of(script: str, file: str) -> bool:
  """Whether a file that bash names is the script."""
  return os.path.basename(file) == os.path.basename(script)


# --- Lines --------------------------------------------------------------------------------------------------
# Where a command goes on after a backslash, bash's number is that of the line after its first word's, for all of it.


def line_of_call(script: str, text: str, call: Call) -> int:
  """The line of a call's first word; 0 if it is in another file, which the script reads."""
  if not is_of(script, call.place.rpartition(":")[0]):
    return 0
  words = (call.program, *call.before[:1])
  lines = (line for line, said in _lines_around(text, call.line) if any(word in said for word in words))
  return next(lines, call.line)


def line_of_variable(script: str, text: str, *, file: str, name: str, line: int) -> int:
  """The line that reads a variable, in the command that bash says is at a line."""
  if is_of(script, file):
    for number, said in _lines_around(text, line):
      if re.search(rf"\b{name}\b", said):
        return number
  return line


def _lines_around(text: str, line: int) -> Iterator[tuple[int, str]]:
  """The lines of a command, from the one before the given one on."""
  lines = text.splitlines()
  for number in range(max(line - 1, 1), len(lines) + 1):
    yield number, lines[number - 1]
    if number >= line and not lines[number - 1].endswith("\\"):
      return
