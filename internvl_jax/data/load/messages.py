"""A loader's log lines and errors: how full and how even its rows are, and why a run cannot go on or goes on otherwise."""

from absl import logging

from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.balance import Balance
from internvl_jax.data.schedule.packed_steps import Evenness
from internvl_jax.data.where import DataError


def other_batches(what: str, restore: str) -> DataError:
  """The error of a run that cannot go on with the same batches.

  Args:
    what: is not as it was.
    restore: what to bring back.
  """
  return DataError(
    f"the run cannot go on with the same batches: {what}; restore the {restore} of then, or start anew with "
    "training.overwrite_output_dir=True"
  )


def goes_on_as_it_began(balance: Balance | None) -> str:
  """The line for a run whose rows are balanced in another way than settings and model say now."""
  how = "are not balanced" if balance is None else f"are balanced over {balance.steps} steps"
  return (
    f"The run goes on as it began: its packed rows {how}, by the costs of then. Runs that begin anew follow "
    "loader.balance_steps and loader.balance_costs"
  )


def log_fill(stats: packing.PackStats) -> None:
  """Logs how full packed rows are so far."""
  logging.info(
    "%d packed rows: %.1f %% of their tokens and %.1f %% of their tiles are filled, %.1f samples a row",
    *(stats.rows, 100 * stats.token_fill, 100 * stats.tile_fill, stats.samples_per_row),
  )


def log_evenness(step: int, found: Evenness) -> None:
  """Logs how even the devices' work is in the steps that begin with this one, counted from 1."""
  logging.info(
    "Steps %d to %d: the slowest device has %.3f times the mean's work; as the rows come, it would be %.3f",
    *(step, step + found.steps - 1, found.after, found.before),
  )
