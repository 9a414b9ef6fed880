"""What a tile, a token and a pair of attention cost on this device, for `loader.balance_costs`.

The whole training step is timed over rows of two lengths, with pools of two sizes, in few segments and in many. What a
step takes is fitted by tile * tiles of the pool + token * tokens of the row + pair * pairs that attend to each other,
and a constant for what every step does (the optimizer).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy.optimize

import gpu_rows
import gpu_steps
from gpu_results import Results
from internvl_jax.batch import count
from internvl_jax.data.schedule.balance import UNIT
from internvl_jax.errors import UserError
from internvl_jax.setup.balance import row_cost

SEGMENTS = (1, 4, 16)
"""Numbers of equal segments of a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """Milliseconds of a tile, a token, a pair and of what every step does; and the largest error, relative to its step."""

  tile: float
  token: float
  pair: float
  constant: float
  worst: float

  @property
  def setting(self) -> str | None:
    """The costs as a run takes them; None where they are of no use, since tokens cost nothing."""
    costs = (f"{each:.4g}" for each in (self.tile, self.token, self.pair))
    return f"loader.balance_costs=({','.join(costs)})" if self.token > 0 else None


def fit(features: Sequence[Sequence[float]], milliseconds: Sequence[float]) -> Fit:
  """Fits costs of 0 or more to times, by least squares of the relative errors.

  Args:
    features: tiles, tokens and pairs of each batch.
    milliseconds: of its step.

  Raises:
    UserError: the batches do not tell the costs apart.
  """
  times = np.asarray(milliseconds, float)
  columns = np.column_stack([np.asarray(features, float), np.ones(len(times))])
  scale = columns.max(axis=0)
  if np.linalg.matrix_rank(columns / scale, tol=1e-6) < 4:
    raise UserError("the batches do not tell tiles, tokens, pairs and the rest apart; vary each on its own")
  found, _ = scipy.optimize.nnls(columns / scale / times[:, None], np.ones(len(times)))
  found = found / scale
  tile, token, pair, constant = found.tolist()
  worst = float(np.abs(columns @ found / times - 1).max())
  return Fit(tile=tile, token=token, pair=pair, constant=constant, worst=worst)


def measure(
  results: Results, unit: str, case: gpu_steps.Case, *, remat: str = "full", toy: bool = False
) -> None:
  """Times the step over rows of two lengths with two pools, each in three ways of segments, and adds what they cost."""
  ready = gpu_steps.prepare(case, remat=remat, pool=None)
  setup, pool = ready.setup, ready.batch.tiles.shape[2]
  per_tile = setup.source.config.tokens_per_tile
  state, frozen = gpu_steps.start(setup)
  features: list[list[int]] = []
  times: list[float] = []
  for tokens, tiles in itertools.product((case.tokens // 2, case.tokens), (math.ceil(pool / 3), pool)):
    program = None
    for segments in SEGMENTS:
      batch = gpu_rows.packed_batch(
        tokens,
        per_tile=per_tile,
        side=case.side,
        image_token=case.image_token,
        pool=tiles,
        shares=[0.99 / segments] * segments,
      )
      program = program or gpu_steps.compiled(setup, state, frozen, batch)
      state, timing, _ = gpu_steps.take_steps(program, state, frozen, setup, batch, samples=2 if toy else 3)
      features.append([tiles, tokens, int(count(batch).pairs)])
      times.append(1e3 * timing.median)
  found, flops = fit(features, times), row_cost(ready.useful)
  results.add(
    unit,
    case=case.name,
    trains=case.variant or "full",
    attention=setup.how.kernels.attention,
    remat=setup.how.remat or "none",
    batches=features,
    times_ms=times,
    **dataclasses.asdict(found),
    setting=found.setting,
    tile_of_flops=UNIT / flops.per_tile * found.tile / found.token if found.token else None,
    pair_of_flops=UNIT / flops.per_pair * found.pair / found.token if found.token else None,
  )
