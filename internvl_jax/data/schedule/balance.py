"""Load balancing: packed rows assigned to steps and devices so that the devices of a step finish together.

Every device of a step waits for the slowest, and rows that are equally full differ: in tiles, and in how long their
samples are, which attention pays by the square. So rows are planned a window of steps ahead, and a step gets rows that
cost the same. Each row is in one step, as before, and rows hold what they held.

A window is cut in two where its rows differ most (in the whole cost, in that of their tiles or in that of the decoder),
and each half again, until the devices of the steps in a part are within 1 % of each other or the part is one step. Rows
that are alike already are therefore not moved, and none is moved further than that takes. Tiles and decoder are looked
at apart because devices pay for them apart: the pools of tiles of a step are padded to the fullest.

Steps of a part are alike in what they hold (many images, long texts), so the steps of a window run in an order drawn from
the seed. The arithmetic is on integers: the same on every host.
"""

import dataclasses
from typing import Any

import numpy as np

from internvl_jax.data.schedule.grouping import deal

ALGORITHM = "balanced-1"
"""Changes whenever the same rows would be in other steps: a state of another one is refused."""

UNIT = 1 << 24
"""The cost of a token in the decoder's matrix products, by FLOPs; what all costs are measured in."""

# The devices of steps need not be nearer to each other: buckets of tiles and kernels' blocks are coarser.
_EVEN_PERCENT = 101
# Makes the draw of a window another one than those of epochs, which are of two numbers.
_STREAM = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
  """The cost of a row in a training step, in units of 1/UNIT of a token's matrix products in the decoder.

  Attributes:
    per_tile: the vision tower and the projector.
    per_token: the decoder's matrix products.
    per_pair: attention of a token and one that it sees, in layers that see everything.
    windowed: (window, cost of a pair) of layers that do not.
  """

  per_tile: int
  per_token: int = UNIT
  per_pair: int = 0
  windowed: tuple[tuple[int, int], ...] = ()

  def of(self, sizes: np.ndarray) -> np.ndarray:
    """Computes int64 [n, 2]: what samples cost in the vision tower and in the decoder.

    Args:
      sizes: int64 [n, 2], tokens and tiles, each sample a segment of its own.
    """
    tokens, tiles = sizes.T
    pairs = tokens * (tokens + 1) // 2
    decoder = self.per_token * tokens + self.per_pair * pairs
    for window, each in self.windowed:
      decoder += each * np.minimum(pairs, tokens * window)
    return np.stack([self.per_tile * tiles, decoder], axis=1)

  def of_rows(self, sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Computes int64 [rows, 2] of rows that hold so many (int64 [rows], each 1 or more) of the samples, in order."""
    starts = np.cumsum(lengths) - lengths
    return np.add.reduceat(self.of(sizes), starts, axis=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
  """How rows are balanced.

  Attributes:
    steps: of a window.
    cost: of a row.
  """

  steps: int
  cost: RowCost

  def to_json(self) -> dict[str, Any]:
    """JSON values for a checkpoint."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Balance":
    """The balance that `to_json` made the values of."""
    cost = dict(values["cost"])
    windowed = tuple((int(window), int(each)) for window, each in cost.pop("windowed"))
    numbers = {name: int(value) for name, value in cost.items()}
    return cls(steps=int(values["steps"]), cost=RowCost(**numbers, windowed=windowed))


def assign(costs: np.ndarray, accumulation: int, shards: int, rows: int) -> np.ndarray:
  """Assigns the rows of a window to steps, and those of each step to its micro-batches and devices.

  Args:
    costs: int64 [n, 2], those of `RowCost.of_rows`, in the order of the stream.
    accumulation: micro-batches of a step.
    shards: devices.
    rows: of a step; divides n.

  Returns:
    int64 [steps, rows]: the rows of each step, in the places that `to_devices` gives them.
  """
  totals = costs.sum(axis=1)
  steps = even_steps(costs, rows)
  return np.stack([step[to_devices(totals[step], accumulation, shards)] for step in steps])


def even_steps(costs: np.ndarray, rows: int) -> np.ndarray:
  """Assigns the rows of a window to steps of rows that cost the same.

  Example: of costs [[0, 1], [0, 9], [0, 1], [0, 9]] steps of two rows are [0, 2] and [1, 3].

  Args:
    costs: int64 [n, 2], those of `RowCost.of_rows`, in the order of the stream.
    rows: of a step; divides n.

  Returns:
    int64 [steps, rows]: the rows of each step, in the order of the stream.
  """
  ways = np.stack([costs.sum(1), costs[:, 0], costs[:, 1]])
  found: list[np.ndarray] = []
  parts = [np.arange(len(costs))]
  while parts:
    part = parts.pop()
    steps = len(part) // rows
    if steps == 1 or _are_even(costs[part], rows):
      found.append(part.reshape(steps, rows))
      continue
    widest = int(np.ptp(ways[:, part], axis=1).argmax())
    ordered = part[np.argsort(ways[widest, part], kind="stable")]
    half = steps // 2 * rows
    parts += [np.sort(ordered[half:]), np.sort(ordered[:half])]
  return np.concatenate(found)


def _are_even(costs: np.ndarray, rows: int) -> bool:
  """Whether the steps of these rows, taken as they come, wait for nobody; tiles and decoder each for their slowest."""
  slowest = int(costs.reshape(-1, rows, 2).max(axis=1).sum())
  return 100 * slowest * rows <= _EVEN_PERCENT * int(costs.sum())


def shuffled(steps: np.ndarray, seed: int, first: int) -> np.ndarray:
  """The steps of a window, [steps, ...], in an order drawn from the seed and the number of the window's first step."""
  return steps[np.random.default_rng((seed, first, _STREAM)).permutation(len(steps))]


def to_devices(costs: np.ndarray, accumulation: int, shards: int) -> np.ndarray:
  """Assigns the rows of a step to micro-batches and devices, of nearly equal cost each.

  Where a device has several rows of a micro-batch, they are chosen by `grouping.deal`. Devices that are alike share a
  micro-batch; within it, they come in the order of the stream, so that none has always the most.

  Args:
    costs: int64 [rows], in the order of the stream.
    accumulation: micro-batches of a step.
    shards: devices.

  Returns:
    int64 [rows]: the rows of the first micro-batch's first device, of its second one, and so on.
  """
  devices = np.sort(deal(costs, accumulation * shards).reshape(accumulation * shards, -1), axis=1)
  devices = devices[np.argsort(costs[devices].sum(axis=1), kind="stable")]
  micro_batches = devices.reshape(accumulation, shards, -1)
  order = np.argsort(micro_batches[:, :, 0], axis=1)
  return np.take_along_axis(micro_batches, order[:, :, None], axis=1).ravel()


def slowest_over_mean(costs: np.ndarray, accumulation: int, shards: int) -> float:
  """Computes by how much the slowest devices of micro-batches exceed the mean, all in all: 1 is perfect balance.

  Args:
    costs: int64 [steps, rows], rows in their places as by `to_devices`.
    accumulation: micro-batches of a step.
    shards: devices.
  """
  devices = costs.reshape(len(costs) * accumulation, shards, -1).sum(axis=-1)
  total = int(devices.sum())
  return int(devices.max(axis=1).sum()) * shards / total if total else 1.0


def waiting(costs: np.ndarray, shards: int, window: int) -> tuple[float, float]:
  """Computes `slowest_over_mean` of a stream of rows, one a device and step: as they come, and balanced.

  Args:
    costs: int64 [n, 2], those of `RowCost.of_rows`, in the order of the stream.
    shards: devices; rows that make no whole step are left out.
    window: steps of a window; at the end one of fewer.
  """
  steps = len(costs) // shards
  costs = costs[: steps * shards]
  totals = costs.sum(axis=1)
  assigned = []
  for start in range(0, steps * shards, window * shards):
    part = costs[start : start + window * shards]
    assigned.append(start + assign(part, 1, shards, shards))
  after = slowest_over_mean(totals[np.concatenate(assigned)], 1, shards)
  return slowest_over_mean(totals.reshape(steps, shards), 1, shards), after
