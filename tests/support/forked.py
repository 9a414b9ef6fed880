"""Processes that run a module or a script as `python` does, forked from one that has imported what takes seconds.

A server, one for each process of pytest, imports JAX, transformers and the package's training code and never starts a
backend of JAX. What it forks has an environment, a folder, files and an exit code of its own, so it is to its test what
`python -m` would be, seconds earlier.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# Imported before any fork; what is missing here is imported by each that needs it.
_PRELOADED = ("internvl_jax.train.run", "orbax.checkpoint", "transformers", "grain", "tests.support.hosts")

_LONGEST_MESSAGE = 1 << 17
_IMPORT_SECONDS = 300  # What the first question waits for.

# What JAX has read when it was imported, and has to be told again; other settings of JAX are the server's.
_DEVICES = "JAX_NUM_CPU_DEVICES"


class Forked:
  """A process of the server, with what tests use of `subprocess.Popen`."""

  def __init__(self, pid: int):
    self.pid, self.returncode = pid, None

  def poll(self) -> int | None:
    if self.returncode is None:
      self.returncode = _ask({"poll": self.pid})
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    end = None if timeout is None else time.monotonic() + timeout
    while (code := self.poll()) is None:
      if end is not None and time.monotonic() > end:
        raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
      time.sleep(0.01)
    return code

  def send_signal(self, kind: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, kind)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def start(
  arguments: Sequence[str],
  *,
  environment: Mapping[str, str],
  stdout: int | None = None,
  stderr: int | None = None,
  folder: str | Path | None = None,
) -> Forked:
  """Starts `python ARGUMENTS`, which are `-m MODULE ...` or `SCRIPT ...`.

  Args:
    arguments: as after the interpreter's name.
    environment: all of it; of JAX's own settings only the number of devices may differ from this process's.
    stdout: file descriptor, if not this process's own.
    stderr: the same.
    folder: working directory, if not this process's own.

  Raises:
    ValueError: another setting of JAX is wanted.
  """
  names = {name for name in {*environment, *os.environ} if name.startswith("JAX_") and name != _DEVICES}
  if changed := [name for name in sorted(names) if environment.get(name) != os.environ.get(name)]:
    raise ValueError(f"{changed} are read when JAX is imported, before the fork")
  request = {
    "arguments": list(arguments),
    "environment": dict(environment),
    "folder": str(folder or Path.cwd()),
  }
  return Forked(_ask(request, [1 if stdout is None else stdout, 2 if stderr is None else stderr]))


def run(arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, timeout: float = 600):
  """Like `subprocess.run` with its output captured, in files of `folder`."""
  paths = [folder / f"{name}-{time.time_ns()}.txt" for name in ("stdout", "stderr")]
  with paths[0].open("wb") as out, paths[1].open("wb") as err:
    process = start(arguments, environment=environment, stdout=out.fileno(), stderr=err.fileno())
  try:
    code = process.wait(timeout)
  finally:
    process.kill()
  texts = [path.read_text(errors="replace") for path in paths]
  for path in paths:
    path.unlink()
  return subprocess.CompletedProcess(list(arguments), code, *texts)


def _ask(request: dict[str, Any], files: Sequence[int] = ()) -> int | None:
  connection = _server()
  socket.send_fds(connection, [json.dumps(request).encode()], files)
  answer = connection.recv(_LONGEST_MESSAGE)
  if not answer:
    raise RuntimeError("the server of processes has ended; its last words are above")
  return json.loads(answer)


@functools.cache
def _server() -> socket.socket:
  """The connection to the server, which ends with this process."""
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  with theirs:
    command = [sys.executable, "-m", "tests.support.forked", str(theirs.fileno())]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=REPOSITORY)
  ours.settimeout(_IMPORT_SECONDS)
  return ours


def _serve(connection: socket.socket) -> list[str]:
  """Answers until the other end closes; in a forked process, returns the arguments it has to run."""
  ended: dict[int, int] = {}
  while True:
    message, files, *_ = socket.recv_fds(connection, _LONGEST_MESSAGE, 2)
    if not message:
      sys.exit(0)
    request = json.loads(message)
    if pid := request.get("poll"):
      if pid not in ended and (status := os.waitpid(pid, os.WNOHANG))[0]:
        ended[pid] = os.waitstatus_to_exitcode(status[1])
      answer = ended.get(pid)
    elif not (answer := os.fork()):
      connection.close()
      return _become(request, files)
    for file in files:
      os.close(file)
    connection.send(json.dumps(answer).encode())


def _become(request: dict[str, Any], files: Sequence[int]) -> list[str]:
  """Makes a forked process what was asked for."""
  import jax

  for number, file in enumerate(files, 1):
    os.dup2(file, number)
    os.close(file)
  os.chdir(request["folder"])
  os.environ.clear()
  os.environ.update(request["environment"])
  jax.config.update("jax_num_cpu_devices", int(os.environ[_DEVICES]))
  return request["arguments"]


def _run(arguments: list[str]) -> None:
  if arguments[0] == "-m":
    sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
  else:
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
  for name in _PRELOADED:
    importlib.import_module(name)
  _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
