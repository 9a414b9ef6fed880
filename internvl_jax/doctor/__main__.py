"""Looks at the data before any accelerator is booked, and tells what a run would lose.

  python -m internvl_jax.doctor --config F [--show N] [--dump out.jsonl] [--picture sizes.png] [--nodecode]

Measures every sample and decodes every image and video, on all cores, and prints a table of the datasets, the
sizes, how full packed rows would be, the steps of an epoch, what of the lines is not read, which images are taken
otherwise than they are shown (of more than 8 bits, with several frames, ...), and the same for held-out data
(eval.annotation, the task's held-out samples). Ends with status 1 if a line would be lost: unreadable, without a
supervised token, or too long to keep any of it (loader.on_over_length); or if a held-out one cannot be used.
"""

import sys
from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.config_checks import validate

_CONFIG = cli.define_config_flag()
_SHOW = flags.DEFINE_integer(
  "show", 0, "Print so many samples, the supervised text between » and «.", lower_bound=0
)
_DUMP = flags.DEFINE_string("dump", None, "A jsonl to write every sample's ids, labels and tiles to.")
_PICTURE = flags.DEFINE_string("picture", None, "A picture to write, with histograms of tokens and tiles.")
_DECODE = flags.DEFINE_bool("decode", True, "Decode images and videos, not only their headers.")


def main(argv: Sequence[str]) -> None:
  """Examines, prints, and ends with 1 if something would be lost."""
  del argv
  cli.set_up_logging()
  config = _CONFIG.value
  validate(config, "doctor")
  cli.warn_idle(config)
  from internvl_jax.doctor.run import Request, examine_data

  request = Request(show=_SHOW.value, dump=_DUMP.value, picture=_PICTURE.value, decode=_DECODE.value)
  sys.exit(0 if examine_data(config, request) else 1)


if __name__ == "__main__":
  cli.run_app(main)
