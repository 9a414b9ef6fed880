"""What every test needs before JAX starts."""

import os
import tempfile

# Tests run on the CPU, as eight devices, so that meshes can be tried anywhere. Set before JAX is imported, and
# only if unset: `JAX_PLATFORMS=cuda pytest -m gpu` runs the tests that need a GPU on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tokenizers warn when a process that used their threads forks, as data workers do.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests compile many small programs and run each a few times: little optimisation, and no program twice, also
# among the processes that tests start.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
_CACHE = tempfile.TemporaryDirectory(prefix="internvl_jax_test_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
