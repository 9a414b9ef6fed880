"""Ctrl-C and SIGTERM end a command in one line, with 75, whatever it is at; nothing is lost and nothing left behind."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_jax import signals
from internvl_jax.outputs import newest_checkpoint
from tests.support.hosts import Job, history, make_world
from tests.support.toy import REPOSITORY

LINE = re.compile(r"\d\d:\d\d:\d\d W Stopped; the same command starts again")
OF_A_RUN = re.compile(r"\d\d:\d\d:\d\d W Stopped; the same command goes on")


def start(program, **environment):
  """Runs a program that prints a line once it is ready; it is a process group of its own."""
  process = subprocess.Popen(
    [sys.executable, "-c", program],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
  return process


def ended(process, seconds=20):
  """Its exit code and the lines it wrote; what it had started must be gone soon."""
  try:
    _, stderr = process.communicate(timeout=seconds)
  finally:
    process.kill()
  assert_gone(process.pid)
  return process.returncode, stderr.splitlines()


def assert_gone(leader, seconds=5):
  """Nothing of a process group is left, after a moment."""
  end = time.monotonic() + seconds
  while group_of(leader):
    assert time.monotonic() < end, group_of(leader)
    time.sleep(0.02)


def children_of(parent):
  """The numbers of the processes that a process has started, on whichever thread."""
  found = set()
  for task in Path(f"/proc/{parent}/task").iterdir():
    found |= set(map(int, (task / "children").read_text().split()))
  return sorted(found)


def group_of(leader):
  """The commands of what runs in a process group."""
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      fields = (folder / "stat").read_text().rpartition(")")[2].split()
      if int(fields[2]) == leader and fields[0] != "Z":
        found.append((folder / "cmdline").read_text())
    except OSError:  # It has ended.
      continue
  return found


BUSY = """
import time
from internvl_jax import signals
signals.watch()
print("ready", flush=True)
{body}
"""

# Minutes in C, as a compilation is, where Python does not look at its signals.
IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", ["time.sleep(60)", IN_C])
def test_a_signal_ends_a_command_in_a_line(kind, body):
  process = start(BUSY.format(body=body))
  process.send_signal(kind)
  code, lines = ended(process)
  assert code == signals.STOPPED == 75
  assert len(lines) == 1 and LINE.fullmatch(lines[0])


LISTENING = """
import time
from internvl_jax import signals
signals.watch()
told = []
with signals.listening(lambda: told.append(1)):
  print("ready", flush=True)
  while not told:
    time.sleep(0.01)
  time.sleep({seconds})
print("saved", told)
"""


def test_a_listener_gets_the_first_and_the_second_ends():
  process = start(LISTENING.replace("{seconds}", "0.2"))
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=20)[0] == "saved [1]\n" and process.returncode == 0

  process = start(LISTENING.replace("{seconds}", "60"))
  process.send_signal(signal.SIGINT)
  assert "another Ctrl-C ends at once" in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  code, lines = ended(process)
  assert code == 75 and len(lines) == 1 and LINE.fullmatch(lines[0])


@pytest.mark.parametrize(
  ("environment", "kinds"),
  [
    ({}, (signal.SIGINT, signal.SIGTERM)),  # Ctrl-C, and what a shell script's trap makes of it
    ({"TORCHELASTIC_RUN_ID": "none"}, (signal.SIGINT, signal.SIGINT)),  # Ctrl-C, and what torchrun passes on
  ],
)
def test_what_a_launcher_passes_on_is_no_second_one(environment, kinds):
  process = start(LISTENING.replace("{seconds}", "0.3"), **environment)
  process.send_signal(kinds[0])
  assert "ended and saved" in process.stderr.readline()
  process.send_signal(kinds[1])
  assert process.communicate(timeout=20) == ("saved [1]\n", "") and process.returncode == 0


def test_ctrl_c_that_a_shell_ignores_stays_ignored():
  program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + BUSY.format(
    body="time.sleep(0.5)"
  )
  process = start(program)
  process.send_signal(signal.SIGINT)
  assert ended(process) == (0, [])


POOL = """
import sys, time
from internvl_jax import signals
from internvl_jax.data.source.workers import map_items

if __name__ == "__main__":
  signals.watch()
  try:
    for item, _ in map_items(time.sleep, [0.01, 0.01, *[60.0] * 10], 2):
      print("ready", flush=True)
  except Exception as error:
    signals.leave(1, lambda: print(error, file=sys.stderr))
"""


@pytest.fixture
def pool(tmp_path):
  """A process with two workers that have long work, all of one process group."""
  program = tmp_path / "pool.py"
  program.write_text(POOL)
  before = set(os.listdir("/dev/shm"))
  process = subprocess.Popen(
    [sys.executable, str(program)],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout.readline() == "ready\n", process.communicate()
  yield process
  process.kill()
  assert set(os.listdir("/dev/shm")) <= before


def test_workers_end_with_a_command_that_is_stopped(pool):
  os.killpg(pool.pid, signal.SIGINT)  # As a terminal does.
  code, lines = ended(pool)
  assert code == 75 and len(lines) == 1 and LINE.fullmatch(lines[0])


def test_a_worker_that_is_killed_is_told_last(pool):
  (worker, *_) = [
    pid for pid in children_of(pool.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
  ]
  os.kill(worker, signal.SIGKILL)
  code, lines = ended(pool)
  assert code == 1 and len(lines) == 1 and lines[0].startswith("a process that reads the data was killed")


def test_workers_end_with_a_command_that_is_killed(pool):
  pool.kill()
  assert pool.wait(10) == -signal.SIGKILL
  assert_gone(pool.pid)


def test_a_command_can_be_stopped_while_it_imports():
  process = subprocess.Popen(
    [sys.executable, "-m", "internvl_jax.doctor", "--config", "none.py"],
    cwd=REPOSITORY,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  threads = Path(f"/proc/{process.pid}/task")
  while len(list(threads.iterdir())) < 2:  # The one that waits for signals is there.
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  code, lines = ended(process)
  assert code == 75 and len(lines) == 1 and LINE.fullmatch(lines[0])


SAVING = ("training.save_strategy=steps", "training.save_steps=5", "training.dataloader_num_workers=1")
SAVING += ("training.max_steps=24",)


@pytest.mark.slow
def test_twenty_random_moments_from_start_to_export(tmp_path):
  """Whatever the moment: one line and 75 (or the run was over), and in the end the run that nothing happened to."""
  world, rng = make_world(tmp_path), random.Random(0)
  straight = Job(world, *SAVING, out="straight", step_seconds=0.1)
  assert straight.wait() == [0], straight.log()
  # Timed without the compilation, which those that are stopped find in the cache.
  begin = time.monotonic()
  timed = Job(world, *SAVING, out="timed", step_seconds=0.1, fresh=True)
  assert timed.wait() == [0], timed.log()
  whole = time.monotonic() - begin
  stopped = []
  for i in range(20):
    kind = (signal.SIGINT, signal.SIGTERM)[i % 2]
    job = Job(world, *SAVING, out=f"random{i // 4}", step_seconds=0.1, fresh=True)
    # After the interpreter's own start, before which nobody can listen.
    time.sleep(0.3 + rng.random() * whole)
    job.processes[0].send_signal(kind)
    (code,) = job.wait(60)
    log = job.log()
    assert "Traceback" not in log and code in (0, 75), (i, code, log)
    told = [line for line in log.splitlines() if "Stopped" in line]
    assert len(told) == (code == 75) and all(map(OF_A_RUN.match, told)), (i, log)
    assert code == 0 or OF_A_RUN.match(log.splitlines()[-1]), (i, log)
    stopped.append((code, newest_checkpoint(str(job.out))))
  assert sum(code == 75 for code, _ in stopped) >= 12 and any(step for _, step in stopped), stopped
  for i in range(5):
    again = Job(world, *SAVING, out=f"random{i}")
    assert again.wait() == [0], again.log()
    assert history(again.out) == history(straight.out)
    assert (again.out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
