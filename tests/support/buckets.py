"""Buckets of emulators on this machine, spoken to by the real clients: moto's server for S3, gcp-storage-emulator for GCS."""

import contextlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_jax.storage import remote
from internvl_jax.storage.paths import BucketPath

_SERVERS = {
  "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p"),
  "gs": (str(Path(__file__).parent / "gcs_emulator.py"),),
}


def _environment(scheme: str, address: str) -> dict[str, str]:
  """What tells the clients of a scheme where the emulator is, and lets them in."""
  if scheme == "s3":
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
    return {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address}
  # The first for gcsfs, the others for tensorstore.
  return {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "testing",
    "NO_GCE_CHECK": "true",
  }


@contextlib.contextmanager
def emulator(scheme: str) -> Iterator[dict[str, str]]:
  """Runs the emulator of a scheme; gives the environment of those who speak to it."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, *_SERVERS[scheme], str(port)]
  server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    _wait_for(port, server)
    yield _environment(scheme, f"http://127.0.0.1:{port}")
  finally:
    server.kill()
    server.wait()


def _wait_for(port: int, server: subprocess.Popen) -> None:
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and server.poll() is None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
      return
    time.sleep(0.05)
  raise RuntimeError(f"the emulator did not start: {server.args}")


@pytest.fixture(scope="session", params=["s3", "gs"])
def store(request) -> Iterator[str]:
  """The scheme of a running object store; this process and those it starts can reach it."""
  with emulator(request.param) as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield request.param


one_store = pytest.mark.parametrize("store", ["s3"], indirect=True)
"""For a test to which both stores are alike."""

long_on_one = pytest.mark.parametrize(
  "store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True
)
"""For a test that takes long: on the second store it is run by `-m slow`."""


@pytest.fixture
def bucket(store, monkeypatch) -> str:
  """The URL of a new, empty bucket."""
  monkeypatch.setattr(remote, "_systems", {})
  name = f"bucket-{uuid.uuid4().hex[:12]}"
  remote.ask(f"{store}://{name}", lambda system: system.mkdir(name))
  return f"{store}://{name}"


def names_in(folder: str) -> list[str]:
  """The names of all objects of a folder."""
  from internvl_jax.storage.paths import objects

  return sorted(objects(BucketPath(folder)))
