"""Answers a question about an image.

python -m internvl_jax.generate --model DIR --image cat.jpg --question "What is on the mat?"
"""

import os
from collections.abc import Sequence

from absl import flags, logging

from internvl_jax import cli
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.files import absolute
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import Typed
from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.inference import open_for_inference

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


# The cache of keys and values has the length of the longest answer.
_LONGEST, _USUAL_LONGEST = 2048, 128


def main(argv: Sequence[str]) -> None:
  """Prints the answer."""
  del argv
  cli.set_up_logging()
  if _IMAGE.value and os.path.isdir(_IMAGE.value):
    raise UserError(f"--image={_IMAGE.value}: is a folder; name an image in it")
  opened = open_for_inference(_MODEL.value, bf16=_BF16.value, devices=_DEVICES.value)
  turns = [{"from": "human", "value": _QUESTION.value}, {"from": "gpt", "value": "?"}]
  if _SYSTEM.value is not None:
    turns.insert(0, {"from": "system", "value": _SYSTEM.value})
  # Typed from the working directory, it may be anywhere.
  record = {"conversations": turns} | ({"image": absolute(_IMAGE.value)} if _IMAGE.value else {})
  maker = SampleMaker(
    spec=DatasetSpec(name="question", root="", annotation="the command line"),
    data=opened.data,
    tokenizer=opened.tokenizer,
    tokens_per_tile=opened.source.config.tokens_per_tile,
    limits=Limits(opened.data.max_seq_length, policy="error"),
  )
  sample = maker.make(record, Typed("question", "the command line", 1, "--image"))
  decoder = GreedyDecoder(
    model=opened.source.model,
    how=opened.how,
    normalize_type=opened.data.normalize_type,
    image_token_id=opened.tokenizer.image_token_id,
    stop_ids=opened.stop_ids,
    max_new_tokens=_MAX_NEW_TOKENS.value or min(opened.max_new_tokens or _USUAL_LONGEST, _LONGEST),
    batch_size=1,
  )
  answers = decoder(opened.params, [Prompt(prompt_ids(sample), sample.tiles)])
  for line in decoder.unusual_ends(answers):
    logging.warning("%s", line)
  print(opened.tokenizer.decode_answer(answers[0]).strip())


if __name__ == "__main__":
  cli.run_app(main)
