"""The recorded runs that whole-program tests train: tiny InternVLs on 24 small images."""

import json
import os
import subprocess
import sys
from pathlib import Path

from internvl_jax.config import TrainConfig
from tests.support import forked
from tests.support.forked import REPOSITORY

ASSETS = Path(__file__).parents[1] / "assets"
CURVE = ASSETS / "curve"  # Qwen2
CURVE_INTERNLM2 = ASSETS / "curve_internlm2"  # InternLM2, two micro-batches a step, on the same data

RECIPE = """
from tests.support.toy import ASSETS, curve_config

def get_config(arg):
  output_dir, _, curve = arg.partition(",")
  return curve_config(output_dir, ASSETS / (curve or "curve"))
"""


def curve_config(output_dir: str | Path, curve: Path = CURVE) -> TrainConfig:
  """The settings of a curve's expected.json."""
  recorded = json.loads((curve / "expected.json").read_text())["config"]
  config = TrainConfig()
  config.model.model_name_or_path = str(curve / "init")
  config.data.meta_path = str(CURVE / "data/meta.json")
  config.data.conv_style = recorded["conv_style"]
  config.data.force_image_size = recorded["force_image_size"]
  config.data.max_seq_length = recorded["max_seq_length"]
  config.data.max_dynamic_patch = recorded["max_dynamic_patch"]
  config.data.dynamic_image_size = True
  config.data.use_thumbnail = True
  config.loader.shuffle = False
  config.training.output_dir = str(output_dir)
  config.training.per_device_train_batch_size = recorded["batch"]
  config.training.gradient_accumulation_steps = recorded["gradient_accumulation_steps"]
  config.training.max_steps = recorded["steps"]
  config.training.learning_rate = recorded["learning_rate"]
  config.training.weight_decay = recorded["weight_decay"]
  config.training.warmup_ratio = recorded["warmup_ratio"]
  config.training.lr_scheduler_type = recorded["lr_scheduler_type"]
  config.training.logging_steps = 1
  return config


def train_command(
  folder: Path, output_dir: Path, *overrides: str, curve: Path = CURVE, devices: int = 1
) -> tuple[list[str], dict[str, str]]:
  """Python's arguments and the environment that train a curve's model on so many CPU devices."""
  recipe = folder / "recipe.py"
  recipe.write_text(RECIPE)
  arguments = ["-m", "internvl_jax.train", f"--config={recipe}:{output_dir},{curve.name}"]
  arguments += [f"--config.{override}" for override in overrides]
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "PYTHONPATH": str(REPOSITORY),
  }
  return arguments, environment


def run_training(
  folder: Path, output_dir: Path, *overrides: str, curve: Path = CURVE, devices: int = 1, fresh: bool = False
) -> subprocess.CompletedProcess:
  """Trains a curve's model in a process of its own: a forked one, or a fresh one that also imports what it needs."""
  arguments, environment = train_command(folder, output_dir, *overrides, curve=curve, devices=devices)
  if not fresh:
    return forked.run(arguments, environment=environment, folder=folder)
  command = [sys.executable, *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def log_history(output_dir: Path) -> list[dict]:
  """The entries of trainer_state.json."""
  return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
