"""Our side of `benchmarks/step.py`: python benchmarks/step_ours.py FOLDER STEPS."""

import sys
from pathlib import Path
from typing import Any

from step_timing import time_steps

from internvl_jax import environment

IMAGE_TOKEN = 8000
"""The token in whose places features are put, in `step_torch.make`'s batch."""


def micro_batch(folder: Path) -> Any:
  """The batch of `step_torch.make` as ours."""
  import numpy as np

  from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch

  data = np.load(folder / "batch.npz")
  ids, labels = data["ids"].astype(np.int32), data["labels"]
  targets, index = np.full_like(ids, IGNORE_INDEX), np.full_like(ids, NO_IMAGE)
  targets[:, :-1] = labels[:, 1:]
  is_image = ids == IMAGE_TOKEN
  index[is_image] = np.arange(is_image.sum())
  return TokenBatch(
    input_ids=ids,
    targets=targets,
    loss_weight=(targets != IGNORE_INDEX).astype(np.float32),
    positions=np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)),
    segment_ids=np.ones_like(ids),
    image_index=index,
    tiles=data["tiles"][None],
  )


def main(folder: Path, steps: int) -> None:
  """Takes steps as a run does, and prints their times."""
  import jax

  from internvl_jax.config import TrainConfig
  from internvl_jax.hf.model import open_source
  from internvl_jax.setup.devices import open_mesh, set_up_jax
  from internvl_jax.setup.step import set_up
  from internvl_jax.trainer import CompiledSteps

  config = TrainConfig()
  config.model.model_name_or_path = str(folder / "model")
  config.model.grad_checkpoint, config.model.use_liger = False, True
  config.training.bf16, config.training.weight_decay = False, 0.05
  set_up_jax(config)
  source = open_source(config.model.model_name_or_path)
  setup = set_up(config, source, open_mesh(config, jax.devices()[:1]))
  state = setup.create_state(source.load(setup.shapes, setup.places.params, seed=0, paths=None))
  steps_of = CompiledSteps(setup.step, setup.mesh)
  batch = jax.tree.map(lambda leaf: leaf[None], micro_batch(folder))

  def step() -> float:
    nonlocal state
    state, metrics = steps_of(state, {}, batch, 1e-4)
    return float(metrics.loss)

  time_steps(step, steps)


if __name__ == "__main__":
  environment.restart_with_huge_pages()  # As the command does.
  main(Path(sys.argv[1]), int(sys.argv[2]))
