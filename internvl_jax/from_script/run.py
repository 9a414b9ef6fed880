"""From a launch script to the text of a recipe, and what is to be said of it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl_jax import reference_arguments
from internvl_jax.errors import UserError
from internvl_jax.from_script import recipe as recipes
from internvl_jax.from_script import sandbox
from internvl_jax.from_script.launches import Launch, Reading, read_script

# Those that a shell, or this program, has for itself.
_OF_THE_SHELL = re.compile(
  r"PATH|PWD|OLDPWD|HOME|SHELL|USER|LOGNAME|TERM|LANG|LC_\w+|_|SHLVL|IFS|PS\d|BASH\w*|PYTHONPATH|ENV"
)


def convert(
  script: str, variables: Mapping[str, str], arguments: Sequence[str], *, number: int | None, file: str
) -> tuple[str, str]:
  """The text of a recipe, and what is to be said.

  Args:
    script: its path.
    variables: of the script, from the command line.
    arguments: its $1, $2 and so on.
    number: of the training, from 1, of a script that starts several.
    file: where the recipe is to be.

  Raises:
    UserError: the script cannot be read, or says what no run can follow.
  """
  text = Path(script).read_text(encoding="utf-8", errors="replace")
  inherited = {
    name: os.environ[name] for name in _names_in(text) if name in os.environ and name not in variables
  }
  reading = read_script(script, {**inherited, **variables}, arguments)
  launch = _chosen(script, reading, number)
  given = reference_arguments.parse(launch.words)
  if given.problems:
    raise UserError("\n".join(_explain(script, text, flag, words) for flag, words in given.problems))
  try:
    recipe = recipes.make_recipe(launch, given)
  except UserError as error:
    place = f"{script}, line {launch.line}: " if launch.line else f"{script}: "
    raise UserError("\n".join(place + line for line in str(error).splitlines())) from error
  said = [
    f"{script}{f', line {launch.line}' if launch.line else ''}: {launch.launcher} {launch.program}, "
    f"{recipes.batch_text(recipe, launch)}",
    recipes.report(recipe),
    *_remarks(reading, launch, inherited),
  ]
  return recipes.recipe_text(recipe, launch, script=script, file=file), "\n".join(said)


def _names_in(text: str) -> list[str]:
  """The variables that a script reads and that this process may have for it."""
  names = re.findall(r"\$\{?([A-Za-z_]\w*)", text) + re.findall(r"\b([A-Z_][A-Z0-9_]+)\b", text)
  return [name for name in dict.fromkeys(names) if not _OF_THE_SHELL.fullmatch(name)]


def _chosen(script: str, reading: Reading, number: int | None) -> Launch:
  launches = reading.launches
  if number is None and len(launches) == 1:
    return launches[0]
  if number is None or number > len(launches):
    listed = "; ".join(
      f"{index} is {launch.program}{f' (line {launch.line})' if launch.line else ''}{_named(launch)}"
      for index, launch in enumerate(launches, 1)
    )
    raise UserError(f"{script}: starts {len(launches)} trainings; choose with --launch N: {listed}")
  return launches[number - 1]


def _named(launch: Launch) -> str:
  """What tells a launch from the others: its output folder."""
  values = reference_arguments.parse(launch.words).values
  folder = values.get("training.output_dir")
  return f" to {folder}" if folder else ""


def _explain(script: str, text: str, flag: str, words: str) -> str:
  """A problem, with the line that has the argument."""
  lines = text.splitlines()
  line = next(
    (index for index, line in enumerate(lines, 1) if f"--{flag}" in line or f" {flag} " in f" {line} "), 0
  )
  return f"{script}{f', line {line}' if line else ''}: {words}"


def _remarks(reading: Reading, launch: Launch, inherited: Mapping[str, str]) -> list[str]:
  remarks = []
  if inherited:
    remarks.append(f"variables of this shell that the script reads: {', '.join(inherited)}")
  if reading.assumed:
    words = " ".join(f"{name}={value}" for name, value in reading.assumed.items())
    remarks.append(f"assumed, as one host has them: {words}; give others on the command line")
  if launch.folder:
    remarks.append(
      f"the script trains in {launch.folder}: relative paths are meant from there; start the training there"
    )
  if reading.not_run:
    remarks.append(f"not run: {', '.join(reading.not_run)}")
  where = (
    "namespaces of its own, without network"
    if sandbox.has_namespaces()
    else "restricted bash (no namespaces here)"
  )
  remarks.append(f"the script ran in {where}; none of its programs was executed, nothing of it was kept")
  return remarks
