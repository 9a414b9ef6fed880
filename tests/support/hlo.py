"""A small sharded program, and what `aot` reads of its compiled text: for recordings of several versions of XLA."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvl_jax.aot import collectives, hlo, operations
from internvl_jax.aot.peak import peak
from tests.support.toy import ASSETS, REPOSITORY

__all__ = ["REPOSITORY"]

RECORDINGS = ASSETS / "hlo"
FILES = ("hlo.txt", "buffer-assignment.txt", "live-range.txt")
DEVICES, LAYERS, ROWS, WIDTH = 4, 3, 256, 256


def lowered(devices: Any) -> Any:
  """A loss and its gradients: layers in a loop, rows split over the devices, weights gathered before use."""
  mesh = Mesh(np.asarray(devices)[:DEVICES], ("fsdp",))
  sharded, by_row = PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")

  def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, shard: jax.Array) -> tuple[jax.Array, None]:
      return jnp.tanh(x @ jax.lax.all_gather(shard, "fsdp", axis=0, tiled=True)), None

    y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return jax.lax.psum(jnp.sum(y * y), "fsdp")

  step = jax.shard_map(loss, mesh=mesh, in_specs=(sharded, by_row), out_specs=PartitionSpec())
  places = NamedSharding(mesh, sharded), NamedSharding(mesh, by_row)
  shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=p) for s, p in zip(shapes, places, strict=True)]
  return jax.jit(jax.grad(step), out_shardings=places[0]).lower(*arrays)


def compiled(devices: Any) -> dict[str, str]:
  """What XLA writes about the program, by the names of `FILES`."""
  with tempfile.TemporaryDirectory() as folder, _uncached():
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    lowered(devices).compile(compiler_options=options)
    programs = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
    stem = str(programs[-1]).removesuffix(".txt")
    paths = dict(
      zip(FILES, (f"{stem}.txt", f"{stem}-buffer-assignment.txt", f"{stem}-live-range.txt"), strict=True)
    )
    return {name: Path(path).read_text() if Path(path).is_file() else "" for name, path in paths.items()}


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Nothing is written about a program that comes from JAX's persistent cache."""
  before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@functools.cache
def recorded(folder: Path) -> dict[str, str]:
  """A recording's files."""
  return {name: (folder / name).read_text() if (folder / name).is_file() else "" for name in FILES}


def facts(files: dict[str, str]) -> dict[str, Any]:
  """What `aot` reads of the files: operations, loops, bytes that are exchanged, and the peak."""
  module = hlo.parse(files["hlo.txt"])
  exchanged: dict[str, int] = {}
  for collective in collectives.find(module, DEVICES):
    exchanged[collective.kind] = exchanged.get(collective.kind, 0) + collective.runs * collective.bytes
  alive = peak(module, files["buffer-assignment.txt"], files["live-range.txt"])
  return {
    "flops": operations.flops(module),
    "uncounted loops": len(module.uncounted_loops),
    "exchanged": exchanged,
    "peak": sum(size for _, size in alive),
  }
