"""What accelerators can do, by their data sheets.

Peaks are never reached; they turn operations and bytes into times that no run can beat.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A kind of accelerator.

  Attributes:
    name: what users call it.
    hbm: bytes of memory that a program may use: what the compiler refuses to go beyond.
    flops: bfloat16 operations a second.
    hbm_bandwidth: bytes a second between the chip and its memory.
    link_bandwidth: bytes a second along one link to a neighbour, one way.
    dimensions: of the torus that links make of a slice.
    ring: a slice's axis closes to a ring where its length is a multiple of this; else it is a line.
    options: how the compiler is asked for it, beside its name.
  """

  name: str
  hbm: int
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  dimensions: int
  ring: int
  options: tuple[tuple[str, str], ...] = ()


# HBM: what libtpu's compiler says is available, a little less than what is soldered on.
# Operations, memory and links: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of the
# generations below it, and https://jax-ml.github.io/scaling-book/tpus (tables at its end, rings in its text).
# A v4 chip is planned for as JAX sees it: both cores as one device ("megacore").
TPUS: dict[str, Chip] = {
  "v4": Chip(
    name="v4",
    hbm=int(30.75 * 2**30),
    flops=275e12,
    hbm_bandwidth=1.2e12,
    link_bandwidth=45e9,
    dimensions=3,
    ring=4,
    options=(("chip_config_name", "megacore"),),
  ),
  "v5e": Chip(
    name="v5e",
    hbm=int(15.75 * 2**30),
    flops=197e12,
    hbm_bandwidth=0.82e12,
    link_bandwidth=50e9,
    dimensions=2,
    ring=16,
  ),
  "v5p": Chip(
    name="v5p",
    hbm=int(95.73 * 2**30),
    flops=459e12,
    hbm_bandwidth=2.77e12,
    link_bandwidth=100e9,
    dimensions=3,
    ring=4,
  ),
  "v6e": Chip(
    name="v6e",
    hbm=int(31.24 * 2**30),
    flops=918e12,
    hbm_bandwidth=1.64e12,
    link_bandwidth=100e9,
    dimensions=2,
    ring=16,
  ),
}
"""Cloud TPUs by the name that topologies begin with."""
