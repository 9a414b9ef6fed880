"""Records what TRL's GRPOTrainer makes of fixed log-probabilities and rewards: advantages, losses and gradients.

  python scripts/record_policy_losses.py

It needs torch and trl (recorded with the version that the recording names). The trainer is TRL's own, with a model of a
few thousand weights that nothing depends on: log-probabilities and rewards are handed to it in place of the model's and
the functions'. `tests/losses/test_policy.py` compares with the recording, `tests/assets/policy_losses.json`, without
torch.
"""

import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

OUT = Path(__file__).parents[1] / "tests" / "assets" / "policy_losses.json"

ANSWERS, TOKENS, LONGEST = 4, 5, 7
MICRO_BATCHES = 2
LENGTHS = ((5, 3, 1, 4), (2, 5, 0, 3))  # 0: an answer that was cut and is masked.
GROUPS, GENERATIONS = 4, 4


def cases() -> list[dict[str, Any]]:
  """What is recorded: each loss at both levels against old answers and a reference; then what is special."""
  found = [
    {
      "loss_type": kind,
      "level": level,
      "beta": beta,
      "epsilon": 0.2,
      "epsilon_high": 1.1 if kind == "cispo" else 0.28,
      "old": True,
    }
    for kind, level, beta in itertools.product(
      ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), ("token", "sequence"), (0.0, 0.04)
    )
  ]
  found += [
    {**case, "level": level, "old": False}
    for case in (found[0], found[12])
    for level in ("token", "sequence")
  ]
  return found


def inputs() -> dict[str, np.ndarray]:
  """Log-probabilities [A, N, T] and advantages [A, N]; ratios go far beyond what is clipped."""
  rng = np.random.default_rng(0)
  shape = (MICRO_BATCHES, ANSWERS, TOKENS)
  policy = -rng.exponential(1.0, shape)
  return {
    "policy": policy.astype(np.float32),
    "old": (policy + rng.normal(0, 0.25, shape) + rng.normal(0, 0.4, (*shape[:2], 1))).astype(np.float32),
    "reference": (policy + rng.normal(0, 0.5, shape)).astype(np.float32),
    "advantages": rng.normal(0, 1, shape[:2]).astype(np.float32),
  }


def trainer(folder: str, reward: Callable[..., list[Any]], **settings: Any) -> GRPOTrainer:
  """TRL's trainer with a tiny language model."""
  words = {word: i for i, word in enumerate(("<pad>", "<eos>", "what", "is", "it", "red", "blue"))}
  plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
  plain.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
  config = Qwen2Config(
    vocab_size=len(words),
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    eos_token_id=1,
    pad_token_id=0,
  )
  torch.manual_seed(0)
  # The trainer reads the generation settings of a model's folder.
  Qwen2ForCausalLM(config).save_pretrained(folder)
  args = GRPOConfig(
    output_dir=folder,
    use_cpu=True,
    bf16=False,
    report_to=[],
    per_device_train_batch_size=ANSWERS,
    num_generations=GENERATIONS,
    max_completion_length=LONGEST,
    gradient_accumulation_steps=MICRO_BATCHES,
    **settings,
  )
  rows = Dataset.from_list([{"prompt": "what is it"}] * GROUPS)
  return GRPOTrainer(
    model=Qwen2ForCausalLM.from_pretrained(folder),
    reward_funcs=reward,
    args=args,
    train_dataset=rows,
    processing_class=tokenizer,
  )


def _no_reward(completions: list[str], **fields: Any) -> list[float]:
  del fields
  return [0.0] * len(completions)


def loss_of(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """Loss, gradients with respect to log-probabilities, and metrics, over all micro-batches."""
  with tempfile.TemporaryDirectory() as folder:
    own = trainer(
      folder,
      _no_reward,
      loss_type=case["loss_type"],
      importance_sampling_level=case["level"],
      beta=case["beta"],
      epsilon=case["epsilon"],
      epsilon_high=case["epsilon_high"],
    )
  own.current_gradient_accumulation_steps = MICRO_BATCHES
  mask = torch.tensor([[[int(t < n) for t in range(TOKENS)] for n in row] for row in LENGTHS])
  total, grads = 0.0, []
  for a in range(MICRO_BATCHES):
    logps = torch.tensor(arrays["policy"][a], requires_grad=True)
    own._get_per_token_logps_and_entropies = lambda *_, _logps=logps, **__: (
      _logps,
      torch.zeros_like(_logps),
      None,
    )
    batch = {
      "prompt_ids": torch.zeros(ANSWERS, 1, dtype=torch.long),
      "prompt_mask": torch.ones(ANSWERS, 1, dtype=torch.long),
      "completion_ids": torch.zeros(ANSWERS, TOKENS, dtype=torch.long),
      "completion_mask": mask[a],
      "advantages": torch.tensor(arrays["advantages"][a]),
      "ref_per_token_logps": torch.tensor(arrays["reference"][a]),
      "num_items_in_batch": mask.sum(),
    }
    if case["old"]:
      batch["old_per_token_logps"] = torch.tensor(arrays["old"][a])
    own.model.train()
    loss = own.compute_loss(own.model, batch)
    loss.backward()
    total += loss.item()
    grads.append(logps.grad.tolist())
  metrics = {name: values for name, values in own._metrics["train"].items() if "clip" in name or name == "kl"}
  return {**case, "loss": total, "gradient": grads, "metrics": metrics}


def advantages_of(scale: str, rewards: np.ndarray) -> list[list[float]]:
  """TRL's advantages of rewards [N, G], NaN where there is none."""
  flat = [None if np.isnan(value) else float(value) for value in rewards.reshape(-1)]
  with tempfile.TemporaryDirectory() as folder:
    own = trainer(folder, lambda completions, **fields: flat, scale_rewards=scale)
    own.model.train()
    found = own._generate_and_score_completions([{"prompt": "what is it"}] * len(flat))
  return found["advantages"].reshape(rewards.shape).tolist()


def main() -> None:
  """Records, and prints the losses."""
  arrays = inputs()
  rewards = np.array(
    [[1, 0, 0, 1], [1, 1, 1, 1], [0.25, 0.5, np.nan, 2], [np.nan, -1, np.nan, np.nan]], np.float32
  )
  recording = {
    "trl": importlib.metadata.version("trl"),
    "lengths": LENGTHS,
    "longest": LONGEST,
    **{name: values.tolist() for name, values in arrays.items()},
    "rewards": [[None if np.isnan(value) else float(value) for value in row] for row in rewards],
    "scaled": {scale: advantages_of(scale, rewards) for scale in ("group", "batch", "none")},
    "cases": [loss_of(case, arrays) for case in cases()],
  }
  OUT.write_text(json.dumps(recording) + "\n")
  for case in recording["cases"]:
    print(case["loss_type"], case["level"], case["beta"], f"{case['loss']:.6f}", case["metrics"])


if __name__ == "__main__":
  main()
