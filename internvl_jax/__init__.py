"""InternVL's multimodal training framework, on JAX."""

import os
import sys

# Of transformers only tokenizers are used. It advises on every import to install PyTorch, and warns of model types that it
# does not know, as InternVL's is.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.2.0"

# Python's name for a module that it is about to run (`python -m`). What a command imports takes seconds, in which it can
# be interrupted, too; and all its threads have to inherit which signals are blocked.
if sys.argv[:1] == ["-m"]:
  from internvl_jax import environment, signals

  if f"{__name__}.train" in sys.orig_argv:
    environment.restart_with_huge_pages()
    signals.set_last_line(signals.GOES_ON)
  signals.watch()
