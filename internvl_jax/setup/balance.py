"""What packed rows cost a device: the operations that the model needs for them, or what was measured on its chip."""

from collections.abc import Sequence
from typing import Any

from internvl_jax.config import TrainConfig
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.hf.model import Source
from internvl_jax.metrics.mfu import UsefulFlops, useful_flops
from internvl_jax.models.base_weights import as_kernels
from internvl_jax.optim.labels import labels_of, trained
from internvl_jax.tasks.task import Task

# Tiles cost about a thousand tokens, and tokens thousands of pairs. Measured costs are scaled so that neither costs
# more than such a tile and such a pair, whatever is given: sums over a window of steps stay below 2**63.
_TILE, _PAIRS = 1 << 10, 1 << 10


def run_row_cost(config: TrainConfig, source: Source, task: Task) -> RowCost:
  """The cost of the rows of a run, by its model, what of it trains, and its task, or as `loader.balance_costs` says."""
  shapes = as_kernels(source.model.shapes)
  trainable = trained(labels_of(config.model, shapes, config.flash.stage))
  useful = useful_flops(source.config, shapes, trainable, twice=task.twice)
  full = config.data.use_packed_ds and bool(config.data.strict_mode)
  return row_cost(useful, pools_are_full=full, measured=config.loader.balance_costs)


def row_cost(useful: UsefulFlops, *, pools_are_full: bool = False, measured: Sequence[float] = ()) -> RowCost:
  """The cost of rows from the FLOPs that they need, or from what was measured.

  Args:
    useful: FLOPs of a training step, by what a batch holds.
    pools_are_full: every pool is padded to the budget, so that tiles make no difference.
    measured: costs of a tile, a token and a pair of attention in one unit; a pair is one that all layers compute, and
      layers with a window take their share of it. Empty: by FLOPs.
  """
  windows = sum(each for _, each in useful.windowed)
  if measured:
    tile, token, pair = measured
    unit = UNIT / max(token, tile / _TILE, pair * _PAIRS)
    share = pair * unit / (useful.per_pair + windows)
  else:
    tile, token = useful.per_tile + useful.per_image_token * useful.tokens_per_tile, useful.per_token
    unit = share = UNIT / token
  return RowCost(
    per_tile=0 if pools_are_full else round(tile * unit),
    per_token=round(token * unit),
    per_pair=round(useful.per_pair * share),
    windowed=tuple((window, round(each * share)) for window, each in useful.windowed),
  )


def planned_balance(config: TrainConfig, source: Source, task: Task, shards: int) -> dict[str, Any] | None:
  """How a run on so many data shards balances its rows, as JSON values; None where it takes them as they come.

  Costs are in tokens of the decoder; a pair is one of attention in all layers. How even steps get depends on the data's
  sizes, which are not read here.
  """
  if not (config.data.use_packed_ds and config.loader.balance_steps and shards > 1):
    return None
  cost = run_row_cost(config, source, task)
  return {
    "steps": config.loader.balance_steps,
    "tokens_a_tile": cost.per_tile / cost.per_token,
    "tokens_a_pair": (cost.per_pair + sum(each for _, each in cost.windowed)) / cost.per_token,
    "measured": bool(config.loader.balance_costs),
  }
