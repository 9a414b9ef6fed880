"""Memory, FLOP/s and bandwidths of accelerators, by their data sheets.

Peaks are never reached; they turn operations and bytes into times that no run can beat.
"""

import dataclasses

from internvl_jax.environment import MEMORY_FRACTION

GIB = 2**30

CONTEXT = round(0.75 * GIB)
"""Bytes that a process has taken of a GPU before the pool is made: the driver's context and the kernels that it loads.

About 0.5 GiB on cards since Ampere (what `nvidia-smi` shows of a process that has done nothing yet), and a quarter to spare.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
  """A kind of device.

  Attributes:
    name: what users call it.
    kinds: of the names that JAX has for such devices (`device_kind`), as a regular expression.
    flops: bfloat16 operations a second of a device, dense, summed in float32.
    memory_bandwidth: bytes a second between the device and its memory.
    slices: how many can be had together, smallest first: shapes of a torus, or cards, or hosts x cards.
  """

  name: str
  kinds: str
  flops: float
  memory_bandwidth: float
  slices: tuple[str, ...]


# --- TPUs ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip(Accelerator):
  """A kind of TPU; numbers are those of one device, of which a chip may be several.

  Attributes:
    hbm: bytes of memory that a program may use: what the compiler refuses to go beyond.
    link_bandwidth: bytes a second along one link to a neighbor, one way: a device's share of the chip's.
    dimensions: of the torus that links make of a slice.
    ring: a slice's axis closes to a ring where its length is a multiple of this; else it is a line.
    devices: of one chip, as JAX sees it.
    inner_bandwidth: bytes a second between the devices of a chip, one way.
    compiler_name: what the compiler calls it, if not by its name.
    options: how the compiler is asked for it, beside its name.
  """

  hbm: int
  link_bandwidth: float
  dimensions: int
  ring: int
  devices: int = 1
  inner_bandwidth: float = float("inf")
  compiler_name: str | None = None
  options: tuple[tuple[str, str], ...] = ()


# https://cloud.google.com/tpu/docs/v5e, v6e, v5p, v4 and tpu7x; of the large tori, the cubes and their doubles.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# HBM: what libtpu's compiler reports as available, a little less than what is soldered on.
# Operations, memory and links: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of the
# generations below it, and https://jax-ml.github.io/scaling-book/tpus (tables at its end, rings in its text).
# A v4 chip is planned for as JAX sees it: both cores as one device ("megacore"). A v7x chip (Ironwood) is two devices, each
# with half of its memory, operations and links, joined by a link of six times the bandwidth of one to a neighbor.
TPUS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      kinds=r"TPU v4",
      hbm=int(30.75 * GIB),
      flops=275e12,
      memory_bandwidth=1.2e12,
      link_bandwidth=45e9,
      dimensions=3,
      ring=4,
      slices=_CUBIC,
      options=(("chip_config_name", "megacore"),),
    ),
    Chip(
      name="v5e",
      kinds=r"TPU v5 ?(lite|e)",
      hbm=int(15.75 * GIB),
      flops=197e12,
      memory_bandwidth=0.82e12,
      link_bandwidth=50e9,
      dimensions=2,
      ring=16,
      slices=_FLAT,
    ),
    Chip(
      name="v5p",
      kinds=r"TPU v5p?",
      hbm=int(95.73 * GIB),
      flops=459e12,
      memory_bandwidth=2.77e12,
      link_bandwidth=100e9,
      dimensions=3,
      ring=4,
      slices=_CUBIC,
    ),
    Chip(
      name="v6e",
      kinds=r"TPU v6 ?(lite|e)",
      hbm=int(31.24 * GIB),
      flops=918e12,
      memory_bandwidth=1.64e12,
      link_bandwidth=100e9,
      dimensions=2,
      ring=16,
      slices=_FLAT,
    ),
    Chip(
      name="v7x",
      kinds=r"TPU ?7x",
      hbm=int(94.74 * GIB),
      flops=2307e12 / 2,
      memory_bandwidth=7.38e12 / 2,
      link_bandwidth=100e9 / 2,
      dimensions=3,
      ring=4,
      devices=2,
      inner_bandwidth=600e9,
      slices=_CUBIC,
      compiler_name="tpu7x",
    ),
  )
}
"""Cloud TPUs by the name that topologies begin with."""


# --- GPUs ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What GPUs of one compute capability share; bytes of a multiprocessor's shared memory, all and a block's most.

  `known_as` is a card of the generation whose name Pallas knows: of a card that is not there, it asks the name alone.

  Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide, technical specifications per compute capability.
  """

  major: int
  minor: int
  threads: int
  float32_units: int
  shared_memory: int
  shared_memory_of_block: int
  known_as: str


_AMPERE = Generation(
  major=8,
  minor=0,
  threads=2048,
  float32_units=64,
  shared_memory=164 << 10,
  shared_memory_of_block=163 << 10,
  known_as="NVIDIA A100",
)
_ADA = Generation(
  major=8,
  minor=9,
  threads=1536,
  float32_units=128,
  shared_memory=100 << 10,
  shared_memory_of_block=99 << 10,
  known_as="NVIDIA L40",
)
_HOPPER = Generation(
  major=9,
  minor=0,
  threads=2048,
  float32_units=128,
  shared_memory=228 << 10,
  shared_memory_of_block=227 << 10,
  known_as="NVIDIA H100",
)
_BLACKWELL = dataclasses.replace(_HOPPER, major=10, known_as="NVIDIA B200")
_GEFORCE_BLACKWELL = dataclasses.replace(_ADA, major=12, minor=0, known_as="NVIDIA RTX PRO 6000")


# A host's, and then whole hosts.
_HOSTS = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card(Accelerator):
  """A kind of NVIDIA GPU.

  Attributes:
    kind: JAX's name for the one that is planned for.
    generation: by its compute capability.
    cores: streaming multiprocessors.
    clock: GHz, boosted.
    cache: bytes of the second level.
    memory: bytes that the driver shows to programs, all in all.
    link_bandwidth: bytes a second from a card to the others of its host, one way: NVLink, or PCIe where there is none.
    network_bandwidth: bytes a second between a card and other hosts, one way, if all cards of a host send at once.
    cards: of a host.
  """

  kind: str
  generation: Generation
  cores: int
  clock: float
  cache: int
  memory: int
  link_bandwidth: float
  network_bandwidth: float
  cards: int = 8
  slices: tuple[str, ...] = _HOSTS

  @property
  def usable(self) -> int:
    """Bytes that a program may use: XLA's pool, a share of what is free once a process has its context."""
    return round(MEMORY_FRACTION * (self.memory - CONTEXT))


_A100_80G = Card(
  name="a100-80g",
  kinds=r".*A100.*80GB.*",
  kind="NVIDIA A100-SXM4-80GB",
  generation=_AMPERE,
  cores=108,
  clock=1.41,
  cache=40 << 20,
  memory=int(79.25 * GIB),
  flops=312e12,
  memory_bandwidth=2.039e12,
  link_bandwidth=300e9,
  network_bandwidth=25e9,
)
_H100 = Card(
  name="h100",
  kinds=r".*H100.*",
  kind="NVIDIA H100 80GB HBM3",
  generation=_HOPPER,
  cores=132,
  clock=1.98,
  cache=50 << 20,
  memory=int(79.09 * GIB),
  flops=989e12,
  memory_bandwidth=3.35e12,
  link_bandwidth=450e9,
  network_bandwidth=50e9,
)
_RTX4090 = Card(
  name="rtx4090",
  kinds=r".*RTX 4090",
  kind="NVIDIA GeForce RTX 4090",
  generation=_ADA,
  cores=128,
  clock=2.52,
  cache=72 << 20,
  memory=int(23.52 * GIB),
  flops=165.2e12,
  memory_bandwidth=1.008e12,
  link_bandwidth=31.5e9,
  network_bandwidth=100e9 / 8 / 8,
)

# Operations (without sparsity; GeForce cards do half of what they do when they sum in float16), memory and links:
#   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
#   https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306, https://www.nvidia.com/en-us/data-center/h100
#   https://www.nvidia.com/en-us/data-center/h200, https://www.nvidia.com/en-us/data-center/hgx (B200)
#   https://www.nvidia.com/en-us/data-center/l40s
#   https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (RTX 4090, its appendix)
#   https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf (RTX 5090)
# A800 and H800 are A100 and H100 with NVLink of 400 GB/s, both ways together. NVIDIA has no public page of the H20: its
# numbers are those of resellers' sheets (148 TFLOP/s, 96 GB at 4 TB/s, NVLink of 900 GB/s).
# Memory: what CUDA reports as a device's total, less than what is soldered on by what error correction and the driver
# take; of A100, H100 and B200 as in https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs.
# Network, an assumption: as in NVIDIA's DGX, a port for every card, of 200 Gb/s (A100) or 400 Gb/s (later ones); 100 Gb/s a
# card for the L40S; one port of 100 Gb/s a host for GeForce cards. Where yours differs, exchanges take another time.
GPUS: dict[str, Card] = {
  card.name: card
  for card in (
    dataclasses.replace(
      _A100_80G,
      name="a100-40g",
      kinds=r".*A100.*",
      kind="NVIDIA A100-SXM4-40GB",
      memory=int(39.39 * GIB),
      memory_bandwidth=1.555e12,
    ),
    _A100_80G,
    dataclasses.replace(
      _A100_80G, name="a800", kinds=r".*A800.*", kind="NVIDIA A800-SXM4-80GB", link_bandwidth=200e9
    ),
    _H100,
    dataclasses.replace(_H100, name="h800", kinds=r".*H800.*", kind="NVIDIA H800", link_bandwidth=200e9),
    dataclasses.replace(
      _H100,
      name="h20",
      kinds=r".*\bH20(?!0).*",
      kind="NVIDIA H20",
      cores=78,
      cache=60 << 20,
      memory=int(95.0 * GIB),
      flops=148e12,
      memory_bandwidth=4.0e12,
    ),
    dataclasses.replace(
      _H100,
      name="h200",
      kinds=r".*H200.*",
      kind="NVIDIA H200",
      memory=int(139.8 * GIB),
      memory_bandwidth=4.8e12,
    ),
    Card(
      name="l40s",
      kinds=r".*L40S.*",
      kind="NVIDIA L40S",
      generation=_ADA,
      cores=142,
      clock=2.52,
      cache=96 << 20,
      memory=int(44.39 * GIB),
      flops=362e12,
      memory_bandwidth=0.864e12,
      link_bandwidth=31.5e9,
      network_bandwidth=12.5e9,
    ),
    _RTX4090,
    dataclasses.replace(
      _RTX4090,
      name="rtx5090",
      kinds=r".*RTX 5090",
      kind="NVIDIA GeForce RTX 5090",
      generation=_GEFORCE_BLACKWELL,
      cores=170,
      clock=2.41,
      cache=96 << 20,
      memory=int(31.36 * GIB),
      flops=209.5e12,
      memory_bandwidth=1.792e12,
      link_bandwidth=63e9,
    ),
    Card(
      name="b200",
      kinds=r".*\bB200.*",
      kind="NVIDIA B200",
      generation=_BLACKWELL,
      cores=148,
      clock=1.965,
      cache=126 << 20,
      memory=int(178.35 * GIB),
      flops=2250e12,
      memory_bandwidth=7.7e12,
      link_bandwidth=900e9,
      network_bandwidth=50e9,
    ),
  )
}
"""NVIDIA's cards by the name that topologies begin with."""

# Relatives of those cards that are not planned for; `GPUS` would take the first two for others.
_OTHERS = (
  (r".*H100 PCIe.*", 756e12),
  (r".*H[12]00 NVL.*", 835e12),
  (r".*GB200.*", 2500e12),
)

PEAKS: tuple[tuple[str, float], ...] = (
  *_OTHERS,
  *((chip.kinds, chip.devices * chip.flops) for chip in TPUS.values()),
  *((card.kinds, card.flops) for card in GPUS.values()),
)
"""Device kind, as a regular expression -> dense bfloat16 FLOP/s of a whole chip or card; the first that matches counts."""
