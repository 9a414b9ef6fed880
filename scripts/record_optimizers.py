"""Records what other implementations of the optimizers compute, for `tests/optim/test_recorded.py`.

  python scripts/record_optimizers.py

It needs torch from 2.9 on (torch.optim.Muon), transformers and bitsandbytes, of which only the maps are recorded: its optimizer does
not run on CPUs. Everything is of float32. Gradients are those of `gradients`, which the test calls as well.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.toy import ASSETS

FILE = ASSETS / "optimizers.npz"

RATE, DECAY = 0.02, 0.1
"""The learning rate and the weight decay of all recordings."""

STEPS = 3

MUON, ADAFACTOR = (2, 12, 20), (2, 128, 130)
"""Shapes of the parameters: layers, rows, columns."""

EVERY = 16
"""Of Adafactor's matrices, which it factors from 128 rows on here, every so many rows and columns are kept."""


def gradients(shape: tuple[int, ...], steps: int) -> list[np.ndarray]:
  """Gradients float32 of several steps, whose sizes differ by a factor of up to e^6; those of the first layer grow by steps."""
  rng = np.random.default_rng(7)
  sizes = np.exp(rng.uniform(-6, 0, shape))
  found = []
  for step in range(steps):
    grad = rng.normal(size=shape) * sizes
    grad[0] *= 4.0**step
    found.append(grad.astype(np.float32))
  return found


def start(shape: tuple[int, ...]) -> np.ndarray:
  """The parameters before the first step."""
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def by_torch(make: Callable[[list], Any], shape: tuple[int, ...], steps: int) -> np.ndarray:
  """Parameters [steps, layers, ...] after each step of an optimizer of PyTorch's kind, each layer's a parameter by itself."""
  import torch

  weights = [torch.nn.Parameter(torch.tensor(layer)) for layer in start(shape)]
  optimizer, found = make(weights), []
  for grad in gradients(shape, steps):
    for weight, layer in zip(weights, grad, strict=True):
      weight.grad = torch.tensor(layer)
    optimizer.step()
    found.append(np.stack([weight.detach().numpy() for weight in weights]))
  return np.stack(found)


def muon(*, nesterov: bool, in_float32: bool) -> np.ndarray:
  """Of torch.optim.Muon, with updates of AdamW's size; it orthogonalizes in bfloat16 unless told otherwise."""
  import torch

  def make(params: list) -> Any:
    return torch.optim.Muon(
      params, lr=RATE, weight_decay=DECAY, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )

  numbers = (
    mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
    if in_float32
    else contextlib.nullcontext()
  )
  with numbers:
    return by_torch(make, MUON, STEPS)


def adafactor(shape: tuple[int, ...]) -> np.ndarray:
  """Of transformers' Adafactor, with the arguments that its Trainer gives."""
  from transformers.optimization import Adafactor

  def make(params: list) -> Any:
    return Adafactor(params, lr=RATE, weight_decay=DECAY, scale_parameter=False, relative_step=False)

  return by_torch(make, shape, STEPS)


def maps() -> dict[str, np.ndarray]:
  """The numbers [256] that bitsandbytes' codes stand for: of means, which have a sign, and of squares."""
  from bitsandbytes import functional

  return {f"map_{kind}": functional.create_dynamic_map(signed=kind == "mu").numpy() for kind in ("mu", "nu")}


def main() -> None:
  """Records all of them."""
  arrays = {
    f"muon{'_nesterov' if nesterov else ''}{'_float32' if in_float32 else ''}": muon(
      nesterov=nesterov, in_float32=in_float32
    )
    for nesterov in (False, True)
    for in_float32 in (False, True)
  }
  arrays |= {"adafactor": adafactor(ADAFACTOR)[..., ::EVERY, ::EVERY], "adafactor_vector": adafactor((2, 40))}
  arrays |= maps()
  np.savez_compressed(FILE, **arrays)
  print(f"{FILE}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


if __name__ == "__main__":
  main()
