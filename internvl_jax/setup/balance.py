"""What packed rows cost a device: the operations that the model needs for them."""

from internvl_jax.config import TrainConfig
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.hf.model import Source
from internvl_jax.metrics.mfu import UsefulFlops, useful_flops
from internvl_jax.optim.labels import labels_of, trained
from internvl_jax.tasks.task import Task


def run_row_cost(config: TrainConfig, source: Source, task: Task) -> RowCost:
  """The cost of the rows of a run, by its model, what of it trains, and its task."""
  shapes = source.model.shapes
  trainable = trained(labels_of(config.model, shapes))
  useful = useful_flops(source.config, shapes, trainable, twice=task.twice)
  return row_cost(useful, pools_are_full=config.data.use_packed_ds and bool(config.data.strict_mode))


def row_cost(useful: UsefulFlops, *, pools_are_full: bool = False) -> RowCost:
  """The cost of rows from the FLOPs that they need.

  Args:
    useful: FLOPs of a training step, by what a batch holds.
    pools_are_full: every pool is padded to the budget, so that tiles make no difference.
  """
  unit = UNIT / useful.per_token
  per_tile = useful.per_tile + useful.per_image_token * useful.tokens_per_tile
  return RowCost(
    per_tile=0 if pools_are_full else round(per_tile * unit),
    per_pair=round(useful.per_pair * unit),
    windowed=tuple((window, round(each * unit)) for window, each in useful.windowed),
  )
