"""Answers one question about an image with a checkpoint opened for inference."""

from typing import Any

from absl import logging

from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.files import absolute
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import Typed
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.inference import Inference

# The cache of keys and values has the length of the longest answer.
_LONGEST, _USUAL_LONGEST = 2048, 128


def answer(
  opened: Inference, question: str, *, image: str | None, system: str | None, max_new_tokens: int | None
) -> str:
  """The greedy answer to a question.

  Args:
    opened: the checkpoint.
    question: what is asked.
    image: its path, relative to the working directory, or a URL; None or empty for none.
    system: the system message; None for the checkpoint's.
    max_new_tokens: longest answer; None for what generation_config.json says, at most 2048, or 128 where it says
      nothing.

  Raises:
    UserError: the image cannot be read.
  """
  turns: list[dict[str, Any]] = [{"from": "human", "value": question}, {"from": "gpt", "value": "?"}]
  if system is not None:
    turns.insert(0, {"from": "system", "value": system})
  # Typed from the working directory, it may be anywhere.
  record = {"conversations": turns} | ({"image": absolute(image)} if image else {})
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
    max_new_tokens=max_new_tokens or min(opened.max_new_tokens or _USUAL_LONGEST, _LONGEST),
    batch_size=1,
  )
  answers = decoder(opened.params, [Prompt(prompt_ids(sample), sample.tiles)])
  for line in decoder.unusual_ends(answers):
    logging.warning("%s", line)
  return opened.tokenizer.decode_answer(answers[0]).strip()
