"""Runs a checkpoint on given arrays in float32 and writes logits, loss and features, to compare with another program.

  python -m internvl_jax.verify --model DIR --inputs io.npz --outputs out.npz
  python -m internvl_jax.verify --model DIR --against DIR [--inputs io.npz]

Inputs (.npz): pixel_values [T, 3, H, W] normalized float, input_ids, labels and attention_mask [R, S],
image_token_id; optionally image_flags [T], position_ids and loss_weight_square [R, S].
Outputs (.npz): logits [R, S, V], loss, loss_square (where its weights are given), features [T, P, E],
vit_last_hidden [T, 1+patches, C], grad_norm; of an InternVL3.5-Flash also features_compressed [T, P/4, E] and gate [T, 2],
the probabilities to compress a tile and not to. Arrays that the inputs hold under an output's name are compared,
and the largest difference of each is printed.

With --against, two checkpoints of any layouts are compared on the same arrays, or on a fixed input without
--inputs. The command ends with status 1 if a logit differs by more than --tolerance times the largest one.
"""

import sys
from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import filled_file, output_path

_MODEL = flags.DEFINE_string("model", None, "Checkpoint folder, hub id or a bucket's URL.", required=True)
_INPUTS = flags.DEFINE_string("inputs", None, "The .npz of arrays to run on.")
_OUTPUTS_FILE = flags.DEFINE_string("outputs", None, "The .npz to write.")
_AGAINST = flags.DEFINE_string("against", None, "Another checkpoint, to compare with.")
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 1e-4, "With --against: share of the largest logit.", lower_bound=0
)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, runs, writes and compares."""
  del argv
  if _INPUTS.value is None and _AGAINST.value is None:
    raise UserError(
      "--inputs is needed: an .npz of arrays to run on (or --against, to compare two checkpoints)"
    )
  output = None if _OUTPUTS_FILE.value is None else output_path(_OUTPUTS_FILE.value, "--outputs")
  if _INPUTS.value is not None and _OUTPUTS_FILE.value is None and _AGAINST.value is None:
    raise UserError("--outputs is needed: the .npz to write")
  import numpy as np

  from internvl_jax import compiler
  from internvl_jax.verification import agrees, compute, read_inputs, report

  compiler.use_full_precision()
  inputs = None if _INPUTS.value is None else read_inputs(_INPUTS.value)
  outputs = compute(_MODEL.value, inputs)
  if output is not None:
    with filled_file(output) as path:
      np.savez(path, allow_pickle=False, **outputs)
  if inputs is not None:
    report(outputs, inputs)
  if _AGAINST.value is not None:
    others = compute(_AGAINST.value, inputs)
    print(f"{_MODEL.value} against {_AGAINST.value}:")
    report(outputs, others)
    if not agrees(outputs["logits"], others["logits"], _TOLERANCE.value):
      sys.exit(1)


if __name__ == "__main__":
  cli.run_app(main)
