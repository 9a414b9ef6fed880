"""Writes the report of a run: one HTML page with its curves, data, predictions, settings and environment.

  python -m internvl_jax.report OUTPUT_DIR
  python -m internvl_jax.report --output page.html OUTPUT_DIR

The run may be over, under way, stopped or crashed. The page holds all it needs, so it can be sent or archived as it is.
"""

from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import path_of

_OUTPUT = flags.DEFINE_string("output", None, "File to write; report.html in the run's directory if unset.")


def main(argv: Sequence[str]) -> None:
  """Reads the run and writes the page."""
  if len(argv) != 2:
    raise UserError("name the output directory of one run: python -m internvl_jax.report OUTPUT_DIR")
  cli.set_up_logging()
  from internvl_jax.outputs import REPORT_FILE
  from internvl_jax.reporting.page import write_report

  folder = path_of(argv[1])
  print(write_report(folder, path_of(_OUTPUT.value) if _OUTPUT.value else folder / REPORT_FILE))


if __name__ == "__main__":
  cli.run_app(main, positional=True)
