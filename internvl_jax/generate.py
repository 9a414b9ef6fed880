"""Answers a question about an image.

python -m internvl_jax.generate --model DIR --image cat.jpg --question "What is on the mat?"
"""

import os
from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Checkpoint folder, hub id or a bucket's URL.", required=True)
_QUESTION = flags.DEFINE_string("question", None, "What to ask.", required=True)
_IMAGE = flags.DEFINE_string(
  "image", None, "The image asked about, a path or a URL; none for a question without one."
)
_SYSTEM = flags.DEFINE_string("system", None, "System message; the checkpoint's if unset.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  None,
  "Longest answer in tokens; if unset, generation_config.json's, at most 2048, or 128 where it says nothing.",
  lower_bound=1,
)
_BF16 = flags.DEFINE_bool("bf16", False, "Compute in bfloat16.")
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "Devices that share the weights, heads and the key-value cache.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Prints the answer."""
  del argv
  cli.set_up_logging()
  if _IMAGE.value and os.path.isdir(_IMAGE.value):
    raise UserError(f"--image={_IMAGE.value}: is a folder; name an image in it")
  from internvl_jax.answering import answer
  from internvl_jax.inference import open_for_inference

  opened = open_for_inference(_MODEL.value, bf16=_BF16.value, devices=_DEVICES.value)
  print(
    answer(
      opened,
      _QUESTION.value,
      image=_IMAGE.value,
      system=_SYSTEM.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
    )
  )


if __name__ == "__main__":
  cli.run_app(main)
