"""The training that a launch script starts: its arguments and its devices, or why it cannot be read, with the script's line."""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl_jax.errors import UserError
from internvl_jax.from_script import messages, sandbox
from internvl_jax.from_script.devices import devices_of
from internvl_jax.from_script.sandbox import FOLDER, PROGRAM, Outcome, Request
from internvl_jax.from_script.stand_ins import LAUNCHERS, Call

_RERUNS = 40
_LONGEST_FILE = 1 << 20

# An argument that every training of the reference has.
_MARK = re.compile(r"--meta[_-]path(=|$)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
  """A training that the script starts.

  Attributes:
    line: of the script; 0 if it is not known.
    launcher: the program that starts it: "torchrun".
    program: what is trained with: "internvl/train/internvl_chat_finetune.py".
    words: the program's arguments.
    devices: all that take part; None if the script leaves that to the launcher.
    folder: where it is started; empty if where the script is.
  """

  line: int
  launcher: str
  program: str
  words: tuple[str, ...]
  devices: int | None
  folder: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
  """What a script does.

  Attributes:
    launches: the trainings that it starts, in their order.
    assumed: variables that schedulers set, and their values here.
    not_run: commands that were not run, as "conda (line 3)", and files that were not read, as "/root/.bashrc".
  """

  launches: list[Launch]
  assumed: Mapping[str, str]
  not_run: list[str]


def read_script(
  script: str, environ: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
) -> Reading:
  """Runs a script where it can change nothing, and reads what it would train.

  Args:
    script: its path.
    environ: its variables.
    arguments: its $1, $2 and so on.

  Raises:
    UserError: it is no script, it starts no training, or what it would start cannot be known here.
  """
  text = _text_of(script)
  request = Request(script=script, arguments=tuple(arguments), environ=dict(environ or {}))
  request, outcome, assumed = _mended(request, text)
  if not outcome.ended:
    raise UserError(
      f"{script}: did not end in {sandbox.SECONDS:g} s; take out what waits, or loops without an end"
    )
  calls = [dataclasses.replace(call, place=_place(script, text, call)) for call in outcome.calls]
  if errors := [*messages.explain_errors(script, outcome.told), *_cut_off(script, calls)]:
    raise UserError("\n".join(errors))
  launches = _launches(dataclasses.replace(outcome, calls=calls), text)
  not_run = [call for call in calls if not call.found or not _is_training(call)]
  names = list(dict.fromkeys(f"{call.program}{_at(call.line)}" for call in not_run))
  if not launches:
    raise UserError(_explain_nothing(script, outcome, names))
  if not_run and _without_lines(_launches(_with_other_answers(request), text)) != _without_lines(launches):
    raise UserError(
      f"{script}: what {', '.join(names)} would print decides about the launch, and none of it was run; write the values in "
      "its place"
    )
  not_read = [path for path, what in request.at.items() if what == ""]
  return Reading(launches=launches, assumed=assumed, not_run=[*names, *not_read])


def _with_other_answers(request: Request) -> Outcome:
  return sandbox.run(dataclasses.replace(request, answer="2 2"))


def _without_lines(launches: Sequence[Launch]) -> list[Launch]:
  return [dataclasses.replace(launch, line=0) for launch in launches]


def _cut_off(script: str, calls: Sequence[Call]) -> list[str]:
  """A line for each argument that has become a command."""
  return [
    f"{script}, line {call.line}: {call.program} is an argument of no command: the line before is a comment, or does not end "
    "in a backslash"
    for call in calls
    if not call.found and call.program.startswith("-")
  ]


def _text_of(script: str) -> str:
  try:
    return Path(script).read_text(encoding="utf-8")
  except UnicodeDecodeError:
    raise UserError(f"{script}: is no text file") from None


def _place(script: str, text: str, call: Call) -> str:
  return f"{call.place.rpartition(':')[0]}:{messages.line_of_call(script, text, call)}"


def _at(line: int) -> str:
  return f" (line {line})" if line else ""


def _explain_nothing(script: str, outcome: Outcome, not_run: list[str]) -> str:
  said = outcome.told.strip().splitlines()
  last = f"; its last words: {said[-1]!r}" if said and outcome.status else ""
  ignored = f"; not run: {', '.join(not_run)}" if not_run else ""
  return (
    f"{script}: starts no training of the reference (torchrun, srun, deepspeed, accelerate or python, with "
    f"--meta_path){ignored}{last}"
  )


# --- Launches -----------------------------------------------------------------------------------------------


def _is_training(call: Call) -> bool:
  words = _arguments_of(call.words)
  return [word[-5:] for word in words] == [".json"] or any(map(_MARK.match, words))


def _program_of(words: Sequence[str]) -> str:
  """The training program among a launcher's words: the first file of Python, else the last module; else empty."""
  files = [word for word in words if word.endswith(".py")]
  modules = [after for word, after in itertools.pairwise(words) if word in ("-m", "--module")]
  return files[0] if files else modules[-1] if modules else ""


def _arguments_of(words: Sequence[str]) -> Sequence[str]:
  program = _program_of(words)
  return words[words.index(program) + 1 :] if program else ()


def _launches(outcome: Outcome, text: str) -> list[Launch]:
  """Those of a run; what differs only in its launcher's words, as on several hosts, counts once."""
  # Paths that the script does not name are below the folder where it is started: they become relative.
  here = "" if outcome.folder in text else outcome.folder.rstrip("/") + "/"
  found: dict[tuple[str, ...], Launch] = {}
  for call in outcome.calls:
    if call.found and _is_training(call):
      words = tuple(word.replace(here, "") if here else word for word in _arguments_of(call.words))
      launch = Launch(
        line=call.line,
        launcher=call.program,
        program=_program_of(call.words),
        words=words,
        devices=devices_of(call, tasks=_sbatch(text).get("SLURM_NTASKS")),
        folder="" if call.folder == outcome.folder else call.folder,
      )
      found.setdefault(words, launch)
  return list(found.values())


# --- What the script lacks -----------------------------------------------------------------------------------

# Files that set up a shell, not a training: taken as empty.
_SETUP = re.compile(
  r"(^|/)(\.?bashrc|\.?bash_profile|\.?profile|activate|conda\.sh|modules?\.sh|bash|setvars\.sh)$"
)


def _mended(request: Request, text: str) -> tuple[Request, Outcome, dict[str, str]]:
  """Runs a script anew as long as it lacks what is known; the last run, and the variables that schedulers would set.

  Raises:
    UserError: variables have no value, all of them by name.
  """
  defaults = _defaults(text)
  unset: dict[str, int] = {}
  assumed: dict[str, str] = {}
  outcome = sandbox.run(request)
  for _ in range(_RERUNS):
    if added := _lacking(request, outcome):
      request = dataclasses.replace(request, at={**request.at, **added})
    elif (unbound := messages.unbound_variable(outcome.told)) and not messages.other_errors(outcome.told):
      file, name, line = unbound
      if name in defaults:
        assumed[name] = defaults[name]
      else:
        unset[name] = messages.line_of_variable(request.script, text, file=file, name=name, line=line)
      request = dataclasses.replace(request, environ={**request.environ, name: defaults.get(name, "")})
    else:
      break
    outcome = sandbox.run(request)
  if unset:
    names = ", ".join(f"{name} (line {line})" for name, line in unset.items())
    raise UserError(
      f"{request.script}: variables that have no value: {names}; add {' '.join(f'{name}=...' for name in unset)} to the "
      "command (NAME= for an empty one)"
    )
  return request, outcome, assumed


def _lacking(request: Request, outcome: Outcome) -> dict[str, str]:
  """Something that the script did not find, and what to put there; empty if there is nothing."""
  for is_cd, path in messages.missing_paths(outcome.told):
    what = FOLDER if is_cd else _content(path)
    at = os.path.dirname(path) if what == FOLDER and not is_cd else path
    if at and at not in request.at and not at.startswith("/proc"):
      return {at: what}
  return {}


def _content(path: str) -> str:
  if os.path.basename(path) in LAUNCHERS:
    return PROGRAM
  if _SETUP.search(path):
    return ""
  file = Path(os.path.expanduser(path))
  if file.is_file() and file.stat().st_size <= _LONGEST_FILE:
    return file.read_text(encoding="utf-8", errors="replace")
  return FOLDER  # The one that a file is to be written into.


# --- What schedulers set ------------------------------------------------------------------------------------


def _defaults(text: str) -> dict[str, str]:
  """Variables of launchers and schedulers as one host has them, or as the script's #SBATCH lines say."""
  return {
    "WORLD_SIZE": "1",
    **dict.fromkeys(
      ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID"), "0"
    ),
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    **dict.fromkeys(("SLURM_JOB_ID", "SLURM_JOBID"), "1"),
    **dict.fromkeys(("SLURM_JOB_NODELIST", "SLURM_NODELIST"), "localhost"),
    "SLURM_SUBMIT_DIR": os.getcwd(),
    **_sbatch(text),
  }


def _sbatch(text: str) -> dict[str, str]:
  """What Slurm would set by a script's #SBATCH lines; empty if it has none."""
  if not (options := dict(re.findall(r"^#SBATCH\s+--?([a-zA-Z-]+)[= ]*(\S+)", text, re.MULTILINE))):
    return {}
  nodes = options.get("nodes", options.get("N", "1"))
  each = options.get("ntasks-per-node", "1")
  if not (nodes + each).isdigit():
    return {}
  tasks = options.get("ntasks", options.get("n", str(int(nodes) * int(each))))
  return {
    **dict.fromkeys(("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), nodes),
    **dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS"), tasks),
    "SLURM_NTASKS_PER_NODE": each,
  }
