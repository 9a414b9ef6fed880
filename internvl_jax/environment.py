"""What JAX's backends read from the environment when they start."""

import os
from collections.abc import MutableMapping

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
