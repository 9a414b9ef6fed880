"""PyTorch's side of `benchmarks/decoding.py`: decoding_torch.py FOLDER ROWS TOKENS REPEATS, or FOLDER --make SIZE."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from decoding_timing import time_answers
from step_torch import SIZES, Size, make
from transformers import InternVLForConditionalGeneration

ROWS = 8

LOUDER = 4.0
"""What weights are multiplied by: as they are drawn, each answer would be one token over and over."""


def make_prompts(folder: Path, size: Size) -> None:
  """Writes a model with random weights and prompts that begin with pictures."""
  make(folder, dataclasses.replace(size, rows=ROWS, tokens=size.tokens * 3 // 4))
  model = InternVLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "language_model" in name and weight.ndim == 2:
        weight.mul_(LOUDER)
  model.save_pretrained(folder / "model")


def main(folder: Path, rows: int, tokens: int, repeats: int) -> None:
  """Answers prompts by transformers' `generate`, and prints times and tokens."""
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  model = InternVLForConditionalGeneration.from_pretrained(
    folder / "model", dtype=torch.float32, attn_implementation="sdpa"
  ).eval()
  batch = np.load(folder / "batch.npz")
  ids = torch.tensor(batch["ids"][:rows]).long()
  pixels = torch.tensor(batch["pixels"][: rows * len(batch["pixels"]) // len(batch["ids"])])
  inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

  def answer(new: int) -> list[list[int]]:
    with torch.inference_mode():
      found = model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
      )
    return found[:, ids.shape[1] :].tolist()

  time_answers(answer, tokens, repeats)


if __name__ == "__main__":
  if sys.argv[2] == "--make":
    make_prompts(Path(sys.argv[1]), SIZES[sys.argv[3]])
  else:
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
