"""Starts PyTorch on the row of `gpu_steps`, in a process that has the card for itself."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import gpu_steps
from gpu_results import Results
from internvl_jax.batch import count
from internvl_jax.errors import UserError
from internvl_jax.hf.model_config import HF, written_config

SCRIPT = Path(__file__).with_name("gpu_torch.py")

SAMPLES = 4
"""Samples of a batch of unpacked training: what most of InternVL's scripts give a device (PER_DEVICE_BATCH_SIZE)."""


def measure(
  results: Results, unit: str, case: gpu_steps.Case, *, remat: str = "full", toy: bool = False
) -> None:
  """Adds what `gpu_torch.py` measures, a row for each way to train, as soon as it is there.

  Raises:
    UserError: the script failed.
  """
  ready = gpu_steps.prepare(case, remat=remat, pool=None)
  counts = count(ready.batch)
  known = {
    "case": case.name,
    "checkpointing": remat != "none",
    "tokens": int(counts.tokens),
    "useful_tflop": ready.flops / 1e12,
  }
  with tempfile.TemporaryDirectory(prefix="internvl_jax_bench_") as folder:
    write_job(Path(folder), case, ready, {"toy": toy, "remat": remat != "none", "samples": SAMPLES})
    with subprocess.Popen(
      [sys.executable, str(SCRIPT), folder], stdout=subprocess.PIPE, text=True
    ) as process:
      assert process.stdout is not None
      for line in process.stdout:
        row = json.loads(line)
        if "ms" in row:
          row["tokens_per_second"] = 1e3 * known["tokens"] / row["ms"]
        results.add(unit, **known, **row)
  if process.returncode:
    raise UserError(f"{SCRIPT.name} ended with status {process.returncode}; its last words are above")


def write_job(folder: Path, case: gpu_steps.Case, ready: gpu_steps.Ready, job: dict[str, Any]) -> None:
  """Writes the row, the model's config and what is to be done, as the script reads them."""
  source, rows = ready.setup.source, ready.batch
  config = written_config(source.raw, source.config, HF, dtype="float32", image_token_id=case.image_token)
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "job.json").write_text(json.dumps({**job, "repeats": 2 if job["toy"] else 5}))
  fields = ("input_ids", "targets", "segment_ids", "image_index")
  arrays = {name: getattr(rows, name)[0, 0] for name in fields}
  np.savez(folder / "rows.npz", **arrays, tiles=rows.tiles[0, 0], per_tile=source.config.tokens_per_tile)
