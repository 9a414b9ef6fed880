"""Records what bitsandbytes makes of a few matrices: NF4 with double quantization, and int8.

  python scripts/record_bitsandbytes.py

It needs torch and bitsandbytes, as PEFT uses them for `load_in_4bit` and `load_in_8bit`.
`tests/models/test_weight_formats.py` compares with the recording, `tests/assets/bitsandbytes.npz`, without them.
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.toy import ASSETS

SHAPES = ((96, 192), (40, 128))
"""Widths out and in: their scales are one full group of 256 and a part of one, and a part of one."""


def matrices() -> list[torch.Tensor]:
  """Weights in bfloat16: normal, with an outlier, a block of zeros, a row that is small and one in no order of size."""
  torch.manual_seed(0)
  found = [torch.randn(shape) * 0.02 for shape in SHAPES]
  found[0][3, 7], found[0][5, 64:128], found[0][9] = 1.5, 0, found[0][9] * 1e-3
  found[1][2] = torch.linspace(-0.1, 0.1, 128)
  return [weight.bfloat16() for weight in found]


def record() -> dict[str, np.ndarray]:
  """Arrays by name: the weights, what they are stored as, and what that stands for."""
  found = {"nf4_values": bnb.get_4bit_type("nf4", device="cpu").numpy()}
  found["dynamic_map"] = bnb.create_dynamic_map().numpy()
  for i, weight in enumerate(matrices()):
    codes, state = bnb.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True, blocksize=64)
    eight, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    found |= {
      f"weight_{i}": weight.float().numpy(),
      f"codes_{i}": codes.numpy().reshape(-1),
      f"scales_{i}": state.absmax.numpy(),
      f"scale_scales_{i}": state.state2.absmax.numpy(),
      f"scale_offset_{i}": state.offset.numpy(),
      f"restored_{i}": bnb.dequantize_4bit(codes, state).numpy(),
      f"int8_{i}": eight.numpy(),
      f"int8_scales_{i}": scales.numpy(),
      f"int8_restored_{i}": bnb.int8_vectorwise_dequant(eight, scales).numpy(),
    }
  return found


def main() -> None:
  """Writes the recording."""
  np.savez_compressed(ASSETS / "bitsandbytes.npz", **record())


if __name__ == "__main__":
  main()
