"""What JAX's backends and the C library read from the environment when they start."""

import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

MEMORY_FRACTION = 0.92
"""The share of a GPU's free memory that JAX's pool takes at the start of a run, in place of its own 0.75.

What is left outside is for what XLA does not allocate: NCCL's buffers, cuDNN's and cuBLAS' own, and kernels and graphs that
are loaded later: 1 to 2 GiB, which 8 % of a card of 24 GiB just are.
"""

# The second is the first one's old name; JAX refuses both at once.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def set_environment(environ: MutableMapping[str, str] = os.environ) -> None:
  """Sets JAX's environment variables; those that are set already stay.

  Only the backend of GPUs looks at it, so it can be set before the backend is known.
  """
  if not any(environ.get(name) for name in _FRACTIONS):
    environ[_FRACTIONS[0]] = str(MEMORY_FRACTION)


# --- Huge pages ----------------------------------------------------------------------------------------------

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/accel0", "/dev/vfio/0")
"""Device files of NVIDIA's and AMD's cards, of either under Windows, and of TPUs."""


def restart_with_huge_pages(environ: Mapping[str, str] = os.environ) -> None:
  """Starts the command of this process anew, in its place, where memory by huge pages makes it faster; else returns.

  XLA asks for the memory of a step's temporaries anew in each step on CPUs, and the kernel fills it page by page. glibc
  asks for huge pages only if GLIBC_TUNABLES says so when a process starts. An own setting there stays, also to keep the
  pages small (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0`).
  """
  if sys.gettrace() is not None or not wants_huge_pages(environ):
    return  # A debugger would lose the process.
  tunables = ":".join(filter(None, [environ.get(_TUNABLES), f"{_HUGE_PAGES}=1"]))
  # What arrives in between waits for `signals.watch`.
  signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environ, _TUNABLES: tunables})


def wants_huge_pages(
  environ: Mapping[str, str], pages: Path = _PAGES, accelerators: Sequence[str] = _ACCELERATORS
) -> bool:
  """Whether huge pages are to be had for the asking, nobody has decided about them, and work is done by CPUs.

  Args:
    environ: of the process.
    pages: where Linux says who gets huge pages: all, none, or who asks ("madvise").
    accelerators: files that are there where others than CPUs compute.
  """
  if _HUGE_PAGES in environ.get(_TUNABLES, "") or "[madvise]" not in _text(pages) or _glibc() < (2, 35):
    return False
  platforms = environ.get("JAX_PLATFORMS")
  return platforms == "cpu" if platforms else not any(map(os.path.exists, accelerators))


def _text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except OSError:  # Not Linux, or built without huge pages.
    return ""


def _glibc() -> tuple[int, ...]:
  """The version of glibc; (0,) of another C library. 2.35 was the first that asks for huge pages."""
  try:
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
  except (ValueError, OSError):
    return (0,)
  return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (0,)
