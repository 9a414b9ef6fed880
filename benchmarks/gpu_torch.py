"""PyTorch's training step on the same row: transformers' InternVL, for `gpu.py`, which starts it.

  python benchmarks/gpu_torch.py FOLDER

FOLDER has config.json (transformers'), rows.npz and job.json. Prints a line of JSON for each way to train, at once.

What is alike: weights drawn at random, float32 master weights and bfloat16 by autocast (as transformers' Trainer with
bf16=True), AdamW (fused) with decay 0, gradients clipped to norm 1, layers recomputed where ours are, one optimizer step for
one row's samples. What is not: pixels are normalised before the clock starts, and pools have no tiles to spare.

  unpacked  as its users run it: samples in batches of `samples`, padded to the longest, gradients summed over batches.
  packed    the samples of the row behind each other, kept apart by their positions: by varlen flash attention where
            flash_attn is installed, else by SDPA with a mask.
"""

import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
  """Measures every way that this machine has."""
  folder = Path(sys.argv[1])
  job = json.loads((folder / "job.json").read_text())
  for row in measured(folder, job):
    print(json.dumps(row), flush=True)


def measured(folder: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """A row for each way to train."""
  if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
    yield {"way": "all", "skipped": f"{' and '.join(missing)} not installed"}
    return
  import torch

  if not torch.cuda.is_available() and not job["toy"]:
    yield {"way": "all", "skipped": f"torch {torch.__version__} has no CUDA here"}
    return
  samples = split(dict(np.load(folder / "rows.npz")))
  flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
  if not flash:
    yield {"way": "packed, flash_attention_2", "skipped": "flash_attn is not installed"}
  packed = "flash_attention_2" if flash else "sdpa"
  for way, attention, batches in (
    ("unpacked", "sdpa", unpacked(samples, job["samples"])),
    ("packed", packed, [packed_row(samples)]),
  ):
    name = f"{way}, {attention}"
    try:
      yield {"way": name, **run(folder, job, attention, batches)}
    except (RuntimeError, ValueError, ImportError) as error:  # Out of memory is a RuntimeError.
      yield {"way": name, "refused": (str(error).splitlines() or ["no word"])[0][:200]}


# --- The row's samples --------------------------------------------------------------------------------------


def split(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  """The samples of a packed row, with labels where transformers expects them: at their own tokens."""
  segments = rows["segment_ids"]
  labels = np.concatenate([[IGNORE], rows["targets"][:-1]])
  found, used = [], 0
  for segment in range(1, segments.max() + 1):
    here = segments == segment
    images = int((rows["image_index"][here] >= 0).sum()) // int(rows["per_tile"])
    own = labels[here].copy()
    own[0] = IGNORE
    found.append(
      {"input_ids": rows["input_ids"][here], "labels": own, "tiles": rows["tiles"][used : used + images]}
    )
    used += images
  return found


def unpacked(samples: list[dict[str, np.ndarray]], size: int) -> list[dict[str, np.ndarray]]:
  """Batches of so many samples, padded to their longest on the right."""
  return [padded(samples[start : start + size]) for start in range(0, len(samples), size)]


def padded(samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """One batch of samples."""
  longest = max(len(sample["input_ids"]) for sample in samples)

  def fill(name: str, value: int) -> np.ndarray:
    return np.stack(
      [np.pad(s[name], (0, longest - len(s[name])), constant_values=value) for s in samples]
    ).astype(np.int64)

  lengths = np.array([len(sample["input_ids"]) for sample in samples])
  return {
    "input_ids": fill("input_ids", 0),
    "labels": fill("labels", IGNORE),
    "attention_mask": (np.arange(longest) < lengths[:, None]).astype(np.int64),
    "tiles": np.concatenate([sample["tiles"] for sample in samples]),
  }


def packed_row(samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """One row of all samples, whose positions begin again at each."""
  row = {name: np.concatenate([s[name] for s in samples]) for name in ("input_ids", "labels", "tiles")}
  positions = np.concatenate([np.arange(len(sample["input_ids"])) for sample in samples])
  return {
    "input_ids": row["input_ids"][None].astype(np.int64),
    "labels": row["labels"][None].astype(np.int64),
    "position_ids": positions[None],
    "tiles": row["tiles"],
  }


# --- The step -----------------------------------------------------------------------------------------------


def run(
  folder: Path, job: dict[str, Any], attention: str, batches: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
  """Builds the model, takes steps and times them."""
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  if device == "cuda":
    # What a way that did not fit has left.
    torch.cuda.empty_cache()
  model = build(folder, job, attention, device)
  # Most parameters' updates in one kernel.
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
  inputs = [on_device(batch, device) for batch in batches]
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  losses, seconds = [], []
  for steps in (2, *[1 if job["toy"] else 3] * job["repeats"]):
    start = time.perf_counter()
    for _ in range(steps):
      loss = step(model, optimizer, inputs, device)
    losses.append(float(loss))
    seconds.append((time.perf_counter() - start) / steps)
  median = statistics.median(seconds[1:])
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
  del model, optimizer, inputs
  if device == "cuda":
    torch.cuda.empty_cache()
  return {
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "weights": "float32, autocast to bfloat16",
    "ms": 1e3 * median,
    "ms_least": 1e3 * min(seconds[1:]),
    "ms_most": 1e3 * max(seconds[1:]),
    "computed_tokens": sum(int(batch["input_ids"].size) for batch in batches),
    "peak_bytes": peak,
    "first_loss": losses[0],
    "last_loss": losses[-1],
  }


def build(folder: Path, job: dict[str, Any], attention: str, device: str) -> Any:
  """The model of config.json with weights drawn at random, in float32, ready to train."""
  import torch
  from transformers import AutoModelForImageTextToText, InternVLConfig

  config = InternVLConfig(**json.loads((folder / "config.json").read_text()))
  with torch.device(device):
    model = AutoModelForImageTextToText.from_config(
      config, attn_implementation=attention, dtype=torch.float32
    )
  if job["remat"]:
    model.gradient_checkpointing_enable()
  return model.train()


def on_device(batch: dict[str, np.ndarray], device: str) -> dict[str, Any]:
  """A batch as transformers takes it, its pixels normalised."""
  import torch

  tensors = {name: torch.as_tensor(value, device=device) for name, value in batch.items() if name != "tiles"}
  if len(batch["tiles"]):
    tiles = torch.as_tensor(batch["tiles"], device=device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    tensors["pixel_values"] = (tiles - mean) / std
  return tensors


def step(model: Any, optimizer: Any, inputs: list[dict[str, Any]], device: str) -> Any:
  """One optimizer step over all batches; returns the mean of their losses."""
  import torch

  total = 0.0
  for batch in inputs:
    with torch.autocast(device, dtype=torch.bfloat16):
      loss = model(**batch, use_cache=False).loss / len(inputs)
    loss.backward()
    total = total + loss.detach()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return total


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt):
    main()
