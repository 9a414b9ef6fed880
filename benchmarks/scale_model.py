"""Models of a training step on many chips, and of a run that saves and fails: numpy only, everything drawn from a seed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from internvl_jax.chips import TPUS
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.shapes import tile_bucket

DAY = 86_400.0
# Late hosts are rare: their mean wants more steps than pools do.
_DRAWS = 20_000


def _assumed(value: float, unit: str, text: str) -> Any:
  return dataclasses.field(default=value, metadata={"unit": unit, "text": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
  """What neither the compiler nor the data say. None of it was measured here; `assumed` lists them for readers."""

  products: float = _assumed(0.70, "of the peak", "speed of products and kernels")
  memory: float = _assumed(0.80, "of the data sheet", "speed of the main memory")
  links: float = _assumed(0.80, "of the data sheet", "bandwidth of the links between chips")
  hop: float = _assumed(1e-6, "s", "latency of a link, once for each hop of an exchange")
  hidden: float = _assumed(0.80, "of their time", "exchanges that run beside products, while there are any")
  spread: float = _assumed(
    0.005, "of its time", "by how much chips are slower than the fastest: half-normal, of this sigma"
  )
  host: float = _assumed(4, "chips", "that one host feeds")
  stalls: float = _assumed(1e-5, "a host and step", "probability that a host is late")
  stall: float = _assumed(1.0, "s", "mean time that it is late: exponential")
  copy: float = _assumed(
    8e9, "byte/s a chip", "copying the state to the host, for which chips pause at a save"
  )
  barrier: float = _assumed(1.0, "s", "median of the rest of that pause: log-normal, sigma 0.5")
  storage: float = _assumed(0.5e9, "byte/s a host", "writing a checkpoint, while training goes on")
  failures: float = _assumed(2e-5, "a chip and hour", "failures that end the run: exponential")
  restart: float = _assumed(600, "s", "median from a failure to the next step: log-normal, sigma 0.5")

  def changed(self, changes: Mapping[str, float]) -> "Assumptions":
    """These with others in place of some.

    Raises:
      ValueError: there is no such assumption, or it is not positive or more than all.
    """
    known = {field.name: field for field in dataclasses.fields(self)}
    for name, value in changes.items():
      if name not in known:
        raise ValueError(f"{name}: there is no such assumption; there are {', '.join(known)}")
      share = _is_share(known[name])
      if value < 0 or (share and value > 1) or (not value and name in _DIVISORS):
        raise ValueError(f"{name}={value:g}: give a number above 0{', at most 1' if share else ''}")
    return dataclasses.replace(self, **changes)


def _is_share(field: dataclasses.Field) -> bool:
  return field.metadata["unit"].startswith("of ") or field.name == "stalls"


_DIVISORS = ("products", "memory", "links", "host", "copy", "storage")
_SIGMA = 0.5


def assumed(assumptions: Assumptions) -> list[tuple[str, str, str]]:
  """Rows of name, value with its unit, and text."""
  return [
    (field.name, f"{getattr(assumptions, field.name):g} {field.metadata['unit']}", field.metadata["text"])
    for field in dataclasses.fields(assumptions)
  ]


def changeable(assumptions: Assumptions) -> list[tuple[str, float, bool]]:
  """Name and value of each, and whether it is a share, at most 1."""
  return [
    (field.name, getattr(assumptions, field.name), _is_share(field))
    for field in dataclasses.fields(assumptions)
  ]


# --- Rows ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Packed rows of real samples; int64 [n] each.

  Attributes:
    tokens, tiles: of a row.
    pairs: of a token and one that it attends to, in its own sample.
  """

  tokens: np.ndarray
  tiles: np.ndarray
  pairs: np.ndarray

  def useful(self, flops: Mapping[str, float]) -> float:
    """FLOPs that a row needs on average, by those of a tile, a token and a pair."""
    sizes = {"per_tile": self.tiles, "per_token": self.tokens, "per_pair": self.pairs}
    return math.fsum(flops[name] * float(size.mean()) for name, size in sizes.items())


def packed_rows(sizes: np.ndarray, tokens: int, tiles: int, epochs: int, rng: np.random.Generator) -> Rows:
  """Packs samples of these sizes (int64 [n, 2], tokens and tiles) as a run does, in another order for each epoch."""
  settings = packing.PackSettings(max_tokens=tokens, max_tiles=tiles, over_long="drop")
  stream = np.concatenate([rng.permutation(sizes) for _ in range(epochs)])
  rows = list(packing.pack(stream, settings))
  order, lengths = np.concatenate(rows), np.array([len(row) for row in rows])
  starts = np.cumsum(lengths) - lengths
  pairs = stream[:, 0] * (stream[:, 0] + 1) // 2
  of_rows = [np.add.reduceat(one[order], starts) for one in (stream[:, 0], stream[:, 1], pairs)]
  return Rows(tokens=of_rows[0], tiles=of_rows[1], pairs=of_rows[2])


def fullest(tiles: np.ndarray) -> np.ndarray:
  """The pool that each step is compiled for, int64 [steps]: that of the fullest of its shards' rows, [steps, shards]."""
  most, places = np.unique(tiles.max(axis=1), return_inverse=True)
  return np.array([tile_bucket(int(one)) for one in most])[places]


# --- A step -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What the compiler made of the step on one slice; numbers are those of one chip.

  Attributes:
    topology, chips, shards: the slice, and how many chips share the batch.
    flops, traffic: operations, and bytes to and from memory, of a pool of `tiles`.
    tiles: of the pool that was compiled for.
    flops_of_tile: what one tile more takes.
    exchanges: (kind, how often, least seconds of all of them).
    state: bytes of parameters and moments.
    memory: bytes in use at the peak.
  """

  topology: str
  chips: int
  shards: int
  flops: float
  traffic: float
  tiles: int
  flops_of_tile: float
  exchanges: tuple[tuple[str, int, float], ...]
  state: int
  memory: int

  @property
  def chip(self) -> Any:
    """The kind of chip."""
    return TPUS[self.topology.partition(":")[0]]

  def busy(self, tiles: np.ndarray, assumed: Assumptions) -> np.ndarray:
    """Seconds that a chip computes for pools of so many tiles, if nobody is waited for."""
    flops = self.flops + (tiles - self.tiles) * self.flops_of_tile
    products = flops / (self.chip.flops * assumed.products)
    memory = self.traffic / (self.chip.memory_bandwidth * assumed.memory)
    return np.maximum(products, memory)

  def exchanging(self, assumed: Assumptions) -> float:
    """Seconds that the exchanges of a step take, one after the other."""
    hops = self._hops()
    latency = {"collective-permute": 1, "all-reduce": 2 * hops}
    return math.fsum(
      seconds / assumed.links + count * latency.get(kind, hops) * assumed.hop
      for kind, count, seconds in self.exchanges
    )

  def _hops(self) -> int:
    """Links between the chips that are farthest from each other: half of a ring, all of a line."""
    lengths = [int(length) for length in self.topology.partition(":")[2].split("x")]
    return sum(length // 2 if length % self.chip.ring == 0 else length - 1 for length in lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
  """Where the time of a mean step goes; seconds.

  Attributes:
    useful: what the rows' own tokens and tiles need at the chip's peak.
    recomputed: layers computed again for the backward pass, and pairs of tokens of different samples, at the peak.
    padding: tiles that pools are padded with, at the peak.
    below_peak: the same operations at the speed that chips reach.
    exchanges: those that nothing hides.
    waiting: for the slowest chip and for late hosts.
    exchanged: all exchanges, those that products hide included.
  """

  useful: float
  recomputed: float
  padding: float
  below_peak: float
  exchanges: float
  waiting: float
  exchanged: float

  @property
  def total(self) -> float:
    """Seconds of a step."""
    return self.useful + self.recomputed + self.padding + self.below_peak + self.exchanges + self.waiting

  @property
  def mfu(self) -> float:
    """The share of the peak that goes to the rows' own tokens and tiles."""
    return self.useful / self.total


def step_time(
  program: Program,
  useful: float,
  tiles: float,
  pools: np.ndarray,
  assumed: Assumptions,
  rng: np.random.Generator,
) -> StepTime:
  """Draws steps and takes their mean.

  Args:
    program: of the slice.
    useful: FLOPs that a row needs.
    tiles: of a row, on average.
    pools: tiles that each of the steps computes, int64 [steps].
    assumed: see `Assumptions`.
    rng: what stragglers are drawn from.
  """
  peak = program.chip.flops
  busy = program.busy(pools, assumed)
  exchanged = program.exchanging(assumed)
  exposed = exchanged - np.minimum(assumed.hidden * exchanged, busy)
  slowest = assumed.spread * _slowness(len(pools), program.chips, rng)
  late = _lateness(_DRAWS, math.ceil(program.chips / assumed.host), assumed, rng).mean()
  computed = (program.flops + (pools.mean() - program.tiles) * program.flops_of_tile) / peak
  padding = (pools.mean() - tiles) * program.flops_of_tile / peak
  return StepTime(
    useful=useful / peak,
    recomputed=computed - padding - useful / peak,
    padding=padding,
    below_peak=float(busy.mean()) - computed,
    exchanges=float(exposed.mean()),
    waiting=float((busy * slowest).mean() + late),
    exchanged=exchanged,
  )


def _slowness(steps: int, chips: int, rng: np.random.Generator) -> np.ndarray:
  """Computes [steps]: the largest |normal| of so many chips, each time of others."""
  return np.array([np.abs(rng.standard_normal(chips)).max() for _ in range(steps)])


def _lateness(steps: int, hosts: int, assumed: Assumptions, rng: np.random.Generator) -> np.ndarray:
  """Computes [steps]: seconds that the latest of the hosts is late; none where all are in time."""
  late = rng.binomial(hosts, assumed.stalls, steps)
  times = np.zeros(steps)
  for step in np.flatnonzero(late):
    times[step] = rng.exponential(assumed.stall, late[step]).max()
  return times


# --- A run --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
  """How a run saves and fails; seconds.

  Attributes:
    between: mean time between failures of any chip; infinite: there are none.
    copy: of a pause, what is the same each time.
    barrier: median of the rest of a pause.
    write: from the end of the pause until the checkpoint can be restored.
    restart: median from a failure to the next step.
    sigma: of the logarithms of `barrier` and `restart`.
  """

  between: float
  copy: float
  barrier: float
  write: float
  restart: float
  sigma: float = _SIGMA

  @classmethod
  def of(cls, program: Program, assumed: Assumptions) -> "Reliability":
    """That of a slice."""
    rate = program.chips * assumed.failures / 3600
    return cls(
      between=1 / rate if rate else math.inf,
      copy=program.state / assumed.copy,
      barrier=assumed.barrier,
      write=program.state * assumed.host / assumed.storage,
      restart=assumed.restart,
    )

  @property
  def pause(self) -> float:
    """The mean pause."""
    return self.copy + self.barrier * math.exp(self.sigma**2 / 2)

  def best_interval(self, longest: float = DAY) -> float:
    """Seconds of work between saves: Young's optimum, sqrt(2 pause between); no save begins before the last is written.

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return min(max(math.sqrt(2 * self.pause * self.between), self.write), longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goodput:
  """Where the time of a run goes; shares, which add up to 1.

  Attributes:
    goodput: steps that count in the end.
    saves: pauses for checkpoints.
    lost: steps that are done again, and restarts.
    failures: how many there were, in all replicas.
  """

  goodput: float
  saves: float
  lost: float
  failures: int


def simulate(
  how: Reliability, interval: float, *, days: float, runs: int, rng: np.random.Generator
) -> Goodput:
  """Draws runs of so many days, event by event.

  Args:
    how: see `Reliability`.
    interval: seconds of work between saves.
    days: of each run; its last steps count though no checkpoint has them.
    runs: how many.
    rng: what all is drawn from.
  """
  end, worked, paused, failures = days * DAY, 0.0, 0.0, 0
  for _ in range(runs):
    clock = 0.0
    while clock < end:
      fails = clock + (rng.exponential(how.between) if math.isfinite(how.between) else math.inf)
      kept, pauses = _until(clock, min(fails, end), how, interval, rng, fails >= end)
      worked, paused = worked + kept, paused + pauses
      failures += fails < end
      clock = _restarted(fails, how, rng) if fails < end else end
  time = runs * end
  return Goodput(
    goodput=worked / time, saves=paused / time, lost=1 - (worked + paused) / time, failures=failures
  )


def _until(
  start: float, end: float, how: Reliability, interval: float, rng: np.random.Generator, all_counts: bool
) -> tuple[float, float]:
  """Seconds of work that count, and of pauses, from a start to an end without a failure between."""
  count = int((end - start) / interval) + 1
  pauses = how.copy + how.barrier * rng.lognormal(0.0, how.sigma, count)
  ends = start + interval * np.arange(1, count + 1) + np.cumsum(pauses)
  paused = float(np.clip(end - (ends - pauses), 0.0, pauses).sum())
  saved = interval * int((ends + how.write <= end).sum())
  return (end - start - paused if all_counts else saved), paused


def _restarted(clock: float, how: Reliability, rng: np.random.Generator) -> float:
  """When steps go on after a failure; a restart can fail, too."""
  while True:
    takes = how.restart * rng.lognormal(0.0, how.sigma)
    fails = rng.exponential(how.between)
    if fails >= takes:
      return clock + takes
    clock += fails


def expected_goodput(how: Reliability, interval: float) -> float:
  """The goodput by arithmetic, where pauses and restarts are always the same and checkpoints are written at once.

  J. T. Daly, A higher order estimate of the optimum checkpoint interval, FGCS 22(3), 2006, equation 20.
  """
  assert not how.sigma and not how.write
  if math.isinf(how.between):
    return interval / (interval + how.pause)
  whole = how.between * math.exp(how.restart / how.between) * math.expm1((interval + how.pause) / how.between)
  return interval / whole


def programs(found: Mapping[str, Any]) -> list[Program]:
  """The programs of benchmarks/scale_programs.json, fewest chips first."""
  names = [field.name for field in dataclasses.fields(Program) if field.name not in ("tiles", "exchanges")]
  made = [
    Program(
      **{name: entry[name] for name in names},
      tiles=found["tiles"],
      exchanges=tuple((row["kind"], row["count"], row["seconds"]) for row in entry["exchanges"]),
    )
    for entry in found["programs"].values()
  ]
  return sorted(made, key=lambda program: program.chips)
