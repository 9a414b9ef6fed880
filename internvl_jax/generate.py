"""Answers questions about images and videos: one, a conversation, or a file of them.

  python -m internvl_jax.generate --model DIR --image cat.jpg --question "What is on the mat?"
  python -m internvl_jax.generate --model DIR --chat [--image cat.jpg]
  python -m internvl_jax.generate --model DIR --inputs questions.jsonl --output answers.jsonl

--image and --video may be given several times; <image> and <video> in the question say where they go, else they come first.
--chat reads questions from the terminal or a pipe and answers as tokens come; /help lists its commands. Lines of --inputs
have "question" (or "messages"), "image", "video" and "id"; answers are written in their order, and the same command goes
on where it was stopped. Answers are greedy unless --temperature is above 0.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from internvl_jax import cli, signals
from internvl_jax.errors import UserError
from internvl_jax.storage import remote

_MODEL = flags.DEFINE_string("model", None, "Checkpoint folder, hub id or a bucket's URL.", required=True)
_QUESTION = flags.DEFINE_string("question", None, "What to ask.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image asked about, a path or a URL.")
_VIDEO = flags.DEFINE_multi_string("video", [], "A video asked about: a path, a URL or a folder of frames.")
_CHAT = flags.DEFINE_bool("chat", False, "Converse by lines of the terminal or of a pipe.")
_INPUTS = flags.DEFINE_string("inputs", None, "File of questions, one JSON object a line.")
_OUTPUT = flags.DEFINE_string("output", None, "With --inputs: file to write the answers to.")
_ROOT = flags.DEFINE_string("root", "", "With --inputs: prefix of the paths of images and videos.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 8, "With --inputs: questions answered at once.", lower_bound=1
)
_STRICT = flags.DEFINE_bool("strict", False, "With --inputs: end at the first line that cannot be asked.")
_SYSTEM = flags.DEFINE_string("system", None, "System message; the checkpoint's if unset.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  None,
  "Longest answer in tokens; if unset, generation_config.json's, at most 2048, or 128 where it says nothing.",
  lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Above 0, tokens are drawn; 0: the likeliest each time."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens only; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this probability only; 1: all.")
_REPETITION_PENALTY = flags.DEFINE_float(
  "repetition_penalty", 1.0, "Above 1, tokens that the answer has are less likely."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_MAX_TILES = flags.DEFINE_integer(
  "max_tiles", None, "Tiles of each image at most; as in training if unset.", lower_bound=1
)
_FRAMES = flags.DEFINE_integer(
  "frames", None, "Frames of each video; what training takes at most if unset.", lower_bound=1
)
_COMPRESS = flags.DEFINE_string(
  "compress",
  "auto",
  "Tiles that an InternVL3.5-Flash compresses: auto (by its config.json), all, none, or its two thresholds (0.3,0.5).",
)
_BF16 = flags.DEFINE_bool("bf16", False, "Compute in bfloat16.")
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "Devices that share the weights, heads and the key-value cache.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Answers."""
  del argv
  cli.set_up_logging()
  check_flags()
  from internvl_jax import compiler
  from internvl_jax.answering.model import How, Model
  from internvl_jax.inference import open_for_inference

  settings: dict[str, Any] = {name: flags.FLAGS[name].value for name in _SETTINGS}
  settings = {name: value for name, value in settings.items() if value is not None}
  how = How.of(settings)  # pyright: ignore[reportArgumentType]
  compiler.open_cache(compiler.AUTO)
  model = Model(open_for_inference(_MODEL.value, bf16=_BF16.value, devices=_DEVICES.value))
  if _INPUTS.value is not None and _OUTPUT.value is not None:
    answer_file(model, how, Path(_INPUTS.value), Path(_OUTPUT.value))
  elif _QUESTION.value is None:
    converse(model, settings)
  else:
    asked = {"images": _IMAGE.value, "videos": _VIDEO.value, "system": _SYSTEM.value}
    print(model.answer(_QUESTION.value, **asked, **settings))


_SETTINGS = (
  *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"),
  *("max_tiles", "frames", "compress"),
)
"""Flags that are settings of answers by the same names."""


def check_flags() -> None:
  """Refuses flags that do not go together, and images that cannot be, before anything is read.

  Raises:
    UserError: with what is wrong.
  """
  ways = {"--question": _QUESTION.value is not None, "--chat": _CHAT.value, "--inputs": bool(_INPUTS.value)}
  if sum(ways.values()) != 1:
    given = " and ".join(name for name, there in ways.items() if there) or "none"
    raise UserError(f"one of {', '.join(ways)} is needed, there is {given}")
  if bool(_INPUTS.value) != bool(_OUTPUT.value):
    raise UserError("--inputs and --output go together: the file of questions, and the one of answers")
  if _INPUTS.value and not os.path.isfile(_INPUTS.value):
    raise UserError(f"--inputs={_INPUTS.value}: no such file")
  if _OUTPUT.value and remote.scheme(_OUTPUT.value):
    raise UserError(f"--output={_OUTPUT.value}: answers are added to a file of this machine only; name one")
  if _INPUTS.value and (_IMAGE.value or _VIDEO.value or _SYSTEM.value):
    raise UserError("--image, --video and --system have no effect with --inputs; lines have their own")
  for image in _IMAGE.value:
    if os.path.isdir(image):
      raise UserError(f"--image={image}: is a folder; name an image in it")


def answer_file(model: Any, how: Any, inputs: Path, output: Path) -> None:
  """Answers the lines of --inputs."""
  from internvl_jax.answering.lines import AnswerFile

  signals.set_last_line(signals.GOES_ON)
  file = AnswerFile(
    inputs=inputs,
    output=output,
    root=_ROOT.value,
    batch_size=_BATCH_SIZE.value,
    strict=_STRICT.value,
  )
  answered, failed = file.run(model, how)
  logging.info("Answered %d questions", answered)
  if failed:
    logging.warning("%d lines could not be asked; %s says why", failed, _OUTPUT.value)


def converse(model: Any, settings: dict[str, Any]) -> None:
  """Answers what is typed, or piped in."""
  from internvl_jax.answering.terminal import talk, typed_lines

  signals.set_last_line("Stopped")
  shown = [f"/image {path}" for path in _IMAGE.value] + [f"/video {path}" for path in _VIDEO.value]
  talk(model.chat(system=_SYSTEM.value, **settings), itertools.chain(iter(shown), typed_lines()), sys.stdout)


if __name__ == "__main__":
  cli.run_app(main)
