"""Programs that take the place of those that a launch script starts: they record how they were called, and end with 0.

Each call leaves a file of texts that end in NUL: the program's name, the script's line, the folder, the words that a wrapper
such as srun was given, CUDA_VISIBLE_DEVICES, and the arguments.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

_PYTHONS = ("python", "python2", "python3", *(f"python3.{minor}" for minor in range(7, 16)))

LAUNCHERS = ("torchrun", "deepspeed", "accelerate", *_PYTHONS)
"""Programs that start training, or Python."""

WRAPPERS = (
  *("srun", "mpirun", "mpiexec", "env", "nohup", "numactl", "taskset", "timeout", "nice", "ionice", "setsid"),
  *("stdbuf", "time", "sudo", "unbuffer", "command"),
)
"""Programs that start the program that their arguments name."""

SHELLS = ("bash", "sh")

NOT_RUN = "not-run"
"""Records what has no stand-in: bash calls it for a command that it does not find."""

LINE = "FROM_SCRIPT_LINE"
"""The variable that holds FILE:LINE of the command that bash is about to run."""

_BEFORE = "FROM_SCRIPT_BEFORE"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call:
  """One call of a stand-in.

  Attributes:
    program: its name, or that of the command that was not run.
    found: False for a command that has no stand-in.
    place: FILE:LINE of the script; the line of a command's first word.
    folder: where it was called.
    before: words of wrappers before it: ("srun", "-n", "8").
    cards: CUDA_VISIBLE_DEVICES.
    words: its arguments.
  """

  program: str
  found: bool
  place: str
  folder: str
  before: tuple[str, ...]
  cards: str
  words: tuple[str, ...]

  @property
  def line(self) -> int:
    """The script's line; 0 if it is not known."""
    number = self.place.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def read_calls(records: Path) -> list[Call]:
  """The calls that were recorded in a folder, in their order."""
  files = sorted(records.iterdir(), key=lambda file: file.stat().st_mtime_ns)
  return [_parse(file.read_bytes()) for file in files]


def _parse(record: bytes) -> Call:
  name, place, folder, before, cards, *words = record.decode("utf-8", "replace").split("\0")[:-1]
  found = name != NOT_RUN
  program, words = (name, words) if found else (words[0], words[1:])
  return Call(
    program=program,
    found=found,
    place=place,
    folder=folder,
    before=tuple(word for word in before.split("\x1f") if word),
    cards=cards,
    words=tuple(words),
  )


def startup_text(not_run: str) -> str:
  """What bash reads before the script (BASH_ENV): it keeps the line of each command, and records what is not found.

  Of `bash -c`, which has no file, the line is that of the script.

  Args:
    not_run: how `NOT_RUN` is called.
  """
  # In one line, for LINENO counts those of the trap, too.
  own = "-z ${BASH_SOURCE[0]-} || ${FUNCNAME[0]-} = command_not_found_handle"
  keep = f'[[ {own} ]] || {LINE}="${{BASH_SOURCE[0]}}:$LINENO"'
  return f"""\
command_not_found_handle() {{ {not_run} "$@"; }}
export {LINE}
set -T
trap '{keep}' DEBUG
"""


def programs(bash: str, records: str, answer: str, *, restricted: bool) -> Mapping[str, str]:
  """The stand-ins' texts by their names.

  Args:
    bash: the path of bash, for them.
    records: the folder of records, for them.
    answer: what Python, and commands that are not run, print: a script whose arguments depend on that cannot be read.
    restricted: whether they run outside of a file system of their own: then nothing may be written.
  """
  # -p: the startup file is for the script alone.
  head = f"#!{bash} -p\n"
  record = (
    f"""printf '%s\\0' "${{0##*/}}" "${LINE}" "$PWD" "${_BEFORE}" "$CUDA_VISIBLE_DEVICES" "$@" """
    f"""> "{records}/$$.$RANDOM.$RANDOM"\n"""
  )
  say = f"printf '%s\\n' {answer}\n"
  found = {name: head + record + (say if name in _PYTHONS else "") for name in LAUNCHERS}
  found[NOT_RUN] = head + record + say
  found |= dict.fromkeys(WRAPPERS, head + _WRAPPER)
  found |= {"which": head + _WHICH, "hostname": head + "echo localhost\n", "sleep": head}
  if restricted:
    found |= dict.fromkeys(SHELLS, head + _RESTRICTED_SHELL.format(bash=bash))
    found["date"] = head + _DATE
    found |= dict.fromkeys(_WRITING, head)
    found["tee"] = head + "exec cat\n"
  return found


_WRITING = ("mkdir", "rm", "rmdir", "cp", "mv", "ln", "touch", "chmod")

# The first word that names a program is what is wrapped; `env`'s NAME=VALUE are set.
_WRAPPER = f"""\
before="${{0##*/}}"
while [ $# -gt 0 ]; do
  case "${{1##*/}}" in
    {"|".join((*LAUNCHERS, *WRAPPERS, *SHELLS))})
      export {_BEFORE}="${_BEFORE}"$'\\x1f'"$before"
      program="${{1##*/}}"; shift; exec "$program" "$@" ;;
  esac
  case "${{0##*/}}:$1" in env:[A-Za-z_]*=*) export "$1" ;; esac
  before="$before"$'\\x1f'"$1"
  shift
done
exec {NOT_RUN} ${{before//$'\\x1f'/ }}
"""

# An option +r would lift the restrictions.
_RESTRICTED_SHELL = """\
for word in "$@"; do
  case "$word" in +*) ;; *) words+=("$word") ;; esac
done
exec {bash} -r -u "${{words[@]}}"
"""

# -s would set the clock.
_DATE = """\
for word in "$@"; do
  case "$word" in -*s* | --set*) exit 0 ;; esac
done
exec date-of-day "$@"
"""

_WHICH = """\
for name in "$@"; do
  case "$name" in -*) continue ;; esac
  type -P "$name" > /dev/null || exit 1
  printf '%s\\n' "${name##*/}"
done
"""
