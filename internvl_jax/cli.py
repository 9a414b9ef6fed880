"""What the commands share: reading the command line, and turning a user's mistake into one line.

A front door with a recipe looks like this:

    _CONFIG = frontdoor.define_config_flag()

    def main(_):
      cfg = _CONFIG.value
      config.validate(cfg)
      ...

    if __name__ == "__main__":
      frontdoor.run_app(main)

`--config F[:arg]` names a recipe, a Python file with `get_config(arg: str = "") -> TrainConfig`, and
`--config.leaf.field=value` overrides a field; `None` clears a field that may be unset.
"""

import difflib
import errno
import importlib.util
import inspect
import logging as stdlib_logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from internvl_jax import signals
from internvl_jax.config import FIELDS, LEAVES, TrainConfig, type_name
from internvl_jax.config_checks import idle_settings
from internvl_jax.environment import set_environment
from internvl_jax.errors import UserError, redacted, suggest
from internvl_jax.foreign import FOREIGN, answer
from internvl_jax.help_text import usage

FLAG = "config"
"""Name of the flag that takes the recipe."""

_OVERRIDE = re.compile(rf"--?(no)?{FLAG}\.([^=]+)(?:=(.*))?", re.DOTALL)
_RECIPE = re.compile(rf"--?{FLAG}(=|$)")

# Errors of the file system that a path given by the user causes.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def define_config_flag(
  flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None, *, default: str | None = None
) -> flags.FlagHolder[TrainConfig]:
  """Defines `--config` and its overrides; the holder's `.value` is the `TrainConfig` once flags are parsed.

  Args:
    flag_values: Where to define it.
    argv: The command line with the program's name first, if not `sys.argv`. The overrides are found in it.
    default: The recipe to take where none is named; None demands one.
  """
  for field in FIELDS.values():
    if typing.get_origin(field.type) is Literal:
      choices = list(typing.get_args(field.type))
      config_flags.register_flag_parser_for_type(field.type, flags.EnumParser(choices))
  try:
    holder = config_flags.DEFINE_config_file(
      FLAG, default, "Recipe: FILE.py or FILE.py:ARG.", flag_values=flag_values, sys_argv=argv
    )
  except (
    flags.CantOpenFlagFileError
  ) as error:  # Flag files are read to find the overrides, while modules are imported.
    _exit_with(UserError(_one_line(error).removeprefix("ERROR:: ")))
  flag_values[FLAG].parser = _RecipeParser()
  return holder


def run_app(main: Callable[[list[str]], Any]) -> None:
  """Runs a command's `main(argv)` under absl; ends the process.

  A `UserError`, a path that cannot be opened and a full disk become a line on stderr and exit code 1
  (`--verbosity=1` shows where they came from), and so does a wrong command line. Any other exception is a bug and
  keeps its traceback. Whatever it is comes last, after the end of worker processes and of threads. Ctrl-C and SIGTERM
  end a command in a line with exit code 75, see `signals`.
  """
  signals.watch()
  set_environment()
  sys.excepthook = _print_traceback

  def guarded(argv: list[str]) -> Any:
    try:
      return main(argv)
    except Exception as error:
      _exit_with(error)

  def guarded_parse(argv: Sequence[str]) -> list[str]:
    if _asks_for_help(argv):
      full = any("helpfull" in arg for arg in argv)
      print(usage(sys.modules[main.__module__].__doc__ or "", flags.FLAGS, FLAG, full=full))
      sys.exit(0)
    try:
      return parse_flags(argv)
    except UserError as error:
      _exit_with(error)

  app.run(guarded, flags_parser=guarded_parse)


_passed: list[str] = []
"""What is to be said of arguments on the command line that no field has and that were accepted."""


def warn_idle(config: TrainConfig) -> None:
  """Logs the settings that ask for what will not happen, a line each."""
  for line in [*_passed, *idle_settings(config)]:
    logging.warning("%s", line)


def set_up_logging(process: int | None = None) -> None:
  """Logs from level INFO on, in short lines that do not break the progress bar.

  Orbax tells of its every move at INFO, so it is heard from WARNING on; errors it logs with their traceback
  several times before it raises them, which is enough. Of several processes, the first tells what all of them do,
  and the others what goes wrong.

  Args:
    process: this process's number, where there are several.
  """
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  handler = _BarAwareHandler()
  name = "" if process is None else f"[{process}] "
  handler.setFormatter(
    stdlib_logging.Formatter(f"%(asctime)s %(levelname).1s {name}%(message)s", datefmt="%H:%M:%S")
  )
  follows = bool(process)

  def is_heard(record: stdlib_logging.LogRecord) -> bool:
    if logging.get_verbosity() > logging.INFO:
      return True
    if "orbax" in record.pathname:
      return record.levelno >= stdlib_logging.WARNING and not record.exc_info
    return record.levelno >= stdlib_logging.WARNING or not follows

  handler.addFilter(is_heard)
  # JAX would tell where it opens its port, after us.
  stdlib_logging.getLogger("jax").setLevel(stdlib_logging.WARNING)
  logger = logging.get_absl_logger()
  logger.handlers, logger.propagate = [handler], False


class _BarAwareHandler(stdlib_logging.Handler):
  """Writes to stderr above the progress bar, if there is one."""

  def emit(self, record: stdlib_logging.LogRecord) -> None:
    tqdm.write(redacted(self.format(record)), file=sys.stderr)


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses a command line (the program's name first) and returns what is left: the program's name.

  Raises:
    UserError: The command line or the recipe is wrong.
  """
  args = flag_values.read_flags_from_files(list(argv), force_gnu=False)
  cleared: list[str] = []
  if FLAG in flag_values and not _asks_for_help(args):
    args, _passed[:] = _without_foreign(args)
    # ml_collections looks for overrides by itself, in sys.argv; it has no public way to be told of others.
    flag: Any = flag_values[FLAG]
    flag._sys_argv = args
    _check_overrides(args, has_default=flag_values[FLAG].default is not None)
    args, cleared = _split_cleared(args)
  try:
    rest = flag_values(args)
  except flags.IllegalFlagValueError as error:
    raise UserError(_explain_value(error)) from error
  except flags.UnrecognizedFlagError as error:
    raise UserError(_explain_unknown_flag(error, flag_values)) from error
  except flags.Error as error:
    raise UserError(_one_line(error)) from error
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value, booleans too")
  for path in cleared:
    leaf, name = path.split(".")
    setattr(getattr(flag_values[FLAG].value, leaf), name, None)
  return rest


def _asks_for_help(args: Sequence[str]) -> bool:
  return any(re.match(r"--?help(short|full|xml)?\b", arg) for arg in args)


def _without_foreign(args: Sequence[str]) -> tuple[list[str], list[str]]:
  """The arguments less those that no field has and that are accepted, and what is to be said of these."""
  kept, remarks = [], []
  for arg in args:
    match = _OVERRIDE.fullmatch(arg)
    path = match[2] if match else ""
    name = path.rpartition(".")[2]
    accepted, why = False, ""
    if match and path not in FIELDS and name in FOREIGN:
      accepted, why = answer(name, match[3] or ("false" if match[1] else "true"))
    if not accepted:
      kept.append(arg)
    elif why:
      remarks.append(f"{path}={match[3] if match else ''} has no effect: {why}")
  return kept, remarks


def _check_overrides(args: Sequence[str], *, has_default: bool) -> None:
  """Refuses overrides of fields that there are not, all at once, and overrides without a recipe."""
  if not has_default and not any(_RECIPE.match(arg) for arg in args):
    given = f" (there is {args[1]!r})" if len(args) > 1 and not _OVERRIDE.fullmatch(args[1]) else ""
    raise UserError(f"--{FLAG} is missing{given}; name a recipe: --{FLAG} FILE.py or --{FLAG} FILE.py:ARG")
  paths = [match[2] for arg in args[1:] if (match := _OVERRIDE.fullmatch(arg))]
  unknown = [path for path in paths if path not in FIELDS]
  if unknown:
    raise UserError("\n".join(explain_unknown(path) for path in unknown))


def explain_unknown(path: str) -> str:
  """Says, in a line, that no field has this path, and which one is probably meant."""
  flag, name = f"--{FLAG}.{path}", path.rpartition(".")[2]
  if path in LEAVES:
    example = next(field for field in FIELDS if field.startswith(f"{path}."))
    return f"{flag} is a group of fields; set one of them, e.g. --{FLAG}.{example}=..."
  if name in FOREIGN:
    return f"{flag}: there is no such field; {FOREIGN[name]}"
  elsewhere = [field for field in FIELDS if field.rpartition(".")[2] == name]
  close = difflib.get_close_matches(name, [field.rpartition(".")[2] for field in FIELDS], n=1, cutoff=0.75)
  elsewhere += [field for field in FIELDS if close and field.rpartition(".")[2] == close[0]]
  hint = f"; did you mean {elsewhere[0]}?" if elsewhere else ""
  return f"{flag}: there is no such field{hint}"


def _explain_unknown_flag(error: flags.UnrecognizedFlagError, flag_values: flags.FlagValues) -> str:
  """A flag of the reference's scripts is a field here; others may be misspelt."""
  name = error.flagname
  fields = [path for path in FIELDS if path.rpartition(".")[2] == name] if FLAG in flag_values else []
  if fields:
    return f"--{name}: a field of the recipe; write --{FLAG}.{fields[0]}=..."
  if name in FOREIGN:
    return f"--{name}: there is no such flag; {FOREIGN[name]}"
  found = re.search(r"Did you mean: ([\w.]+)", str(error))
  hint = f"; did you mean --{found[1]}?" if found else ""
  return f"--{name}: there is no such flag{hint}"


def _split_cleared(args: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes out the overrides that set an optional field to None, which the flag parsers cannot read."""
  last: dict[str, str | None] = {}
  kept = []
  for arg in args:
    match = _OVERRIDE.fullmatch(arg)
    if match:
      last[match[2]] = match[3]
    if not (match and match[3] == "None" and _is_optional(match[2])):
      kept.append(arg)
  return kept, [path for path, value in last.items() if value == "None" and _is_optional(path)]


def _is_optional(path: str) -> bool:
  return type(None) in typing.get_args(FIELDS[path].type)


def _explain_value(error: flags.IllegalFlagValueError) -> str:
  match = re.match(rf"flag --{FLAG}(\.([\w.]+))?=(.*?): (.*)", str(error), re.DOTALL)
  if match and match[2] in FIELDS:
    return f"--{FLAG}.{match[2]}={match[3]} must be {type_name(FIELDS[match[2]].type)}"
  if isinstance(error.__context__, UserError):  # From reading the recipe; absl put its own words around it.
    return str(error.__context__)
  return _one_line(error).removeprefix("flag ")


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def explain(error: BaseException) -> str | None:
  """What to tell the user about an exception that is not a bug of ours; None if it may be one."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.errno in _FULL:
    return f"cannot write {error.filename or 'a file'}: {error.strerror}; make room and start the same command again"
  # An error that names no path is nothing that the user can mend.
  if isinstance(error, _PATH_ERRORS) and error.filename is not None:
    return f"cannot open {error.filename!r}: {error.strerror}"
  return None


def report(error: BaseException) -> None:
  """Prints what `run_app` would, for a process that must end at once."""
  message = explain(error)
  if message is None:
    _print_traceback(type(error), error, error.__traceback__)
    return
  logging.debug("Where it came from:", exc_info=error)
  print("error: " + redacted(message).replace("\n", "\n  "), file=sys.stderr)


def _print_traceback(
  kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
  """Prints what Python does of an exception that nothing caught, without the secrets of URLs."""
  print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _exit_with(error: Exception) -> typing.NoReturn:
  if signals.is_watching():
    logging.flush()
    signals.leave(1, lambda: report(error))
  report(error)
  sys.exit(1)


# --- Recipes ------------------------------------------------------------------------------------------------


def load_recipe(spec: str) -> TrainConfig:
  """Runs a recipe, given as "FILE.py" or "FILE.py:ARG", and returns its configuration.

  Raises:
    UserError: There is no such file, it has no usable `get_config`, it sets a field that there is not, or it
      refuses its argument.
  """
  path, *arg = spec.split(":", 1)
  get_config = getattr(_load_module(path), "get_config", None)
  if not callable(get_config):
    raise UserError(f"--{FLAG}={spec}: {path} has no function get_config(arg: str = '') -> TrainConfig")
  _check_arity(get_config, spec, arg)
  try:
    config = get_config(*arg)
  except (AttributeError, TypeError) as error:
    raise _explain_recipe_error(error) from error
  if not isinstance(config, TrainConfig):
    raise UserError(
      f"--{FLAG}={spec}: get_config returned {type(config).__name__}; it must return a TrainConfig"
    )
  return config


def _load_module(path: str) -> types.ModuleType:
  if not os.path.isfile(path):
    raise UserError(f"--{FLAG}={path}: no such recipe file")
  spec = importlib.util.spec_from_file_location("_recipe", path)
  if spec is None or spec.loader is None:
    raise UserError(f"--{FLAG}={path}: a recipe is a Python file, so its name must end in .py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses look their own module up.
  try:
    spec.loader.exec_module(module)
  except (AttributeError, TypeError) as error:
    raise _explain_recipe_error(error) from error
  except SyntaxError as error:
    where = f"{os.path.relpath(error.filename or path)}:{error.lineno}"
    raise UserError(f"--{FLAG}={path}: {where}: {error.msg}") from error
  except ImportError as error:
    frame = next(
      f for f in reversed(traceback.extract_tb(error.__traceback__)) if "importlib" not in f.filename
    )
    raise UserError(
      f"--{FLAG}={path}: {os.path.relpath(frame.filename)}:{frame.lineno}: {error}; install it, or name its folder in "
      "PYTHONPATH (a recipe that starts from a published one loads that: docs/training.md)"
    ) from error
  return module


def _check_arity(get_config: Callable, spec: str, arg: list[str]) -> None:
  try:
    inspect.signature(get_config).bind(*arg)
  except TypeError:
    remedy = "leave out what follows the colon" if arg else "write FILE.py:ARG"
    given = f"the argument {arg[0]!r}" if arg else "no argument"
    raise UserError(f"--{FLAG}={spec}: its get_config does not take {given}; {remedy}") from None


def _explain_recipe_error(error: AttributeError | TypeError) -> Exception:
  """A `UserError` if the recipe named a field that a leaf has not; else a bug in the recipe, traceback kept."""
  text = str(error)
  match = re.match(r"'(\w+)' object has no attribute '(\w+)'", text) or re.match(
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text
  )
  classes = {leaf.__name__: name for name, leaf in LEAVES.items()}
  owner, field = match.groups() if match else ("", "")
  frame = traceback.extract_tb(error.__traceback__)[-1]
  where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
  if owner in classes:
    return UserError(f"{where}: {explain_unknown(f'{classes[owner]}.{field}').removeprefix(f'--{FLAG}.')}")
  if owner == TrainConfig.__name__:
    return UserError(f"{where}: TrainConfig has no group {field!r}{suggest(field, LEAVES)}")
  # absl would take a TypeError for a wrong flag value and drop its traceback.
  return RuntimeError(f"the recipe failed at {where}")


class _RecipeParser(flags.ArgumentParser):
  """Reads the value of `--config`; ml_collections' own defers some errors and buries others in tracebacks."""

  syntactic_help = "FILE.py or FILE.py:ARG"

  def parse(self, argument: str) -> TrainConfig:
    return load_recipe(argument)

  def flag_type(self) -> str:
    return "recipe"
