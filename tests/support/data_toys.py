"""What the tests of the data room share: conversations, and a folder of images with a meta file."""

import json
import pathlib

import numpy as np
from PIL import Image

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.data.where import Where

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
WHERE = Where("toy", "toy.jsonl", 3)


def turns(question, *answers_and_questions):
  """Returns a conversation: human and gpt in turn."""
  roles = ("human", "gpt") * (1 + len(answers_and_questions))
  return [{"from": r, "value": v} for r, v in zip(roles, (question, *answers_and_questions), strict=False)]


def write_jsonl(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_dataset(folder, count=10, *, name="toy", **entry):
  """Writes a meta file, an annotation file and images of `count` samples; every third is text only."""
  rng = np.random.default_rng(len(name))
  records = []
  for i in range(count):
    question, answer = f"what is number {i}?", "red " * (1 + i % 4)
    if i % 3 == 2:
      records.append({"id": i, "conversations": turns(question, answer)})
      continue
    pixels = rng.integers(0, 256, (24 + 8 * (i % 2), 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    records.append(
      {"id": i, "image": f"{name}{i}.png", "conversations": turns(f"<image>\n{question}", answer)}
    )
  write_jsonl(folder / f"{name}.jsonl", records)
  meta = folder / "meta.json"
  entries = json.loads(meta.read_text()) if meta.exists() else {}
  entries[name] = {"root": "", "annotation": f"{name}.jsonl", **entry}
  meta.write_text(json.dumps(entries))
  return meta


def resumed(loader, state=None):
  """Returns a loader that goes on from a state, if there is one."""
  if state is not None:
    loader.set_state(state)
  return loader


def arguments(meta, **changes):
  """Returns settings for tiny tiles of 16 pixels; tokens a tile are 4 in these tests."""
  settings = {
    "meta_path": str(meta),
    "conv_style": "internvl2_5",
    "force_image_size": 16,
    "max_seq_length": 512,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 4,
  }
  return DataTrainingArguments(**settings | changes)
