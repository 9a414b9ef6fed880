"""Converts a checkpoint to either layout, with or without its LoRA adapters.

  python -m internvl_jax.convert --src DIR --dst DIR --layout internvl|hf [--lora merge|peft] [--dtype bfloat16|float32]
      [--code DIR]
  python -m internvl_jax.convert --src TUNED --interpolate START --weight 0,0.25,0.5,0.75,1 --dst DIR --layout internvl|hf

The source may have either layout, LoRA adapters as the reference stores them, or be a PEFT adapter's folder, a hub id
or the URL of a folder in a bucket (gs://, s3://), where DST may be, too. `--lora merge` merges the adapters into the
weights and checks that the logits stay the same; `--lora peft` writes the base model, and the adapters to DST/adapter in
PEFT's form. Without adapters the weights are converted tensor by tensor, so that a model may be larger than the memory.

`--interpolate` names the checkpoint that the source was trained from, and writes models between the two (WiSE-FT), each to
DST/<weight> where there are several; `internvl_jax.evaluate --model DST` scores them all.
"""

from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import output_path

_SRC = flags.DEFINE_string("src", None, "Checkpoint folder, hub id or a bucket's URL.", required=True)
_DST = flags.DEFINE_string("dst", None, "Folder to write; it must be new or empty.", required=True)
_LAYOUT = flags.DEFINE_enum("layout", None, ["internvl", "hf"], "Names and config to write.", required=True)
_LORA = flags.DEFINE_enum("lora", "merge", ["merge", "peft"], "What becomes of adapters.")
_CODE = flags.DEFINE_string(
  "code", None, "Folder whose Python files the internvl layout brings along; the source's if unset."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "auto",
  ["auto", "bfloat16", "float32"],
  "Numbers of the weights; auto: bfloat16 if the source's are.",
)
_INTERPOLATE = flags.DEFINE_string(
  "interpolate", None, "The checkpoint that SRC was trained from, to write models between the two."
)
_WEIGHT = flags.DEFINE_list("weight", None, "Weights of SRC in an interpolation: 0 is START, 1 is SRC.")


def main(argv: Sequence[str]) -> None:
  """Reads the flags and converts."""
  del argv
  cli.set_up_logging()
  import jax.numpy as jnp

  from internvl_jax.conversion import convert, interpolate
  from internvl_jax.hf.model_config import layout_named

  dtype = {"auto": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}[_DTYPE.value]
  dst, layout = output_path(_DST.value, "--dst"), layout_named(_LAYOUT.value)
  weights = interpolation_weights()
  if _INTERPOLATE.value is not None:
    interpolate(_SRC.value, _INTERPOLATE.value, dst, layout, weights, dtype=dtype, code=_CODE.value)
  else:
    convert(_SRC.value, dst, layout, lora=_LORA.value, dtype=dtype, code=_CODE.value)


def interpolation_weights() -> list[float]:
  """The weights of an interpolation; none where there is none.

  Raises:
    UserError: they are no numbers from 0 to 1, or are missing, or have no effect.
  """
  given = _WEIGHT.value
  if _INTERPOLATE.value is None:
    if given is not None:
      raise UserError(f"--weight={','.join(given)} has no effect without --interpolate=START; name the start")
    return []
  if _LORA.value == "peft":
    raise UserError("--lora=peft: adapters are merged before models are interpolated; leave it out")
  if not given:
    raise UserError(
      "--interpolate needs --weight: that of SRC, such as 0.5, or several, such as 0,0.25,0.5,0.75,1"
    )
  found = list(dict.fromkeys(map(_weight, given)))
  if len({f"{weight:g}" for weight in found}) < len(found):
    raise UserError(
      f"--weight={','.join(given)}: folders are named by six digits of a weight; let them differ"
    )
  return found


def _weight(text: str) -> float:
  try:
    weight = float(text)
  except ValueError:
    weight = -1.0
  if not 0 <= weight <= 1:
    raise UserError(f"--weight={text!r}: must be a number from 0 to 1: 0 is START, 1 is SRC")
  return weight


if __name__ == "__main__":
  cli.run_app(main)
