"""Which machine this is, for those who share storage with others."""

import socket
from pathlib import Path


def machine() -> str:
  """A name of this start of this machine, the same for all of its processes and containers."""
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
  except OSError:
    return socket.gethostname()
