"""One run writes to an output directory: a second is refused, and none that died is in the way."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from internvl_jax import lease
from internvl_jax.errors import UserError
from internvl_jax.lease import Folder, Holder, held
from tests.support.toy import REPOSITORY

HOLDER = """
import sys, time
from pathlib import Path
from internvl_jax.lease import Folder, held
with held(Folder(Path(sys.argv[1])), "it"):
  print("held", flush=True)
  time.sleep(60)
"""
NAME = "training.output_dir='out'"


@pytest.fixture
def out(tmp_path):
  return tmp_path / "runs" / "out"


@pytest.fixture
def other(out):
  """Another process that holds the lease."""
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  command = [sys.executable, "-c", HOLDER, str(out)]
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def no_waiting(seconds):
  pytest.fail("there was nothing to wait for")


def test_a_second_run_is_refused_until_the_first_one_dies(out, other):
  (out / "model.safetensors").write_text("")
  before = sorted(path.name for path in out.iterdir())
  with pytest.raises(UserError) as caught, held(Folder(out), NAME, wait=no_waiting):
    pytest.fail("it is in use")
  today = time.strftime("%Y-%m-%d", time.gmtime())
  assert f"{NAME} is in use by process {other.pid} on host {os.uname().nodename} since {today}" in str(
    caught.value
  )
  assert sorted(path.name for path in out.iterdir()) == before
  other.send_signal(signal.SIGKILL)
  other.wait()
  with held(Folder(out), NAME, wait=no_waiting):
    assert Folder(out).read().process == os.getpid()
  assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_a_lease_leaves_nothing_of_its_own(out):
  with held(Folder(out), NAME, wait=no_waiting):
    assert [path.name for path in out.iterdir()] == ["run.lease"]
  assert not out.parent.exists()
  with held(Folder(out), NAME, wait=no_waiting):
    (out / "train_config.json").write_text("{}")
  assert [path.name for path in out.iterdir()] == ["train_config.json"]


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
  (tmp_path / "out").write_text("a file")
  with pytest.raises(UserError, match=f"{NAME} cannot be written to"), held(Folder(tmp_path / "out"), NAME):
    pytest.fail("it cannot be held")


def test_a_run_that_holds_the_lease_twice_in_one_process_is_refused(out):
  refused = pytest.raises(UserError, match=f"in use by process {os.getpid()}")
  with held(Folder(out), NAME), refused, held(Folder(out), NAME, wait=no_waiting):
    pytest.fail("it is in use")


ELSEWHERE = Holder("theirs", "gpu07", "another start of another machine", 4321, 0.0, 5)


def test_a_run_on_another_machine_is_watched(out):
  """Its lock may not be seen here: whether its heartbeat goes on tells."""
  place = Folder(out)
  place.lock()
  place.write(ELSEWHERE)

  waited = []
  refused = pytest.raises(UserError, match="process 4321 on host gpu07 since 1970-01-01 00:00:00 UTC")
  with refused, held(NoLocks(out), NAME, wait=lambda seconds: place.write(ELSEWHERE._replace(beat=6))):
    pytest.fail("it is in use")
  assert Folder(out).read().token == "theirs"
  place._file.close()  # The machine is switched off.
  with held(Folder(out), NAME, wait=waited.append):
    assert Folder(out).read().process == os.getpid()
  assert waited == [lease.WATCH_SECONDS]


class NoLocks(Folder):
  """A file system without locks."""

  def lock(self):
    super().lock()


def test_of_two_that_come_at_once_one_stays(out):
  """Where there are no locks."""

  def meanwhile(seconds):
    assert seconds == lease.BEAT_SECONDS
    Folder.write(second, ELSEWHERE)

  second = NoLocks(out)
  second.lock()
  refused = pytest.raises(UserError, match="in use by process 4321 on host gpu07")
  with refused, held(NoLocks(out), NAME, wait=meanwhile):
    pytest.fail("the other one wrote later")


def test_the_heartbeat_goes_on_and_a_lost_lease_is_told(out, monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
  told = threading.Event()
  monkeypatch.setattr(lease.logging, "error", lambda *args: told.set())
  with held(Folder(out), NAME):
    deadline = time.monotonic() + 10
    while (Folder(out).read() or ELSEWHERE._replace(beat=0)).beat < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert Folder(out).read().beat >= 3 and not told.is_set()
    text = (out / "run.lease").read_text().replace(Folder(out).read().token, "theirs")
    # A heartbeat that has looked already writes over it.
    while not told.wait(0.1) and time.monotonic() < deadline:
      (out / "run.lease").write_text(text)
    assert told.is_set()
