"""How the tests' programs are compiled: quickly, each once, also from one run of the tests to the next."""

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zlib
from pathlib import Path

from internvl_jax.storage.machine import processor

CACHES = Path(__file__).parents[2] / ".cache" / "jax"
"""Compiled programs of earlier runs of the tests: a folder for each kind of processor and version of JAX."""

_MOST_BYTES = 2 << 30

_FLAGS = (
  # Tests compile many small programs and run each a few times: little optimization, where there is a choice the emitter of
  # kernels that takes a third of the other's time, and one LLVM module, which takes four fifths of what many take.
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
  # Eight devices share few cores. XLA aborts the process where one of them has not come to a collective within 20 and then
  # another 40 seconds, as happens on a machine that has other work.
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
  "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
)


def set_up() -> None:
  """Sets XLA's flags and the cache of compiled programs in the environment, as far as they are not set there.

  To be called before JAX is imported; processes that tests start inherit both.
  """
  cache = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHES / _machine())))
  cache.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = _known_flags(cache)


def tidy() -> None:
  """Deletes entries of the cache that a killed process left half-written, and the oldest where they are too many.

  To be called by one process, before the tests.
  """
  cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
  seen = cache / "checked"
  since = seen.stat().st_mtime if seen.exists() else 0.0
  files = sorted(cache.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True)
  room = _MOST_BYTES
  for path in files:
    room -= path.stat().st_size
    if room < 0 or (path.stat().st_mtime >= since and not _is_whole(path)):
      path.unlink()
  seen.touch()


def resident_bytes() -> int:
  """Memory of this process; 0 where that is not known."""
  try:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    return 0


def forget_programs() -> None:
  """Deletes this process's compiled programs, and gives their memory back to the system."""
  import jax

  jax.clear_caches()
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):  # Not glibc.
    ctypes.CDLL(None).malloc_trim(0)


def _is_whole(entry: Path) -> bool:
  """Whether an entry, which JAX compresses, has its end."""
  data = entry.read_bytes()
  if data and not data.startswith(b"\x78"):
    return True  # By zstandard, where that is installed. JAX compiles again what it cannot read.
  try:
    zlib.decompress(data)
  except zlib.error:
    return False
  return True


def _machine() -> str:
  """A name of what compiled programs depend on: JAX's version, and the processor's instructions."""
  return f"{importlib.metadata.version('jaxlib')}-{processor()}"


def _known_flags(cache: Path) -> str:
  """The flags of those above that this version of XLA knows; it is asked once for each cache."""
  asked = " ".join(_FLAGS)
  noted = cache / f"flags-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.txt"
  if noted.exists() and (flags := noted.read_text()):
    return flags
  flags = asked if _are_known(asked) else " ".join(filter(_are_known, _FLAGS))
  noted.write_text(flags)
  return flags


def _are_known(flags: str) -> bool:
  """Whether this version of XLA knows the flags; it ends a process that gives it others."""
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  environment = {**os.environ, "XLA_FLAGS": flags}
  return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
