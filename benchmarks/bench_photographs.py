"""Photographs with conversations to measure the data room with: parts of scikit-image's, of many sizes and shapes."""

import json
import pathlib

import numpy as np
from PIL import Image

NAMES = (
  *("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry"),
  "stereo_motorcycle",
)
WORDS = "the a red of cat on in street with two sign says left right above small photo shows person is"


def write(folder: pathlib.Path, count: int, megapixels: tuple[float, float], seed: int) -> None:
  """Writes photographs of many sizes and shapes, each with a conversation, and the meta file."""
  from skimage import data as photographs  # of the test extra

  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  loaded = [getattr(photographs, name)() for name in NAMES]
  sources = [Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels) for pixels in loaded]
  records = []
  for i in range(count):
    image = photograph(sources[i % len(sources)], np.exp(rng.uniform(*np.log(megapixels))), rng)
    image.save(folder / f"{i}.jpg", quality=int(rng.integers(90, 96)))
    turns = conversation(rng)
    records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
  (folder / "photographs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  meta = {"photographs": {"root": str(folder), "annotation": str(folder / "photographs.jsonl")}}
  (folder / "meta.json").write_text(json.dumps(meta))


def photograph(source: Image.Image, megapixels: float, rng: np.random.Generator) -> Image.Image:
  """A random part of a photograph, resized; with noise as a sensor's, so that its file is as long as a camera's."""
  aspect = float(np.exp(rng.uniform(-1, 1) * np.log(2.2)))
  width = min(source.width, source.height * aspect) * rng.uniform(0.6, 1)
  height = width / aspect
  left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
  size = round((megapixels * 1e6 * aspect) ** 0.5), round((megapixels * 1e6 / aspect) ** 0.5)
  part = source.convert("RGB").resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
  noise = rng.normal(0, 3, (size[1], size[0], 1)).round()
  return Image.fromarray(np.clip(np.asarray(part) + noise, 0, 255).astype(np.uint8))


def conversation(rng: np.random.Generator) -> list[dict[str, str]]:
  """One to three questions with answers of a few words up to a paragraph."""

  def text(low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS.split(), int(rng.integers(low, high)))).capitalize()

  turns = []
  for _ in range(int(rng.integers(1, 4))):
    turns.append({"from": "human", "value": f"{text(6, 20)}?"})
    turns.append({"from": "gpt", "value": f"{text(5, 120)}."})
  turns[0]["value"] = f"<image>\n{turns[0]['value']}"
  return turns
