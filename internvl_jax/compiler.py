"""XLA's compiler options for the programs of a run.

Options go to `compile()` with each program, never into XLA_FLAGS: a name there that XLA does not know ends the process.
What the user has put into XLA_FLAGS stays, and `runtime.xla_options` has the last word. docs/training.md tells what was
measured.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import SingleDeviceSharding

from internvl_jax.errors import UserError
from internvl_jax.runtime_options import parse_xla_option
from internvl_jax.storage.machine import processor
from internvl_jax.storage.remote import is_remote
from internvl_jax.storage.snapshots import default_cache

Value: TypeAlias = bool | int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """An option of XLA.

  Attributes:
    name, value: as `compile(compiler_options=...)` takes them.
    reason: what for.
  """

  name: str
  value: Value
  reason: str


OPTIONS: dict[str, tuple[Option, ...]] = {
  "gpu": (
    Option(
      name="xla_gpu_enable_latency_hiding_scheduler",
      value=True,
      reason="starts exchanges early and waits for them late; jaxlib 0.12 does so anyway",
    ),
    Option(
      name="xla_gpu_reduce_scatter_combine_threshold_bytes",
      value=16 * 2**20,
      reason="a large gradient leaves at once, beside the products of the next one; XLA would wait for all of a layer",
    ),
  ),
}
"""Options by the platform of the devices that a program is for; what is not here was no better than XLA's own choice."""

COMPILE_ONLY: dict[str, tuple[Option, ...]] = {
  "gpu": (
    Option(
      name="xla_gpu_enable_triton_gemm",
      value=False,
      reason="tiles of Triton's products are chosen by timing them, for which there is no card; cuBLAS's stand in",
    ),
    Option(name="xla_gpu_autotune_level", value=0, reason="there is no card to time anything on"),
  ),
}
"""Options that are added for compile-only devices: programs are compiled and not run."""


def compiler_options(
  platform: str,
  overrides: Sequence[str] = (),
  *,
  compile_only: bool = False,
  environ: Mapping[str, str] = os.environ,
) -> dict[str, Value]:
  """Options for `lowered.compile(compiler_options=...)`.

  Args:
    platform: of the devices, as JAX calls it: "gpu", "tpu" or "cpu".
    overrides: `runtime.xla_options`, "name=value" each; they go before all else.
    compile_only: the devices are not there.
    environ: where XLA_FLAGS is looked up; an option that it names is left to it.
  """
  rows = OPTIONS.get(platform, ()) + (COMPILE_ONLY.get(platform, ()) if compile_only else ())
  taken = named_in_flags(environ)
  ours = {row.name: row.value for row in rows}
  if left := sorted(taken & ours.keys()):
    _say_once(f"XLA_FLAGS has its own {', '.join(left)}, which stays")
  asked = dict(parse_xla_option(text) for text in overrides)
  return {name: value for name, value in ours.items() if name not in taken} | asked


@functools.cache
def _say_once(line: str) -> None:
  logging.info(line)


def named_in_flags(environ: Mapping[str, str]) -> set[str]:
  """The names of the options in XLA_FLAGS, which holds them, or names a file that does."""
  flags = environ.get("XLA_FLAGS", "").strip()
  if flags and not flags.startswith("-"):
    path = Path(flags)
    flags = path.read_text(encoding="utf-8") if path.is_file() else ""
  return set(re.findall(r"(?:^|\s)--(xla_\w+)", flags))


# --- Compiling ----------------------------------------------------------------------------------------------

_REFUSED = re.compile(
  r"No such compile option: '(?P<unknown>\w+)'"
  r"|While setting option (?P<unfit>\w+), (?P<why>'[^']*' is not a valid \w+ value)"
)
"""XLA's message about an option that it does not know, or a value that an option does not take."""


def compile_program(
  lowered: Any, platform: str, overrides: Sequence[str] = (), *, compile_only: bool = False, **others: Value
) -> Any:
  """Compiles what was lowered; an option of ours that this XLA no longer knows is left out, with a line in the log.

  Args:
    lowered: what `jax.jit(...).lower(...)` returned.
    platform, overrides, compile_only: see `compiler_options`.
    **others: more options, such as where to dump.

  Raises:
    UserError: XLA does not know one of the overrides, or does not take its value.
  """
  options = compiler_options(platform, overrides, compile_only=compile_only) | others
  asked = {parse_xla_option(text)[0]: text for text in overrides}
  while True:
    try:
      return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
      found = _REFUSED.search(str(error))
      if found is None or (name := found["unknown"] or found["unfit"]) not in options:
        raise
      why = found["why"] or "there is no such option"
      where = f"the XLA of jaxlib {jax.lib.__version__}"
      if name in asked:
        raise UserError(
          f"runtime.xla_options: {asked[name]!r}: {why} in {where}; correct it, or leave it out"
        ) from error
      logging.warning("%s, which is set by default: %s in %s; going on without it", name, why, where)
      del options[name]


def check_overrides(overrides: Sequence[str], mesh: jax.sharding.Mesh) -> None:
  """Refuses options that the compiler for a mesh does not take, before anything is read for a run.

  Raises:
    UserError: XLA does not know one of them, or does not take its value.
  """
  if not overrides:
    return
  devices = mesh.devices.ravel().tolist()
  mine = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
  place = SingleDeviceSharding(mine)
  scalar = jax.ShapeDtypeStruct((), np.float32, sharding=place)
  compile_program(jax.jit(jnp.negative, out_shardings=place).lower(scalar), mine.platform, overrides)


FULL_PRECISION = "highest"
"""JAX's name for matrix products of float32 numbers in float32; accelerators round the operands by default."""


def use_full_precision() -> None:
  """Lets the whole process compute float32 matrix products in float32: who asks for float32 gets its numbers."""
  jax.config.update("jax_default_matmul_precision", FULL_PRECISION)


AUTO = "auto"
"""The value of `runtime.compilation_cache_dir` that leaves the folder to JAX's own setting, or to this program."""

_MOST_BYTES = 10 << 30
"""Of the folder that nobody has named: what was not used for longest goes."""


def open_cache(setting: str | None) -> str | None:
  """Lets compiled programs be reused by later runs; returns the folder, or None where they are compiled anew.

  Args:
    setting: `runtime.compilation_cache_dir`.
  """
  if setting != AUTO:
    if setting:
      set_cache(setting)
    return setting
  if named := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    return named
  folder = Path(default_cache(), "programs", f"{jax.lib.__version__}-{processor()}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in_use").touch()
  except OSError as error:
    logging.info("Programs are compiled anew: %s cannot be written (%s)", folder, error.strerror or error)
    return None
  set_cache(str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
  return str(folder)


def set_cache(folder: str) -> None:
  """Lets compiled programs, and what was found by timing kernels on a GPU, be reused by later runs.

  Args:
    folder: where to keep them.
  """
  jax.config.update("jax_compilation_cache_dir", folder)
  if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" in os.environ:
    return
  # As JAX does by itself, set here because a GPU's start depends on it; but XLA opens that folder by its own means, which
  # know no buckets.
  timings = "none" if is_remote(folder) else "xla_gpu_per_fusion_autotune_cache_dir"
  jax.config.update("jax_persistent_cache_enable_xla_caches", timings)
