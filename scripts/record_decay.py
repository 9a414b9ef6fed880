"""Records a run of PyTorch's AdamW on a tiny LLaMA InternVL, with a weight decay large enough to tell who decays.

  python scripts/record_decay.py

It needs torch. The model and its input are those of `tests/families.py`; the groups of the optimizer follow Hugging
Face's Trainer of transformers 4.49, which the installed release need not be. `tests/optim/test_decay.py` compares with the
recording, `tests/assets/decay_llama.json`, without torch.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.insert(0, str(Path(__file__).parent.parent))
from internvl_jax.batch import PIXEL_STATISTICS
from tests.support import families
from tests.support.toy import ASSETS

STEPS, RATE, DECAY = 16, 0.01, 0.5

# In transformers 4.49, `ALL_LAYERNORM_LAYERS` is PyTorch's LayerNorm and what modeling files add to it.
SPARED_CLASSES = (torch.nn.LayerNorm, LlamaRMSNorm)
SPARED_NAMES = ("bias", "layernorm", "rmsnorm")


def decayed(
  module: torch.nn.Module, classes: tuple[type, ...], prefix: str = ""
) -> Iterator[torch.nn.Parameter]:
  """The parameters outside of the classes whose names hold none of SPARED_NAMES."""
  if isinstance(module, classes):
    return
  for name, parameter in module.named_parameters(recurse=False):
    if not any(word in f"{prefix}{name}".lower() for word in SPARED_NAMES):
      yield parameter
  for name, child in module.named_children():
    yield from decayed(child, classes, f"{prefix}{name}.")


def losses(folder: Path, classes: tuple[type, ...]) -> list[float]:
  """The loss of every step."""
  model = open_model(folder)
  chosen = list(decayed(model, classes))
  rest = [p for p in model.parameters() if all(p is not other for other in chosen)]
  groups = [{"params": chosen, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=RATE)
  arrays = families.inputs()
  batch = {name: torch.tensor(arrays[name]) for name in ("input_ids", "attention_mask", "labels")}
  mean, std = (torch.tensor(values) for values in PIXEL_STATISTICS["imagenet"])
  pixels = (torch.tensor(families.tiles()) / 255 - mean) / std
  batch["pixel_values"] = pixels.permute(0, 3, 1, 2)
  found = []
  for _ in range(STEPS):
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    found.append(loss.item())
  return found


def decayed_keys(folder: Path) -> list[str]:
  """The decayed tensors under the checkpoint's keys."""
  model = open_model(folder)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.zero_()
    for parameter in decayed(model, SPARED_CLASSES):
      parameter.fill_(1.0)
  with tempfile.TemporaryDirectory() as target:
    model.save_pretrained(target)
    tensors = load_file(Path(target) / "model.safetensors")
  return sorted(key for key, tensor in tensors.items() if tensor.any())


def open_model(folder: Path) -> InternVLForConditionalGeneration:
  """The model in float32, without dropout."""
  return InternVLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()


def main() -> None:
  """Records, and prints how far the curve is from that of a rule that goes by names alone."""
  with tempfile.TemporaryDirectory() as root:
    folder = families.write_checkpoint("llama", Path(root) / "llama")
    right, wrong = (losses(folder, classes) for classes in (SPARED_CLASSES, (torch.nn.LayerNorm,)))
    keys = decayed_keys(folder)
  recording = {
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "loss": right,
    "loss_by_names_alone": wrong,
    "decayed": keys,
  }
  (ASSETS / "decay_llama.json").write_text(json.dumps(recording, indent=1) + "\n")
  print(
    f"loss {right[0]:.4f} to {right[-1]:.4f}; {max(abs(a - b) for a, b in zip(right, wrong, strict=True)):.4f} off by names alone"
  )


if __name__ == "__main__":
  main()
