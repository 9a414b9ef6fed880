"""Runs a script with bash where it can change nothing, and nothing but stand-ins and a few tools of text is executed.

Two ways, the first that this machine lets a user have:

- Namespaces (Linux): a process tree, a network without a way out and a root folder of its own, which is a temporary folder
  that holds bash, some thirty tools such as `basename` and `mkdir`, and the stand-ins. What the script writes is written there,
  and is gone afterwards.
- Restricted bash (`bash -r`): no redirection to files, no other folder, no program named by a path; of programs there are stand-ins and
  tools that only read.
"""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from internvl_jax.from_script import stand_ins
from internvl_jax.from_script.stand_ins import Call

SECONDS = 20.0
"""What a script may take."""

FOLDER = "\0folder"
PROGRAM = "\0program"
"""What may be put at a path of the script's file system, besides the texts of files."""

_READING = (
  *(
    "basename",
    "cat",
    "cut",
    "dirname",
    "echo",
    "egrep",
    "expr",
    "false",
    "grep",
    "head",
    "id",
    "ls",
    "nproc",
    "paste",
  ),
  *(
    "printf",
    "pwd",
    "readlink",
    "realpath",
    "rev",
    "seq",
    "tac",
    "tail",
    "test",
    "[",
    "tr",
    "true",
    "uname",
    "wc",
    "whoami",
  ),
)
_WRITING = (
  *(
    "awk",
    "bc",
    "chmod",
    "cp",
    "find",
    "ln",
    "mkdir",
    "mktemp",
    "mv",
    "rm",
    "rmdir",
    "sed",
    "shuf",
    "sort",
    "tee",
  ),
  *("touch", "uniq", "xargs", "date"),
)
_ADMIN = "/usr/sbin:/sbin"

_LONGEST_FILE = 1_000_000

# No file is larger, no processor works longer (seconds).
_LIMITS = "ulimit -f 65536; ulimit -t 30"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
  """A script to be run.

  Attributes:
    script: its path, as typed.
    arguments: its $1, $2 and so on.
    environ: its variables, besides those that a shell has.
    at: what is at which path, besides: FOLDER, PROGRAM (a stand-in), or a file's text.
    answer: what commands that are not run print, as words of bash.
  """

  script: str
  arguments: tuple[str, ...] = ()
  environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
  at: Mapping[str, str] = dataclasses.field(default_factory=dict)
  answer: str = "1"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
  """What a run left.

  Attributes:
    calls: of stand-ins, in their order.
    told: all that was printed, or written to a file in the folder where the script was started.
    folder: where it was started, as it saw it.
    status: its exit status.
    ended: False if it took too long.
  """

  calls: list[Call]
  told: str
  folder: str
  status: int
  ended: bool


def run(request: Request) -> Outcome:
  """Runs a script; see the module."""
  with tempfile.TemporaryDirectory(prefix="from_script_") as folder:
    return _in_namespaces(request, Path(folder)) if has_namespaces() else _restricted(request, Path(folder))


@functools.cache
def has_namespaces() -> bool:
  """Whether this machine lets this user have namespaces."""
  if not all(map(_which, ("unshare", "mount", "chroot", "ldd"))):
    return False
  with tempfile.TemporaryDirectory() as folder:
    probe = Path(folder, "probe.sh")
    probe.write_text("torchrun probe\n")
    outcome = _in_namespaces(Request(script=str(probe)), Path(folder, "root"))
  return [call.program for call in outcome.calls] == ["torchrun"]


def _which(program: str) -> str | None:
  return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_ADMIN}")


def _bash() -> str:
  return shutil.which("bash") or "/bin/bash"


def _execute(command: list[str], *, environ: Mapping[str, str], folder: str) -> tuple[str, int, bool]:
  """What a command printed, its status, and whether it ended in time."""
  process = subprocess.Popen(
    command,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=environ,
    cwd=folder,
    start_new_session=True,
    encoding="utf-8",
    errors="replace",
  )
  try:
    told, _ = process.communicate(timeout=SECONDS)
    return told, process.returncode, True
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, 9)
    return process.communicate()[0], process.returncode, False


# --- In namespaces ------------------------------------------------------------------------------------------

# The first process of the tree: it outlives the script until the last of what that left in the background has ended.
_FIRST = f"""\
cd "$1" && shift
{_LIMITS}
PATH=/usr/bin /usr/bin/bash -u "$@"
status=$?
while kill -0 -- -1 2> /dev/null; do /.sleep 0.02; done
exit $status
"""

_ENTER = """\
mount -t proc -o ro proc "$1/proc" 2> /dev/null
mount --bind /dev/null "$1/dev/null" 2> /dev/null
exec chroot "$@"
"""


def _in_namespaces(request: Request, root: Path) -> Outcome:
  start = os.getcwd()
  _furnish(root, request, start)
  # -p: the startup file is for the script alone.
  inside = ["/usr/bin/bash", "-p", "/.first", start, request.script, *request.arguments]
  command = [
    *(
      _which("unshare") or "unshare",
      "--user",
      "--map-root-user",
      "--mount",
      "--net",
      "--pid",
      "--fork",
      "--kill-child",
    ),
    *(_bash(), "-p", "-c", _ENTER, "enter", str(root), *inside),
  ]
  environ = _environ(request, path=f"{os.environ.get('PATH', os.defpath)}:{_ADMIN}", startup="/.startup")
  furnished = _files(_inside(root, start))
  told, status, ended = _execute(command, environ=environ, folder=start)
  written = _files(_inside(root, start)) - furnished
  return Outcome(
    calls=stand_ins.read_calls(root / ".records"),
    told="\n".join([told, *(file.read_text(errors="replace")[:_LONGEST_FILE] for file in sorted(written))]),
    folder=start,
    status=status,
    ended=ended,
  )


def _furnish(root: Path, request: Request, start: str) -> None:
  """Makes the script's root folder."""
  for folder in ("usr/bin", "proc", "dev/shm", "tmp", "root", ".records"):
    (root / folder).mkdir(parents=True)
  (root / "bin").symlink_to("usr/bin")
  (root / "dev/null").touch()
  for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
    (root / "dev" / name).symlink_to(f"/proc/self/fd{target}")
  for place, source in _tools().items():
    _inside(root, place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, _inside(root, place))
  (root / "usr/bin/sh").symlink_to("bash")
  texts = stand_ins.programs("/usr/bin/bash", "/.records", request.answer, restricted=False)
  for name, text in texts.items():
    _program(root / "usr/bin" / name, text)
  (root / ".startup").write_text(stand_ins.startup_text(f"/usr/bin/{stand_ins.NOT_RUN}"))
  (root / ".first").write_text(_FIRST)
  _inside(root, start).mkdir(parents=True, exist_ok=True)
  script = _inside(root, os.path.join(start, request.script))
  script.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(request.script, script)
  for path, what in request.at.items():
    _put(_inside(root, os.path.join(start, path)), what, texts)


def _inside(root: Path, path: str) -> Path:
  return root / os.path.normpath(path).lstrip("/")


def _put(path: Path, what: str, texts: Mapping[str, str]) -> None:
  folder = path if what == FOLDER else path.parent
  folder.mkdir(parents=True, exist_ok=True)
  if what == PROGRAM:
    _program(path, texts[path.name])
  elif what != FOLDER:
    _program(path, what)


def _program(path: Path, text: str) -> None:
  path.unlink(missing_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@functools.cache
def _tools() -> Mapping[str, str]:
  """Where in the script's file system the tools and the libraries that they need are, and of what they are copies."""
  found = {name: shutil.which(name) for name in ("bash", *_READING, *_WRITING)}
  tools = {f"/usr/bin/{name}": os.path.realpath(path) for name, path in found.items() if path}
  tools["/.sleep"] = os.path.realpath(_which("sleep") or "/bin/sleep")
  listed = subprocess.run(["ldd", *set(tools.values())], capture_output=True, text=True, check=False).stdout
  libraries = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed, re.MULTILINE))
  return tools | {library: library for library in libraries}


def _files(folder: Path) -> set[Path]:
  return {path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


# --- Restricted bash ----------------------------------------------------------------------------------------


def _restricted(request: Request, root: Path) -> Outcome:
  programs, records, start = root / "bin", root / "records", root / "start"
  for folder in (programs, records, start):
    folder.mkdir()
  bash = _bash()
  for name in _READING:
    if path := shutil.which(name):
      (programs / name).symlink_to(path)
  (programs / "date-of-day").symlink_to(shutil.which("date") or "/bin/date")
  texts = stand_ins.programs(bash, str(records), request.answer, restricted=True)
  for name, text in texts.items():
    _program(programs / name, text)
  startup = root / "startup"
  startup.write_text(stand_ins.startup_text(stand_ins.NOT_RUN))
  script = Path(request.script).name
  shutil.copyfile(request.script, start / script)
  for path, what in request.at.items():
    if "/" not in path:
      _put(start / path, what, texts)
  environ = _environ(request, path=str(programs), startup=str(startup))
  command = [bash, "-c", f'{_LIMITS}; exec "$@"', "limits", bash, "-r", "-u", script, *request.arguments]
  told, status, ended = _execute(command, environ=environ, folder=str(start))
  return Outcome(
    calls=stand_ins.read_calls(records), told=told, folder=str(start), status=status, ended=ended
  )


def _environ(request: Request, *, path: str, startup: str) -> dict[str, str]:
  home = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME") if name in os.environ}
  empty = {"PYTHONPATH": "", "LD_LIBRARY_PATH": ""}  # Which scripts add to.
  return {**home, **empty, **request.environ, "LC_ALL": "C", "PATH": path, "BASH_ENV": startup}
