"""PyTorch's side of `benchmarks/step.py`: python benchmarks/step_torch.py FOLDER STEPS, or FOLDER --make SIZE."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from step_ours import IMAGE_TOKEN
from step_timing import time_steps
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Sizes of the model and of its batch; a tile is of side x side pixels."""

  rows: int = 2
  tokens: int = 512
  tiles: int = 4
  side: int = 224
  vision_width: int = 384
  vision_heads: int = 6
  text_width: int = 512
  text_heads: int = 8
  layers: int = 8

  @property
  def tokens_per_tile(self) -> int:
    return (self.side // 28) ** 2


SIZES = {
  "small": Size(),
  "toy": Size(
    tokens=64, tiles=2, side=56, vision_width=32, vision_heads=2, text_width=32, text_heads=4, layers=1
  ),
}


def make(folder: Path, size: Size) -> None:
  """Writes a model with random weights, 54M parameters of "small", and a batch."""
  torch.manual_seed(0)
  vision = InternVLVisionConfig(
    hidden_size=size.vision_width,
    num_hidden_layers=size.layers,
    num_attention_heads=size.vision_heads,
    intermediate_size=4 * size.vision_width,
    image_size=[size.side, size.side],
    patch_size=[14, 14],
    attention_bias=True,
    use_qk_norm=False,
    layer_scale_init_value=0.1,
    drop_path_rate=0.0,
  )
  text = Qwen2Config(
    hidden_size=size.text_width,
    num_hidden_layers=size.layers,
    num_attention_heads=size.text_heads,
    num_key_value_heads=size.text_heads // 4,
    intermediate_size=4 * size.text_width,
    vocab_size=8192,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
  )
  config = InternVLConfig(
    vision_config=vision,
    text_config=text,
    image_token_id=IMAGE_TOKEN,
    downsample_ratio=0.5,
    tie_word_embeddings=False,
  )
  InternVLForConditionalGeneration(config).save_pretrained(folder / "model")
  np.savez(folder / "batch.npz", **make_batch(size))


def make_batch(size: Size) -> dict[str, np.ndarray]:
  """Rows that begin with images, of whose other tokens all but the first 20 are learned."""
  rng = np.random.default_rng(0)
  images = size.tiles * size.tokens_per_tile
  ids = rng.integers(10, 7900, (size.rows, size.tokens))
  ids[:, 4 : 4 + images] = IMAGE_TOKEN
  labels = np.where(np.arange(size.tokens)[None] >= 24 + images, ids, -100)
  tiles = rng.integers(0, 256, (size.rows * size.tiles, size.side, size.side, 3)).astype(np.uint8)
  mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  pixels = ((tiles / 255.0 - mean) / deviation).astype(np.float32).transpose(0, 3, 1, 2)
  return {"ids": ids, "labels": labels, "tiles": tiles, "pixels": np.ascontiguousarray(pixels)}


def main(folder: Path, steps: int) -> None:
  """Takes steps and prints their times."""
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  model = InternVLForConditionalGeneration.from_pretrained(
    folder / "model", dtype=torch.float32, attn_implementation="sdpa"
  ).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
  batch = np.load(folder / "batch.npz")
  ids, labels = (torch.tensor(batch[name]).long() for name in ("ids", "labels"))
  pixels = torch.tensor(batch["pixels"])

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = model(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      pixel_values=pixels,
      labels=labels,
      use_cache=False,
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  time_steps(step, steps)


if __name__ == "__main__":
  if sys.argv[2] == "--make":
    make(Path(sys.argv[1]), SIZES[sys.argv[3]])
  else:
    main(Path(sys.argv[1]), int(sys.argv[2]))
