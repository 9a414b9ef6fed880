"""Records what transformers' InternVL computes for every case of `tests/families.py`.

  python scripts/record_families.py [CASE ...]

It needs torch. Tests compare with the recordings, `tests/assets/families/*.npz`, without it.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import InternVLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support import families


def record(folder: Path) -> dict[str, np.ndarray]:
  """Logits, mean loss and norms of its gradient, by the checkpoint's keys, for the inputs of all cases."""
  model, info = InternVLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  problems = {name: found for name, found in info.items() if found}
  assert not problems, f"{folder}: transformers does not take the checkpoint as it is: {problems}"
  arrays = families.inputs()
  names = ("input_ids", "pixel_values", "attention_mask", "labels")
  out = model.eval()(**{name: torch.tensor(arrays[name]) for name in names})
  out.loss.backward()
  gradients = _gradients(model)
  return {
    "logits": out.logits.detach().numpy(),
    "loss": out.loss.detach().numpy(),
    "grad_norm": np.sqrt(sum(float(np.sum(grad**2)) for grad in gradients.values())),
    "names": np.array(list(gradients)),
    "norms": np.array([np.linalg.norm(grad) for grad in gradients.values()]),
  }


def _gradients(model: InternVLForConditionalGeneration) -> dict[str, np.ndarray]:
  """The gradients in float64, named and cut into tensors as transformers saves parameters."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.grad)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    with safe_open(Path(folder) / "model.safetensors", "np") as file:
      return {key: file.get_tensor(key).astype(np.float64) for key in sorted(file.keys())}


def main(cases: list[str]) -> None:
  """Records the cases named, or all."""
  families.RECORDINGS.mkdir(exist_ok=True)
  for case in cases or families.CASES:
    with tempfile.TemporaryDirectory() as folder:
      recording = record(families.write_checkpoint(case, Path(folder) / case))
    path = families.RECORDINGS / f"{case}.npz"
    np.savez_compressed(path, allow_pickle=False, **recording)
    print(f"{path.name}: {path.stat().st_size} bytes, loss {recording['loss']:.6f}")


if __name__ == "__main__":
  main(sys.argv[1:])
