"""Compile-only NVIDIA cards, and what XLA's compiler needs to compile for them without one."""

import importlib.util
import os
import textwrap
from typing import Any

import jax

from internvl_jax.chips import Card
from internvl_jax.errors import UserError

INSTALL = "pip install 'internvl_jax[plan-gpu]' (or [cuda], which brings all that a card needs)"

# The plugin compares versions of libraries that only a card needs, and local cards are to be left alone.
_NO_CARD = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}

_POOL = 0.8
"""XLA's share of a compile-only card's memory that it plans a program for; of a local card it knows the pool's size."""

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def target_config(card: Card) -> str:
  """The card as a GpuTargetConfigProto in text form, which XLA's compiler takes.

  The memory is such that what XLA thinks there is for a program is what there is in a run, `card.usable`. Its own
  descriptions are in https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs.
  """
  generation = card.generation
  return textwrap.dedent(f"""\
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: {48 << 10}
      shared_memory_per_core: {generation.shared_memory}
      shared_memory_per_block_optin: {generation.shared_memory_of_block}
      threads_per_core_limit: {generation.threads}
      core_count: {card.cores}
      fpus_per_core: {generation.float32_units}
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: {2**16 - 1}
      block_dim_limit_z: {2**16 - 1}
      memory_bandwidth: {round(card.memory_bandwidth)}
      l2_cache_size: {card.cache}
      clock_rate_ghz: {card.clock}
      device_memory_size: {round(card.usable / _POOL)}
      cuda_compute_capability {{ major: {generation.major} minor: {generation.minor} }}
      registers_per_core_limit: {64 << 10}
      registers_per_block_limit: {64 << 10}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{generation.known_as}"
    """)


def check_compiler() -> None:
  """Refuses where the compiler for NVIDIA's cards is not installed.

  Raises:
    UserError: JAX's CUDA plugin is missing.
  """
  if not any(map(_is_installed, _PLUGINS)):
    raise UserError(f"the compiler for NVIDIA's cards is not installed: {INSTALL}")


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def compile_only_devices(card: Card, hosts: int, cards: int) -> list[Any]:
  """Devices of so many hosts with so many cards each; call it before JAX's backends start.

  Raises:
    UserError: there is no compiler for them.
  """
  check_compiler()
  os.environ.update(_NO_CARD)
  jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  # Slices x hosts of a slice x cards of a host; devices come host by host, as in a run.
  try:
    found = topologies.get_topology_desc(
      platform="cuda",
      topology_name=card.name,
      target_config=target_config(card),
      topology=f"1x{hosts}x{cards}",
    )
  except RuntimeError as error:  # What JAX raises is one of these, too.
    raise UserError(f"--topology={card.name}: {str(error).splitlines()[0]}; {INSTALL}") from None
  return list(found.devices)


def is_missing_tool(error: Exception) -> bool:
  """Whether a compilation failed for want of a program or file that CUDA's compiler brings."""
  return any(tool in str(error) for tool in ("nvlink", "ptxas", "libdevice"))
