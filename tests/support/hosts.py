"""Runs of several real processes on one machine, with the smallest model that has all parts."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from internvl_jax.config import TrainConfig
from tests.support import forked
from tests.support.toy import CURVE, REPOSITORY

RECIPE = """
import importlib, json, os, time
from tests.support.hosts import tiny_config
from internvl_jax.trainer import CompiledSteps

step, seconds = CompiledSteps.__call__, float(os.environ.get("STEP_SECONDS", 0))

def slow(self, *args):
  time.sleep(seconds)
  return step(self, *args)

CompiledSteps.__call__ = slow
for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
  module, _, constant = name.rpartition(".")
  setattr(importlib.import_module(f"internvl_jax.{module}"), constant, value)

if "HEADERS" in os.environ:  # A folder, where each process counts what it reads of images to measure them.
  from internvl_jax.data.sample import images
  from internvl_jax.data.source import sizes

  opened, measure = images._opened, sizes.MeasureLines.__call__
  counted = os.path.join(os.environ["HEADERS"], os.environ.get("RANK", "0"))
  sizes.BLOCK, os.cpu_count = 4, lambda: 1

  def counting(source, where, *, header):
    with open(counted, "a") as out:
      out.write(".")
    return opened(source, where, header=header)

  def measuring(self, lines):
    images._opened = counting
    try:
      return measure(self, lines)
    finally:
      images._opened = opened

  sizes.MeasureLines.__call__ = measuring

def get_config(folder):
  return tiny_config(folder)
"""

SAMPLES = 30


# Layers that the world's model has not, and the sizes of axes that are smaller in it.
_LEFT_OUT = re.compile(r"vision_model.*layers\.[1-9]|language_model.*layers\.[2-9]")
_SMALLER = {True: {48: 16, 96: 32, 144: 48}, False: {32: 16, 64: 32, 128: 64, 192: 64}}


def _cut(name: str, value: np.ndarray) -> np.ndarray:
  """The beginnings of a tensor's axes, as long as those of the world's model."""
  sizes = _SMALLER[name.startswith("vision_model")]
  return np.ascontiguousarray(value[tuple(slice(sizes.get(size, size)) for size in value.shape)])


def make_world(folder: Path) -> Path:
  """Writes a model, data and a recipe; returns the folder."""
  model = folder / "model"
  model.mkdir(parents=True)
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    shutil.copyfile(CURVE / "init" / name, model / name)
  config = json.loads((CURVE / "init/config.json").read_text())
  config["vision_config"] |= {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
  config["llm_config"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
  (model / "config.json").write_text(json.dumps(config))
  weights = load_file(CURVE / "init/model.safetensors")
  save_file(
    {name: _cut(name, value) for name, value in weights.items() if not _LEFT_OUT.search(name)},
    model / "model.safetensors",
  )
  lines = [_line(i) for i in range(SAMPLES)]
  (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  meta = {"shapes": {"root": str(CURVE / "data"), "annotation": "data.jsonl", "length": SAMPLES}}
  (folder / "meta.json").write_text(json.dumps(meta))
  (folder / "recipe.py").write_text(RECIPE)
  return folder


def _line(i: int) -> dict:
  words = ("circle", "square", "triangle")
  question = f"<image>\nwhat is {words[i % 3]}?" if i % 4 else "what is blue?"
  turns = [("system", "."), ("human", question), ("gpt", words[i % 2] * (1 + i % 3))]
  line = {"id": i, "conversations": [{"from": who, "value": text} for who, text in turns]}
  return line if i % 4 == 0 else {**line, "image": f"images/{i % 10}.png"}


def tiny_config(folder: str) -> TrainConfig:
  """The settings of all runs in a world."""
  config = TrainConfig()
  config.model.model_name_or_path = f"{folder}/model"
  config.data.meta_path = f"{folder}/meta.json"
  config.data.conv_style = "internvl2_5"
  config.data.force_image_size = 56
  config.data.max_seq_length = 64
  config.loader.sequence_buckets = (64,)
  config.loader.tile_buckets = (1,)
  config.loader.cache_dir = f"{folder}/sizes"
  config.training.output_dir = f"{folder}/out"
  config.training.per_device_train_batch_size = 1
  config.training.max_steps = 12
  config.training.learning_rate = 1e-3
  config.training.logging_steps = 1
  config.training.disable_tqdm = True
  config.training.save_strategy = "no"
  config.mesh.data = config.mesh.fsdp = 2
  return config


class Job:
  """The processes of one run, each with its log."""

  def __init__(
    self,
    world: Path,
    *overrides: str,
    out: str = "out",
    processes: int = 1,
    devices: int = 4,
    step_seconds: float = 0.0,
    launcher: str | None = None,
    arguments: tuple[str, ...] = (),
    only: dict[int, tuple[str, ...]] | None = None,
    folders: tuple[Path, ...] = (),
    constants: dict[str, float] | None = None,
    fresh: bool = False,
  ):
    """Starts them.

    Args:
      world: from `make_world`.
      overrides: of the config, "leaf.field=value".
      out: name of the output directory in the world.
      processes: how many.
      devices: CPU devices of all together.
      step_seconds: how much longer each step takes, so that something can happen in the middle of it.
      launcher: the script in scripts/launch that starts a process, if not Python does.
      arguments: the script's own.
      only: overrides of single processes, by their number.
      folders: working directory of each process, where they see other files under one path.
      constants: other values of the package's constants, by "module.NAME".
      fresh: start Python anew, as a user does, in place of a fork that has imported the package.
    """
    self.world, self.out = world, world / out
    settings = [f"--config={world}/recipe.py:{world}"]
    settings += [f"--config.{override}" for override in (f"training.output_dir={self.out}", *overrides)]
    self.logs = [world / f"{out}-{time.time_ns()}-{i}.log" for i in range(processes)]
    self.processes: list[forked.Forked | subprocess.Popen[bytes]] = []
    port = free_port()
    for i, log in enumerate(self.logs):
      environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "STEP_SECONDS": str(step_seconds),
        "CONSTANTS": json.dumps(constants or {}),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
      }
      if processes > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": i, "WORLD_SIZE": processes}
        environment |= {name: str(value) for name, value in place.items()}
      with log.open("w") as stderr:
        mine = [f"--config.{override}" for override in (only or {}).get(i, ())]
        folder = folders[i] if folders else None
        run = ["-m", "internvl_jax.train", *settings, *mine]
        if launcher is None and not fresh:
          started = forked.start(run, environment=environment, stderr=stderr.fileno(), folder=folder)
        else:
          command = [sys.executable, *run]
          if launcher is not None:
            command = ["bash", f"{REPOSITORY}/scripts/launch/{launcher}", *arguments, *settings, *mine]
          started = subprocess.Popen(command, env=environment, stderr=stderr, cwd=folder)
        self.processes.append(started)

  def wait(self, seconds: float = 300) -> list[int]:
    """The exit codes, once all have ended; no process is left behind."""
    end = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
    finally:
      self.kill()

  def kill(self) -> None:
    for process in self.processes:
      if process.poll() is None:
        process.kill()
        process.wait()

  def log(self, i: int = 0) -> str:
    return self.logs[i].read_text(errors="replace")

  def wait_for(self, text: str, i: int = 0, seconds: float = 240) -> None:
    """Returns once a process has logged the text."""
    end = time.monotonic() + seconds
    while text not in self.log(i):
      if self.processes[i].poll() is not None or time.monotonic() > end:
        self.kill()
        raise AssertionError(f"never logged {text!r}:\n{self.log(i)}")
      time.sleep(0.02)


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def history(out: Path) -> list[dict]:
  """The log of a run, what depends on the clock left out."""
  log = json.loads((out / "trainer_state.json").read_text())["log_history"]
  return [{key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for entry in log]


def assert_same_curve(ours: list[dict], theirs: list[dict], *, atol: float) -> None:
  assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
  for key in ("loss", "grad_norm", "learning_rate"):
    np.testing.assert_allclose(
      [entry[key] for entry in ours], [entry[key] for entry in theirs], atol=atol, rtol=0, err_msg=key
    )
