"""Functions compiled for NVIDIA cards that are only described, in a process of its own: JAX's backends start but once."""

import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvl_jax.aot import cuda
from internvl_jax.chips import GPUS
from internvl_jax.compiler import compiler_options
from internvl_jax.errors import UserError
from tests.support.toy import REPOSITORY


def compile_for(card, function, shapes, **options):
  """The function, traced and compiled for one card; more options of XLA may be given."""
  mesh = Mesh(np.array(cuda.compile_only_devices(GPUS[card], 1, 1)), ("device",))
  place = NamedSharding(mesh, PartitionSpec())
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(function).lower(*shapes)
  return lowered.compile(compiler_options={**compiler_options("gpu", compile_only=True), **options})


def has_compiler():
  try:
    cuda.check_compiler()
  except UserError:
    return False
  return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs the extra plan-gpu")


def apart(module, function, *arguments):
  """What `module.function(*arguments)` returns in a process that has no backend yet; all of it plain values."""
  command = [sys.executable, "-m", __name__, module, function, json.dumps(arguments)]
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(REPOSITORY),
  }
  ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert ran.returncode == 0, ran.stderr[-3000:]
  return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
  found = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))
  print(json.dumps(found))
