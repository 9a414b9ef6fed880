"""Grouped matmul: products of rows sorted by group with a matrix for each group, which is what experts compute.

Letters: M rows, K width in, N width out, G groups.
"""

import dataclasses
import importlib
from collections.abc import Mapping

import jax

from internvl_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
  """A way to compute grouped matmuls.

  Attributes:
    name: what settings call it.
    module: whose `product` computes it, imported when it is first used: others do not wait for Pallas. "" is
      `jax.lax.ragged_dot`.
    platforms: where it runs, as JAX names them; empty is everywhere.
    capability: the smallest compute capability of NVIDIA's cards that it runs on; None asks for none.
    interpret: it is for tests: the kernels' programs, run operation by operation on any platform.
    reason: why it is there.
    without: what it costs where "xla" computes in its place.
  """

  name: str
  module: str = ""
  platforms: tuple[str, ...] = ()
  capability: tuple[int, int] | None = None
  interpret: bool = False
  reason: str
  without: str = ""


_TPU, _GPU = f"{__name__}.megablox", f"{__name__}.triton"

BACKENDS: Mapping[str, Backend] = {
  backend.name: backend
  for backend in (
    Backend(name="xla", reason="runs everywhere; on CPUs and GPUs every row meets every group's matrix"),
    Backend(
      name="megablox",
      module=_TPU,
      platforms=("tpu",),
      reason="JAX's kernels for TPUs visit only the tiles of rows that a group has",
      without="for some widths XLA's compiler for TPUs ends the process in a failed check",
    ),
    Backend(name="megablox_interpret", module=_TPU, interpret=True, reason="tests of megablox without a TPU"),
    Backend(
      name="triton",
      module=_GPU,
      platforms=("gpu",),
      # The first with asynchronous copies and products of bfloat16.
      capability=(8, 0),
      reason="kernels of our own through Pallas and Triton: work and memory in proportion to the rows",
      without="every row is multiplied by every group's matrix, with temporaries of G times the rows",
    ),
    Backend(name="triton_interpret", module=_GPU, interpret=True, reason="tests of triton without a GPU"),
  )
}
"""All backends by their names."""

_BY_ATTENTION = {"auto": "xla", "splash": "megablox", "splash_interpret": "megablox_interpret"}
# To be deleted, with its use below, when decoders hand experts a setting of their own: until then they hand them
# attention's.


def backend_for(name: str, platform: str, capability: tuple[int, int] | None = None) -> str:
  """The backend that a run's setting means on a platform: "auto" takes what is made for it.

  Args:
    name: one of `BACKENDS`, or "auto".
    platform: as JAX names it.
    capability: the card's compute capability; None is one that all kernels run on.

  Raises:
    UserError: no such backend, or none that runs there.
  """
  if name == "auto":
    fitting = (
      backend.name
      for backend in BACKENDS.values()
      if backend.platforms and not _misfit(backend, platform, capability)
    )
    return next(fitting, "xla")
  if name not in BACKENDS:
    raise UserError(f"grouped matmul {name!r}: there is no such backend; use auto, {', '.join(BACKENDS)}")
  if misfit := _misfit(BACKENDS[name], platform, capability):
    raise UserError(f"grouped matmul {name!r}: {misfit}; use auto")
  return name


def _misfit(backend: Backend, platform: str, capability: tuple[int, int] | None) -> str:
  """Why a backend does not run there; empty where it does."""
  if backend.platforms and platform not in backend.platforms:
    return f"it runs on {', '.join(backend.platforms)}, and this is {platform}"
  if backend.capability and capability and capability < backend.capability:
    least, found = (".".join(map(str, version)) for version in (backend.capability, capability))
    return f"it needs a card of compute capability {least}, and this has {found}"
  return ""


def grouped_matmul(
  rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *, backend: str = "xla"
) -> jax.Array:
  """Grouped matmul: multiplies each group's rows with its matrix, and can be differentiated by both.

  Args:
    rows: [M, K], those of the first group first.
    matrices: [G, K, N], in the dtype of rows.
    sizes: int [G], rows of each group; together at most M.
    backend: one of `BACKENDS`.

  Returns:
    [M, N] in the dtype of rows. What rows after the last group hold is left open.

  Raises:
    ValueError: an unknown backend.
  """
  backend = _BY_ATTENTION.get(backend, backend)
  if backend not in BACKENDS:
    raise ValueError(f"unknown grouped matmul {backend!r}: use one of {', '.join(BACKENDS)}")
  chosen = BACKENDS[backend]
  if not chosen.module:
    return jax.lax.ragged_dot(rows, matrices, sizes)
  return importlib.import_module(chosen.module).product(rows, matrices, sizes, interpret=chosen.interpret)
