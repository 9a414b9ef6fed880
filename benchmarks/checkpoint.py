"""What digests cost a checkpoint: saves with and without them in turn, and checks before restores.

  python benchmarks/checkpoint.py FOLDER [GIGABYTES [TIMES]]

Prints, in seconds, the medians of whole saves (from the call until everything is on disk), of the part of a save for which
training waits, of reading a checkpoint, and of checking it first. Saves without digests are measured as two kinds that differ
in nothing: what lies between them is noise.
"""

import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from internvl_jax import digests
from internvl_jax.arguments import MeshConfig
from internvl_jax.checkpoint import folders, manager
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.state import TrainState


def state_of(gigabytes: float) -> TrainState:
  """Noise, which does not compress: parameters and two moments of 16 layers, together of that size."""
  rng = np.random.default_rng(0)
  shape = (int(gigabytes * 1e9 / 12 / 16 / 1024), 1024)
  params = {f"layers.{i}.kernel": jnp.asarray(rng.random(shape, np.float32)) for i in range(16)}
  mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
  kinds = ("params", "gradients", "moments")
  places = {kind: dict.fromkeys(params, rules.replicated(mesh)) for kind in kinds}
  state = TrainState.create(params, optax.scale_by_adam(), rules.StateShardings(mesh, **places))
  filled = {id(leaf): leaf for leaf in state.params.values()}
  return jax.tree.map(lambda x: x if id(x) in filled or x.ndim < 2 else x + params["layers.0.kernel"], state)


def timed_save(folder: Path, state: TrainState, *, with_digests: bool) -> tuple[float, float]:
  """Seconds that a save takes, and those of them for which its caller waits."""
  shutil.rmtree(folder, ignore_errors=True)
  patches = (
    []
    if with_digests
    else [
      mock.patch.object(folders, "_DiskFolder", ocp.path.atomicity.AtomicRenameTemporaryPath),
      mock.patch.object(manager._Digests, "result", return_value=None),
    ]
  )
  for patch in patches:
    patch.start()
  writer = Checkpointer(folder, keep=None)
  start = time.perf_counter()
  writer.save(state, loader={}, trainer={})
  waited = time.perf_counter() - start
  writer.wait()
  whole = time.perf_counter() - start
  writer.close()
  for patch in patches:
    patch.stop()
  return whole, waited


def main(folder: Path, gigabytes: float, times: int) -> None:
  state = state_of(gigabytes)
  kinds = {"with digests": True, "without": False, "without, again": False}
  found = {kind: [] for kind in kinds}
  timed_save(folder, state, with_digests=True)  # Threads start, files are made.
  for i in range(times):
    for kind in random.Random(i).sample(sorted(kinds), len(kinds)):
      found[kind].append(timed_save(folder, state, with_digests=kinds[kind]))
  timed_save(folder, state, with_digests=True)
  saved = folder / "checkpoints/0"
  size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
  print(f"{size / 1e9:.2f} GB, {times} saves of each kind, in random order")
  for kind, seconds in found.items():
    whole, waited = (statistics.median(values) for values in zip(*seconds, strict=True))
    print(f"{kind}: {whole:.2f} s, of which training waits {waited:.2f} s", end="")
    print(f"  ({' '.join(f'{one:.2f}' for one, _ in seconds)})")
  checks, reads = [], []
  for _ in range(times):
    start = time.perf_counter()
    assert digests.find_damage(saved) == ""
    checks.append(time.perf_counter() - start)
    reader = Checkpointer(folder, keep=None)
    start = time.perf_counter()
    jax.block_until_ready(reader._read(0, state)[0].params)
    reads.append(time.perf_counter() - start)
    reader.close()
  check, read = statistics.median(checks), statistics.median(reads)
  print(f"check {check:.2f} s ({size / check / 1e9:.2f} GB/s), restore after it {read:.2f} s")


if __name__ == "__main__":
  main(Path(sys.argv[1]), float((*sys.argv, 1)[2]), int((*sys.argv, 1, 5)[3] if len(sys.argv) > 3 else 5))
