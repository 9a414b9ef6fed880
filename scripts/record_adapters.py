"""Records what PEFT computes with the adapters of `tests/support/adapters.py`.

  python scripts/record_adapters.py

It needs torch and peft. Tests compare with the recordings, `tests/assets/adapters/*.npz`, without them.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import InternVLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
from internvl_jax.hf.peft import save_adapter
from tests.support import adapters, families


def record(base: Path, folder: Path) -> dict[str, np.ndarray]:
  """Logits, loss and norms of the gradients of an adapter on its base model, by PEFT's names."""
  whole = InternVLForConditionalGeneration.from_pretrained(
    base, dtype=torch.float32, attn_implementation="eager"
  )
  model = peft.PeftModel.from_pretrained(whole, str(folder), is_trainable=True)
  names = ("input_ids", "pixel_values", "attention_mask", "labels")
  arrays = families.inputs()
  out = model.eval()(**{name: torch.tensor(arrays[name]) for name in names})
  out.loss.backward()
  norms = {
    name.replace(".default.weight", "").replace(".default", ""): float(parameter.grad.double().norm())
    for name, parameter in model.named_parameters()
    if "lora_" in name
  }
  return {
    "logits": out.logits.detach().numpy()[:, ::4],
    "loss": out.loss.detach().numpy(),
    "names": np.array(list(norms)),
    "norms": np.array(list(norms.values())),
  }


def main() -> None:
  for kind in adapters.KINDS:
    path = adapters.recording(kind)
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
      base = families.write_checkpoint(adapters.BASE, Path(folder) / "base")
      source, params = adapters.open_adapted(base, kind)
      adapter = Path(folder) / "adapter"
      adapter.mkdir()
      save_adapter(adapter, params, source.specs, source.layout, source.table, base=str(base))
      recording = record(base, adapter)
    np.savez_compressed(path, allow_pickle=False, **recording)
    print(f"{path.name}: {path.stat().st_size} bytes, loss {recording['loss']:.6f}")


if __name__ == "__main__":
  main()
