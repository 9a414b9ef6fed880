"""The recorded run that whole-program tests train: a tiny Qwen2 InternVL on 24 small images."""

import json
import os
import subprocess
import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

ASSETS = Path(__file__).parent / "assets"
CURVE = ASSETS / "curve"
REPOSITORY = Path(__file__).parent.parent

RECIPE = """
from toy import curve_config

def get_config(arg):
  return curve_config(arg)
"""


def curve_config(output_dir: str | Path) -> TrainConfig:
  """The settings of tests/assets/curve/expected.json."""
  recorded = json.loads((CURVE / "expected.json").read_text())["config"]
  config = TrainConfig()
  config.model.model_name_or_path = str(CURVE / "init")
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


def train_command(folder: Path, output_dir: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
  """The command line and environment that train the toy on one CPU device."""
  recipe = folder / "recipe.py"
  recipe.write_text(RECIPE)
  command = [sys.executable, "-m", "internvl_jax.train", f"--config={recipe}:{output_dir}"]
  command += [f"--config.{override}" for override in overrides]
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]),
  }
  return command, environment


def run_training(folder: Path, output_dir: Path, *overrides: str) -> subprocess.CompletedProcess:
  """Trains the toy in a process of its own."""
  command, environment = train_command(folder, output_dir, *overrides)
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def log_history(output_dir: Path) -> list[dict]:
  """The entries of trainer_state.json."""
  return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
