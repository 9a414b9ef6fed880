"""Trains InternVL.

  python -m internvl_jax.train --config configs/quickstart.py [--config.training.learning_rate=1e-5 ...]

The command starts a run, or goes on with it from its newest checkpoint; at the end `training.output_dir` holds
a self-contained checkpoint. docs/training.md describes what else it leaves there.
"""

from collections.abc import Sequence

from internvl_jax import cli, signals
from internvl_jax.stopwatch import Stopwatch

_CONFIG = cli.define_config_flag()


def main(argv: Sequence[str]) -> int:
  """Checks the config, then trains, saves and scores; returns the exit code."""
  del argv
  stopwatch = Stopwatch.of_process()
  cli.set_up_logging()
  signals.set_last_line(signals.GOES_ON)
  with stopwatch.phase("imports"):
    from internvl_jax.train.run import train

  return 0 if train(_CONFIG.value, stopwatch, recipe=cli.recipe_named()) else signals.STOPPED


if __name__ == "__main__":
  cli.run_app(main)
