"""Whether the run that a command line describes has its final model: the exit code says so, 0 or 75.

  python scripts/launch/is_finished.py --config RECIPE.py [...]     the arguments of internvl_jax.train

A run that was told to stop ends with 0 too; launchers tell the two apart by this, to start it again.
"""

import json
import sys
from pathlib import Path

from absl import flags

from internvl_jax import frontdoor

NOT_YET = 75  # EX_TEMPFAIL: try again later


def is_finished(output_dir: Path) -> bool:
  """Whether the last step's checkpoint was followed by the model."""
  state, model = output_dir / "trainer_state.json", output_dir / "config.json"
  if not (state.is_file() and model.is_file()):
    return False
  told = json.loads(state.read_text(encoding="utf-8"))
  return told["global_step"] == told["max_steps"] and model.stat().st_mtime >= state.stat().st_mtime


def main(argv: list[str]) -> int:
  holder = frontdoor.define_config_flag(argv=argv)
  frontdoor.parse_flags(argv)
  assert flags.FLAGS.is_parsed()
  return 0 if is_finished(Path(holder.value.training.output_dir)) else NOT_YET


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv))
  except Exception as error:
    frontdoor.report(error)
    sys.exit(1)
