"""Converts a checkpoint to either layout, with or without its LoRA adapters.

  python -m internvl_jax.convert --src DIR --dst DIR --layout internvl|hf [--lora merge|peft] [--dtype bfloat16|float32]
      [--code DIR]

The source may have either layout, LoRA adapters as the reference stores them, or be a PEFT adapter's folder, a hub id
or the URL of a folder in a bucket (gs://, s3://), where DST may be, too. `--lora merge` merges the adapters into the
weights and checks that the logits stay the same; `--lora peft` writes the base model, and the adapters to DST/adapter in
PEFT's form. Without adapters the weights are converted tensor by tensor, so that a model may be larger than the memory.
"""

from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
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


def main(argv: Sequence[str]) -> None:
  """Reads the flags and converts."""
  del argv
  cli.set_up_logging()
  import jax.numpy as jnp

  from internvl_jax.conversion import convert
  from internvl_jax.hf.model_config import layout_named

  dtype = {"auto": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}[_DTYPE.value]
  convert(
    _SRC.value,
    output_path(_DST.value, "--dst"),
    layout_named(_LAYOUT.value),
    lora=_LORA.value,
    dtype=dtype,
    code=_CODE.value,
  )


if __name__ == "__main__":
  cli.run_app(main)
