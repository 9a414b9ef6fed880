"""What every test needs before JAX starts."""

import gc
import os
import pathlib
import signal

import pytest

from tests.support import compiling

# Tests run on the CPU, as eight devices, so that meshes can be tried anywhere. Set before JAX is imported, and
# only if unset: `JAX_PLATFORMS=cuda pytest -m gpu` runs the tests that need a GPU on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tokenizers warn when a process that used their threads forks, as data workers do.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell lets what it runs in the background ignore Ctrl-C, and so would all that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Set by `scripts/test.sh --parity`: what is compared with must be there, where tests would else be skipped.
if os.environ.get("INTERNVL_JAX_PARITY"):
  import peft  # noqa: F401
  import torch  # noqa: F401
  import torchvision  # noqa: F401

# Signatures are checked wherever these modules' functions are called: slower, and only in tests.
if os.environ.get("INTERNVL_JAX_CHECK_SHAPES"):
  import jaxtyping

  checked = (
    "losses.lm",
    "losses.vocab_parallel",
    "models.rope",
    "models.projector",
    "parallel.sharded_gather",
  )
  jaxtyping.install_import_hook([f"internvl_jax.{name}" for name in checked], "beartype.beartype")


compiling.set_up()
# Tracing makes many objects that stay: Python need not look through them as often as it would.
gc.set_threshold(20_000, 10, 10)
# Workers of the test runner find it tidy.
if "PYTEST_XDIST_WORKER" not in os.environ:
  compiling.tidy()


@pytest.fixture(autouse=True)
def as_before():
  """Puts back the setting that commands which compute in float32 change for the whole process."""
  import jax

  before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
  yield
  if before != jax.config.jax_default_matmul_precision:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_matmul_precision", before)


_MOST_RESIDENT = 3 << 29


@pytest.fixture(autouse=True, scope="module")
def forgets_programs():
  """Lets compiled programs go between files of tests, once a process holds gigabytes of them: machines have two of each."""
  yield
  if compiling.resident_bytes() > _MOST_RESIDENT:
    compiling.forget_programs()


_LONG = ("tasks", "models", "runs", "parallel", "aot", "hf", "checkpoint")
"""Folders whose files take longest, the longest first."""


def pytest_collection_modifyitems(items):
  """Begins with what takes long, so that no worker is left alone with it at the end."""
  here = pathlib.Path(__file__).parent

  def rank(item):
    folder = item.path.relative_to(here).parts[0]
    return _LONG.index(folder) if folder in _LONG else len(_LONG)

  items.sort(key=rank)


def pytest_addoption(parser):
  parser.addoption("--fuzz-seed", type=int, default=0, help="of the inputs of tests/fuzz")
  parser.addoption("--fuzz-only", type=int, help="the number of the one input of tests/fuzz to run")


# Fixtures of all tests that need a bucket; pytest finds them by name here.
from tests.support.buckets import bucket, store  # noqa: E402, F401


@pytest.fixture
def absl_log(caplog, monkeypatch):
  """`caplog` of absl's warnings, each once, also where a command of this process has set its logging up."""
  from absl import logging

  # pytest listens at the root, and, since 9.2, also at loggers that do not propagate when a test begins.
  monkeypatch.setattr(logging.get_absl_logger(), "handlers", [])
  monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
  with caplog.at_level("WARNING", logger="absl"):
    yield caplog
