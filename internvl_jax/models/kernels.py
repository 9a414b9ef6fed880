"""Tables of backends: the ways to compute one operation, and which of them a run gets.

A table lists rows in the order in which `choose` tries them; "auto" takes the first that fits the platform, the
card and what the model needs.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
  """One way to compute an operation.

  Attributes:
    name: what a setting calls it.
    function: "module:function", imported at its first use, so that others do not wait for Pallas.
    platforms: those that it is chosen on; empty for what is only asked for by name.
    takes: the optional features that it has, by the words of its table.
    widest_head: the largest head width; None: any.
    capability: the smallest compute capability of an NVIDIA card.
    oldest_jax: the first version of JAX that has it.
    module: a module of JAX's that it is made with, and that a later JAX may have no longer; None: any JAX has it.
    interpret: Pallas' interpreter runs it, on any platform: for tests.
    reason: why it is chosen where it is, with versions and what it costs to do without.
  """

  name: str
  function: str
  platforms: tuple[str, ...]
  takes: frozenset[str] = frozenset()
  widest_head: int | None = None
  capability: tuple[int, int] = (0, 0)
  oldest_jax: tuple[int, int] = (0, 0)
  module: str | None = None
  interpret: bool = False
  reason: str = ""

  def load(self) -> Callable[..., Any]:
    """The function."""
    module, _, name = self.function.partition(":")
    return getattr(importlib.import_module(module), name)

  def refusal(self, device: "Device", needs: Iterable[str] = (), head_width: int = 0) -> str | None:
    """Why it cannot be used there and for that, in a few words; None if it can."""
    if not self.interpret and self.platforms and device.platform not in self.platforms:
      return f"is made for {' and '.join(self.platforms)}, and this is a {device.platform}"
    if missing := sorted(set(needs) - self.takes):
      return f"has no {' and no '.join(missing)}"
    if self.widest_head is not None and head_width > self.widest_head:
      return f"takes heads up to a width of {self.widest_head}, and the model's have {head_width}"
    if device.capability is not None and device.capability < self.capability:
      wanted, found = (".".join(map(str, pair)) for pair in (self.capability, device.capability))
      return f"needs a card of compute capability {wanted}, and {device.kind} has {found}"
    if jax.__version_info__[:2] < self.oldest_jax:
      return f"needs jax {'.'.join(map(str, self.oldest_jax))}, and {jax.__version__} is installed"
    if self.module is not None and not _exists(self.module):
      return f"needs {self.module}, which jax {jax.__version__} does not have"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """What a choice of backends has to know of a device.

  Attributes:
    platform: "tpu", "gpu" or "cpu".
    kind: its name.
    capability: the compute capability of an NVIDIA card, (0, 0) of another maker's; None where it is not known, or no
      GPU.
  """

  platform: str
  kind: str = ""
  capability: tuple[int, int] | None = None

  @classmethod
  def of(cls, device: Any) -> "Device":
    """What is known of a device of JAX's."""
    found = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    return cls(
      platform=device.platform,
      kind=device.device_kind,
      capability=None if found is None else _capability(found),
    )  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
  """The backends of a forward pass: rows of `models.attention`, `models.grouped_matmul` and `models.activations`."""

  attention: str = "xla"
  experts: str = "xla"
  activations: str = "xla"


def _capability(text: str) -> tuple[int, int]:
  """(9, 0) of "9.0"; (0, 0) of what other makers say, such as "gfx942"."""
  found = re.fullmatch(r"(\d+)\.(\d+)", str(text))
  return (int(found[1]), int(found[2])) if found else (0, 0)


def _exists(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def find(table: Sequence[Backend], name: str) -> Backend:
  """The row of that name.

  Raises:
    ValueError: there is none.
  """
  for row in table:
    if row.name == name:
      return row
  raise ValueError(f"unknown backend {name!r}: use one of {', '.join(row.name for row in table)}")


def choose(
  table: Sequence[Backend], device: Device, needs: Iterable[str] = (), head_width: int = 0
) -> tuple[Backend, str | None]:
  """The backend that "auto" means on a device.

  Returns:
    The first row of the table for the platform that fits, and why a better one was passed over, if one was.
  """
  passed = None
  for row in table:
    if device.platform not in row.platforms or row.interpret:
      continue
    refusal = row.refusal(device, needs, head_width)
    if refusal is None:
      return row, passed
    passed = passed or f"{row.name!r} {refusal} ({row.reason})"
  raise ValueError(f"no backend for {device.platform}")
