"""Which machine this is, for those who share storage with others."""

import functools
import hashlib
import platform
import socket
from pathlib import Path


def machine() -> str:
  """A name of this start of this machine, the same for all of its processes and containers."""
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
  except OSError:
    return socket.gethostname()


@functools.cache
def processor() -> str:
  """A name of the processor's kind and instructions, on which programs for CPUs depend: 12 hexadecimal digits."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    lines = [platform.processor()]
  kinds = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or lines)
  return hashlib.sha256(" ".join(kinds).encode()).hexdigest()[:12]
