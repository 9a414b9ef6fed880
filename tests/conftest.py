"""What every test needs before JAX starts."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

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


def _known(flags: str) -> bool:
  """Whether this version of XLA knows the flags; it ends a process that gives it others."""
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  environment = {**os.environ, "XLA_FLAGS": flags}
  return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


# Tests compile many small programs and run each a few times: little optimisation, where there is a choice the emitter
# of kernels that takes a third of the other's time, and no program twice, also among the processes that tests start.
if "XLA_FLAGS" not in os.environ:
  quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  quicker = f"{quick} --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = quicker if _known(quicker) else quick
_CACHE = tempfile.TemporaryDirectory(prefix="internvl_jax_test_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(autouse=True)
def as_before():
  """Puts back the setting that commands which compute in float32 change for the whole process."""
  import jax

  before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
  yield
  if before != jax.config.jax_default_matmul_precision:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_matmul_precision", before)


def pytest_addoption(parser):
  parser.addoption("--fuzz-seed", type=int, default=0, help="of the inputs of tests/fuzz")
  parser.addoption("--fuzz-only", type=int, help="the number of the one input of tests/fuzz to run")


# Fixtures of all tests that need a bucket; pytest finds them by name here.
from tests.support.buckets import bucket, store  # noqa: E402, F401
