"""Writes a tiny InternVL in both layouts, and questions with our answers, to try a server with.

  python scripts/server_toy.py toy
  vllm serve toy/hf --dtype float32 --max-model-len 2048
  python scripts/ask_server.py --url http://127.0.0.1:8000/v1 --questions toy/questions.jsonl

Weights are random, so an answer is nonsense, and one wrong number changes it; heads have 64 channels, for which servers have
kernels. docs/serving.md has what came of it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from internvl_jax.conversion import convert
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import Typed
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.hf import saving
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.inference import Inference, open_for_inference
from tests.support import families, served

MAX_NEW_TOKENS = 24
STOP_TOKEN = "<|im_end|>"

PICTURES = {"wide": (200, 90), "tall": (50, 170), "small": (20, 20), "tiny": (18, 20), "large": (400, 300)}
"""Name -> (width, height). Small ones are one tile, also of several in a question."""

QUESTIONS = (
  ("<image>\nWhat shape is here?", ("wide",)),
  ("<image>\nWhat shape is here?", ("tall",)),
  ("<image>\nDescribe the picture.", ("large",)),
  ("What is on the mat?", ("small",)),
  ("Image-1: <image>\nImage-2: <image>\nWhich one is red?", ("small", "tiny")),
  ("What is 3 + 4?\n\n  中文 naïve", ()),
  ("Who are you?", ()),
)
"""(question, names of pictures)."""


def write_model(folder: Path) -> None:
  """Writes the model in the layouts `internvl` and `hf`, to folders of these names."""
  start = served.tokenizer_folder(folder / "start")
  config = families.config_of("qwen2")
  tokenizer = load_tokenizer(start)
  config["text_config"] |= {
    "vocab_size": len(tokenizer),
    "hidden_size": 256,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
  }
  config["vision_config"] |= {"hidden_size": 128, "intermediate_size": 256}
  families.write_config(start, config)
  shapes = families.tensor_shapes(open_source(start, with_weights=False))
  stop = tokenizer.convert_tokens_to_ids(STOP_TOKEN)
  saving.save(start, ((key, tensor(key, shape, stop)) for key, shape in shapes.items()))
  convert(str(start), folder / "internvl", INTERNVL, lora="merge")
  statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
  served.edit(folder / "internvl/config.json", template="internvl2_5", max_dynamic_patch=6)
  served.edit(folder / "internvl/preprocessor_config.json", **statistics)
  convert(str(folder / "internvl"), folder / "hf", HF, lora="merge")
  shutil.rmtree(start)


def tensor(key: str, shape: tuple[int, ...], stop: int) -> np.ndarray:
  """Random numbers that the key fixes; logits are far apart, and some answers end early."""
  is_table = "embed_tokens" in key or "lm_head" in key
  values = families.draw(key, shape) * np.float32(0.2 if is_table else 0.08)
  if "lm_head" in key:
    values[stop] *= np.float32(1.7)
  is_scale = len(shape) == 1 and key.endswith(".weight")  # of a norm
  return values + 1 if is_scale else values


def write_pictures(folder: Path) -> None:
  """Writes smooth pictures of random colors."""
  folder.mkdir()
  for name, (width, height) in PICTURES.items():
    small = families.draw(name, (4, 4, 3)) * 60 + 128
    image = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image.save(folder / f"{name}.png")


def write_questions(folder: Path) -> None:
  """Asks the model in the layout `hf`, and writes questions.jsonl."""
  opened = open_for_inference(folder / "hf", bf16=False)
  prompts, lines = [], []
  for number, (question, names) in enumerate(QUESTIONS):
    pictures = [f"pictures/{name}.png" for name in names]
    prompts.append(prompt_of(opened, question, [str((folder / picture).resolve()) for picture in pictures]))
    lines.append({"id": str(number), "question": question, "pictures": pictures})
  decoder = GreedyDecoder(
    model=opened.source.model,
    how=opened.how,
    normalize_type=opened.data.normalize_type,
    image_token_id=opened.tokenizer.image_token_id,
    stop_ids=opened.stop_ids,
    max_new_tokens=MAX_NEW_TOKENS,
    batch_size=len(prompts),
  )
  for line, prompt, ids in zip(lines, prompts, decoder(opened.params, prompts), strict=True):
    line["answer"] = opened.tokenizer.decode_answer(ids)
    line["answer_ids"] = ids.tolist()
    line["prompt_tokens"] = len(prompt.input_ids)
  text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def prompt_of(opened: Inference, question: str, pictures: list[str]) -> Prompt:
  """A question with its pictures, as training reads it."""
  maker = SampleMaker(
    spec=DatasetSpec(name="questions", root="", annotation="questions.jsonl"),
    data=opened.data,
    tokenizer=opened.tokenizer,
    tokens_per_tile=opened.source.config.tokens_per_tile,
    limits=Limits(opened.data.max_seq_length, policy="error"),
  )
  turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "?"}]
  record = {"conversations": turns} | ({"image": pictures} if pictures else {})
  sample = maker.make(record, Typed("question", "questions.jsonl", 1, "image"))
  return Prompt(prompt_ids(sample), sample.tiles)


def main(argv: list[str] | None = None) -> None:
  """Writes everything to a new folder."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("folder", type=Path, help="A folder that is not there yet.")
  folder = parser.parse_args(argv).folder
  folder.mkdir(parents=True)
  write_model(folder)
  write_pictures(folder / "pictures")
  write_questions(folder)


if __name__ == "__main__":
  main()
