"""What the commands share: reading the command line, and turning a user's mistake into one line.

A command is a module of flags and phases. What takes seconds to import (JAX, Flax, transformers, Orbax) is imported in
`main`, once the flags are checked, so that `--help` and a wrong flag are answered at once:

    _CONFIG = cli.define_config_flag()

    def main(argv: Sequence[str]) -> None:
      del argv
      config = _CONFIG.value
      validate(config)
      from internvl_jax.room import work

      work(config)

    if __name__ == "__main__":
      cli.run_app(main)

`--config RECIPE[:ARG]` names a recipe (see `internvl_jax.recipe_files`), and
`--config.leaf.field=value` overrides a field; `None` clears a field that may be unset. `--print_config` prints all of
them in place of what the command does.
"""

import errno
import functools
import logging as stdlib_logging
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
from internvl_jax.config import FIELDS, TrainConfig, type_name
from internvl_jax.config_checks import idle_settings
from internvl_jax.environment import set_environment
from internvl_jax.errors import UserError, redacted
from internvl_jax.foreign import FOREIGN, answer
from internvl_jax.help_text import config_text, usage
from internvl_jax.pasted_arguments import explain_pasted
from internvl_jax.recipe_files import FLAG, explain_unknown, load_recipe

_BOOLEANS = ("true", "false", "t", "f", "1", "0")
"""What absl takes for a boolean."""

PRINT_FLAG = "print_config"
"""Name of the flag that asks for the configuration's values in place of what the command does."""

_OVERRIDE = re.compile(rf"--?(no)?{FLAG}\.([^=]+)(?:=(.*))?", re.DOTALL)
_RECIPE = re.compile(rf"--?{FLAG}(=|$)")

# Errors of the file system that a path given by the user causes.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def define_config_flag(
  flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None, *, default: str | None = None
) -> flags.FlagHolder[TrainConfig]:
  """Defines `--config`, its overrides and `--print_config`; the holder's `.value` is the parsed `TrainConfig`.

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
      FLAG,
      default,
      "Recipe: NAME or FILE.py, with :ARG if it takes one.",
      flag_values=flag_values,
      sys_argv=argv,
    )
  except (
    flags.CantOpenFlagFileError
  ) as error:  # Flag files are read to find the overrides, while modules are imported.
    _exit_with(UserError(_one_line(error).removeprefix("ERROR:: ")))
  flag_values[FLAG].parser = _RecipeParser()
  flags.DEFINE_bool(
    PRINT_FLAG,
    False,
    "Print the values of all fields, those that differ from the defaults marked by an asterisk, and exit.",
    flag_values=flag_values,
  )
  return holder


def run_app(main: Callable[[list[str]], Any], *, positional: bool = False) -> None:
  """Runs a command's `main(argv)` under absl; ends the process.

  `positional` passes words that are no flags on to `main`, behind the program's name; those after "--" as they are.

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
      if PRINT_FLAG in flags.FLAGS and flags.FLAGS[PRINT_FLAG].value:
        config = flags.FLAGS[FLAG].value
        assert config is not None, "the flag is required"
        print(config_text(config))
        return 0
      return main(argv)
    except Exception as error:
      _exit_with(error)

  def guarded_parse(argv: Sequence[str]) -> list[str]:
    if _asks_for_help(argv):
      full = any("helpfull" in arg for arg in argv)
      print(usage(sys.modules[main.__module__].__doc__ or "", flags.FLAGS, FLAG, full=full))
      sys.exit(0)
    try:
      return parse_flags(argv, positional=positional)
    except UserError as error:
      _exit_with(error)

  app.run(guarded, flags_parser=guarded_parse)


def recipe_named(flag_values: flags.FlagValues = flags.FLAGS) -> str | None:
  """What `--config` names; None where there is no such flag, or it is not given."""
  if FLAG not in flag_values or flag_values[FLAG].value is None:
    return None
  return config_flags.get_config_filename(flag_values[FLAG])


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


def parse_flags(
  argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS, *, positional: bool = False
) -> list[str]:
  """Parses a command line (the program's name first) and returns what is left: the program's name.

  With `positional`, also the words that are no flags, which may stand among them, and "--" with what follows it.

  Raises:
    UserError: The command line or the recipe is wrong.
  """
  at = list(argv).index("--") if positional and "--" in argv else len(argv)
  args = flag_values.read_flags_from_files(list(argv[:at]), force_gnu=positional)
  if positional:
    flag_values.set_gnu_getopt()
  cleared: list[str] = []
  if FLAG in flag_values and not _asks_for_help(args):
    args = _with_equals_signs(args)
    if pasted := explain_pasted(args[1:], _command_of(args[0]), functools.partial(_is_flag, flag_values)):
      raise UserError(pasted)
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
    raise UserError(_explain_unknown_flag(error)) from error
  except flags.Error as error:
    raise UserError(_one_line(error)) from error
  if positional:
    return [*rest, *argv[at:]]
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value, booleans too")
  for path in cleared:
    leaf, name = path.split(".")
    setattr(getattr(flag_values[FLAG].value, leaf), name, None)
  return rest


def _command_of(program: str) -> str:
  """How a user starts this program."""
  spec = sys.modules["__main__"].__spec__
  return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {program}"


def _is_flag(flag_values: flags.FlagValues, name: str) -> bool:
  return name in flag_values or name.removeprefix("no") in flag_values


def _with_equals_signs(args: Sequence[str]) -> list[str]:
  """Joins overrides with the values that follow them after a space, of booleans only what is one: `--config.x True`."""
  joined: list[str] = []
  for word in args:
    match = _OVERRIDE.fullmatch(joined[-1]) if joined else None
    if match and match[1] and word.lower() in _BOOLEANS:
      raise UserError(f"{joined[-1]} takes no value, but {word!r} follows; write --{FLAG}.{match[2]}=...")
    if match and match[3] is None and not match[1] and _is_value(match[2], word):
      joined[-1] += f"={word}"
    else:
      joined.append(word)
  return joined


def _is_value(path: str, word: str) -> bool:
  """Whether a word that follows an override without a value is its value."""
  kinds = typing.get_args(FIELDS[path].type) or (FIELDS[path].type,) if path in FIELDS else ()
  if bool in kinds:
    return word.lower() in _BOOLEANS or (type(None) in kinds and word == "None")
  return not word.startswith("--")


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
    raise UserError(f"--{FLAG} is missing{given}; name a recipe: --{FLAG} NAME:ARG or --{FLAG} FILE.py:ARG")
  paths = [match[2] for arg in args[1:] if (match := _OVERRIDE.fullmatch(arg))]
  unknown = [path for path in paths if path not in FIELDS]
  if unknown:
    raise UserError("\n".join(explain_unknown(path) for path in unknown))


def _explain_unknown_flag(error: flags.UnrecognizedFlagError) -> str:
  found = re.search(r"Did you mean: ([\w.]+)", str(error))
  hint = f"; did you mean --{found[1]}?" if found else ""
  return f"--{error.flagname}: there is no such flag{hint}"


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


class _RecipeParser(flags.ArgumentParser):
  """Reads the value of `--config`; ml_collections' own defers some errors and buries others in tracebacks."""

  syntactic_help = "NAME or FILE.py, with :ARG if it takes one"

  def parse(self, argument: str) -> TrainConfig:
    return load_recipe(argument)

  def flag_type(self) -> str:
    return "recipe"
