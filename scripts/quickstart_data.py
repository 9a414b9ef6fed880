"""Writes the quickstart's inputs: easy-VQA in the training format, a tokenizer and a model's config.

  python scripts/quickstart_data.py --out quickstart

makes
  quickstart/data/meta.json             the mixture, one dataset for each type of question
  quickstart/data/train/<type>.jsonl    a question about an image a line
  quickstart/data/test.jsonl            the held-out questions, about images that are in no training file
  quickstart/data/images/...            the images
  quickstart/preferences/meta.json      pairs of a right and a wrong answer, and held_out.json of held-out ones: what
                                        configs/quickstart_mpo.py goes on with
  quickstart/init/                      config.json and tokenizer of a small InternVL, without weights
  quickstart/student/                   the same of one of half its size: what configs/quickstart_distill.py trains

The images and questions are those of the PyPI package easy-vqa (Zhou, 2019): 64 x 64 pixels, a shape in a
colour, 13 possible answers. `--holdout N` scores on N training images, taken out of training, in place of the
test images: that is how the recipe's settings were chosen.
"""

import collections
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
import numpy as np
from absl import app, flags
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from internvl_jax.hf.tokenizer import IMAGE_TOKENS

_OUT = flags.DEFINE_string("out", "quickstart", "Folder to write to.")
_HOLDOUT = flags.DEFINE_integer("holdout", 0, "Score on so many training images instead of the test images.")

_PAIRS, _HELD_OUT_PAIRS = 8000, 2000

COLORS = ("red", "blue", "green", "yellow", "black", "gray", "brown", "teal")
SHAPES = ("circle", "rectangle", "triangle")
SYSTEM = "answer"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS)

# How often a training question is seen in an epoch, by type (repeat_time). Shapes are learned last, and a
# question that names one teaches more than a yes or no.
REPEAT = {"color": 1, "shape": 4, "yes_no_color": 1, "yes_no_shape": 1}

VISION = {
  "architectures": ["InternVisionModel"],
  "model_type": "intern_vit_6b",
  "hidden_size": 64,
  "intermediate_size": 256,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "patch_size": 8,
  "image_size": 64,
  "num_channels": 3,
  "norm_type": "layer_norm",
  "hidden_act": "gelu",
  "qkv_bias": True,
  "qk_normalization": False,
  "layer_norm_eps": 1e-6,
  "initializer_factor": 1.0,
  "drop_path_rate": 0.0,
  "attention_dropout": 0.0,
  "dropout": 0.0,
}

LANGUAGE = {
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_size": 64,
  "intermediate_size": 192,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "hidden_act": "silu",
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "attention_dropout": 0.0,
  "use_sliding_window": False,
  "tie_word_embeddings": False,
}

# The student of configs/quickstart_distill.py: about half the parameters.
SMALLER_VISION = {"hidden_size": 48, "intermediate_size": 144}
SMALLER_LANGUAGE = {"hidden_size": 48, "intermediate_size": 96}


class Question(NamedTuple):
  """A question about an image, and its answer."""

  image: int
  text: str
  answer: str

  @property
  def type(self) -> str:
    """What must be seen to answer: color, shape, yes_no_color or yes_no_shape."""
    if self.answer in COLORS:
      return "color"
    if self.answer in SHAPES:
      return "shape"
    return "yes_no_color" if any(color in self.text for color in COLORS) else "yes_no_shape"


def main(argv: Sequence[str]) -> None:
  """Writes everything below --out."""
  del argv
  out = Path(_OUT.value)
  train = [Question(i, q, a) for q, a, i in zip(*easy_vqa.get_train_questions(), strict=True)]
  test = [Question(i, q, a) for q, a, i in zip(*easy_vqa.get_test_questions(), strict=True)]
  paths = {"train": easy_vqa.get_train_image_paths(), "test": easy_vqa.get_test_image_paths()}
  scored = "test"
  if _HOLDOUT.value:
    held = set(np.random.default_rng(0).permutation(sorted(paths["train"]))[: _HOLDOUT.value].tolist())
    test = [question for question in train if question.image in held]
    train = [question for question in train if question.image not in held]
    scored = "train"
  write_data(out / "data", train, test, scored)
  copy_images(out / "data" / "images", paths)
  write_preferences(out / "preferences", train, test, scored)
  write_model(out / "init", train, VISION, LANGUAGE)
  write_model(out / "student", train, VISION | SMALLER_VISION, LANGUAGE | SMALLER_LANGUAGE)
  print(
    f"{len(train)} training and {len(test)} held-out questions are in {out}/data, the model's config in {out}/init"
  )


def write_data(folder: Path, train: Sequence[Question], test: Sequence[Question], scored: str) -> None:
  """Writes meta.json, a jsonl for each type of question, and test.jsonl."""
  by_type: dict[str, list[Question]] = collections.defaultdict(list)
  for question in train:
    by_type[question.type].append(question)
  meta = {}
  for name, questions in sorted(by_type.items()):
    write_jsonl(folder / "train" / f"{name}.jsonl", (to_line(question, "train") for question in questions))
    meta[name] = {
      "root": "images",
      "annotation": f"train/{name}.jsonl",
      "data_augment": False,
      "repeat_time": REPEAT[name],
      "length": len(questions),
    }
  write_jsonl(folder / "test.jsonl", (to_line(question, scored) for question in test))
  (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def to_line(question: Question, split: str) -> dict[str, Any]:
  """A line of a jsonl in the reference's format."""
  return {
    "id": f"{split}-{question.image}",
    "image": f"{split}/{question.image}.png",
    "width": 64,
    "height": 64,
    "type": question.type,
    "conversations": [
      {"from": "system", "value": SYSTEM},
      {"from": "human", "value": f"<image>\n{question.text}"},
      {"from": "gpt", "value": question.answer},
    ],
  }


def write_preferences(folder: Path, train: Sequence[Question], test: Sequence[Question], scored: str) -> None:
  """Writes pairs about training images, and about those that are scored."""
  for name, questions, split, count in (
    ("meta", train, "train", _PAIRS),
    ("held_out", test, scored, _HELD_OUT_PAIRS),
  ):
    lines = list(to_pairs(questions, split, count))
    write_jsonl(folder / f"{name}.jsonl", lines)
    meta = {
      "root": "../data/images",
      "annotation": f"{name}.jsonl",
      "data_augment": False,
      "repeat_time": 1,
      "length": len(lines),
    }
    (folder / f"{name}.json").write_text(json.dumps({"easy_vqa": meta}, indent=2) + "\n")


def to_pairs(questions: Sequence[Question], split: str, count: int) -> Iterator[dict[str, Any]]:
  """Lines of so many of the questions, with a wrong answer of the same kind: another colour or shape, yes for no."""
  rng = np.random.default_rng(0)
  for index in rng.permutation(len(questions))[:count]:
    question = questions[index]
    kind = next(answers for answers in (COLORS, SHAPES, ("yes", "no")) if question.answer in answers)
    yield {
      "image": f"{split}/{question.image}.png",
      "width": 64,
      "height": 64,
      "system": SYSTEM,
      "question": question.text,
      "chosen": question.answer,
      "rejected": str(rng.choice([answer for answer in kind if answer != question.answer])),
    }


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
  """Writes one JSON object a line."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(line) + "\n" for line in lines)


def copy_images(folder: Path, paths: dict[str, dict[int, str]]) -> None:
  """Copies the package's images to folder/<split>/<number>.png."""
  for split, files in paths.items():
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, path in files.items():
      shutil.copyfile(path, folder / split / f"{number}.png")


def write_model(
  folder: Path, train: Sequence[Question], vision: Mapping[str, Any], language: Mapping[str, Any]
) -> None:
  """Writes a tokenizer of the words in the training questions, and the config of a model of these parts that uses it."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = build_tokenizer(train)
  tokenizer.save(str(folder / "tokenizer.json"))
  special = {token: tokenizer.token_to_id(token) for token in SPECIAL}
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": list(SPECIAL[1:]),
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
  }
  vocabulary = tokenizer.get_vocab_size()
  config = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "template": "internvl2_5",
    "downsample_ratio": 0.5,
    "force_image_size": 64,
    "ps_version": "v2",
    "select_layer": -1,
    "vision_config": dict(vision),
    "llm_config": {
      **language,
      "vocab_size": vocabulary,
      "bos_token_id": special["<|endoftext|>"],
      "eos_token_id": special["<|im_end|>"],
    },
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_tokenizer(train: Sequence[Question]) -> Tokenizer:
  """A word is a token; so is a line break, and each special token."""
  words = {"system", "user", "assistant", SYSTEM, "\n"}
  for question in train:
    words.update(re.findall(r"\w+|[^\w\s]", f"{question.text} {question.answer}"))
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *sorted(words)])}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  # Words, single signs and line breaks; other white space separates and is dropped.
  pieces = pre_tokenizers.Split(pattern=Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
  tokenizer.pre_tokenizer = pieces
  tokenizer.add_special_tokens(list(SPECIAL))
  return tokenizer


if __name__ == "__main__":
  app.run(main)
