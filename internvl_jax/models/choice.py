"""Which backends a model gets on a device."""

from collections.abc import Iterable, Sequence

import jax
from absl import logging

from internvl_jax.errors import UserError
from internvl_jax.models.activations import BACKENDS as ACTIVATIONS
from internvl_jax.models.attention import BACKENDS as ATTENTION
from internvl_jax.models.grouped_matmul import BACKENDS as EXPERTS
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.kernels import Backend, Device, Kernels, choose, find


def choose_kernels(
  model: InternVLConfig, device: Device | None = None, *, attention: str = "auto", experts: str = "auto"
) -> Kernels:
  """The backends of a model's attention, experts and activations on a device: those asked for, or the best that fit.

  Args:
    model: what they have to compute.
    device: where; None is the one at hand.
    attention, experts: `runtime.attention` and `runtime.experts`: names of rows of the tables, or "auto".

  Raises:
    UserError: one asked for by name cannot run there, or not this model.
  """
  text, vision = model.text, model.vision
  device = device or Device.of(jax.devices()[0])
  needs = {"sinks"} if text.sinks else set()
  needs |= {"windows"} if any(text.windows) else set()
  width = max(text.head_dim, vision.hidden_size // vision.num_heads)
  return Kernels(
    attention=_backend("runtime.attention", attention, ATTENTION, device, needs, width),
    experts=_backend(
      "runtime.experts", experts if text.experts or experts != "auto" else "xla", EXPERTS, device
    ),
    activations=choose(ACTIVATIONS, device)[0].name,
  )


def _backend(
  field: str, asked: str, table: Sequence[Backend], device: Device, needs: Iterable[str] = (), width: int = 0
) -> str:
  """The name of the backend that a setting means."""
  if asked == "auto":
    row, passed = choose(table, device, needs, width)
    if passed:
      logging.warning("%s: %s computes it, for %s", field, repr(row.name), passed)
    return row.name
  if refusal := find(table, asked).refusal(device, needs, width):
    raise UserError(f"{field}={asked!r} {refusal}; set it to 'auto' or 'xla'")
  return asked
