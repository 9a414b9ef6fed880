"""Certifies that this program computes what PyTorch does, on your own data and checkpoint, or says where it first departs.

  python -m internvl_jax.certify --recorder > certify_record.py
  python -m internvl_jax.certify --record record/ --model DIR --meta meta.json [--output certificate/]

The first command prints a script that runs in your PyTorch environment (the reference's internvl_chat, or transformers) and
records token ids, labels, pixels, activations, logits, losses and gradients of samples of your mixture:

  python certify_record.py --model DIR --meta meta.json --samples 8 --output record/

The second one computes the same here in float32, compares stage by stage, prints a table, and writes certificate.md,
certificate.html and questions.jsonl (questions with our greedy answers, to ask a server). It ends with status 1 if a stage
departs.
"""

import sys
from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError

_RECORDER = flags.DEFINE_bool("recorder", False, "Print the script that records, and do nothing else.")
_RECORD = flags.DEFINE_string("record", None, "The folder that the script wrote.")
_MODEL = flags.DEFINE_string(
  "model", None, "Checkpoint folder, hub id or a bucket's URL: that of the recording."
)
_META = flags.DEFINE_string("meta", None, "Meta file of the mixture that was recorded.")
_OUTPUT = flags.DEFINE_string("output", "certificate", "Folder to write.")
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 1e-4, "Largest relative difference of activations, logits and losses.", lower_bound=0
)
_QUESTIONS = flags.DEFINE_integer("questions", 8, "Questions to answer for servers.", lower_bound=0)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Longest answer to them.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
  """Prints the recorder; or compares, prints, writes, and ends with 1 if something departs."""
  del argv
  from internvl_jax.certify.recording import recorder

  if _RECORDER.value:
    sys.stdout.write(recorder().read_text(encoding="utf-8"))
    return
  if _RECORD.value is None or _MODEL.value is None or _META.value is None:
    raise UserError(
      "--record, --model and --meta are needed; --recorder prints the script that makes a recording"
    )
  cli.set_up_logging()
  from internvl_jax.certify.run import Request, certify

  request = Request(
    record=_RECORD.value,
    model=_MODEL.value,
    meta=_META.value,
    output=_OUTPUT.value,
    tolerance=_TOLERANCE.value,
    questions=_QUESTIONS.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
  )
  sys.exit(0 if certify(request) else 1)


if __name__ == "__main__":
  cli.run_app(main)
