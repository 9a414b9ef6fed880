"""What every test needs before JAX starts."""

import os

# Tests run on the CPU, as eight devices, so that meshes can be tried anywhere. Set before JAX is imported, and
# only if unset: `JAX_PLATFORMS=cuda pytest -m gpu` runs the tests that need a GPU on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tokenizers warn when a process that used their threads forks, as data workers do.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
