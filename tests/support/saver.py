"""A program that does nothing but save, for tests that interrupt it: python saver.py FOLDER MEGABYTES [LIMIT_AFTER].

The state of step n holds noise, which does not compress, scaled by n: a mixture of two steps would be seen. After the checkpoint of
step LIMIT_AFTER no file may grow as large as a checkpoint's, as on a disk that is full.
"""

import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax import cli
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.state import TrainState
from tests.support.harness import on_one_device


def state_of(step: int, megabytes: int) -> TrainState:
  noise = np.random.default_rng(0).random((megabytes, 2**18), np.float32)
  params = {"a.kernel": jnp.asarray(noise)}
  state = TrainState.create(params, optax.scale_by_adam(), on_one_device(params))
  # Three arrays: the parameters and two moments.
  return jax.tree.map(lambda leaf: jnp.asarray(noise * step) if leaf.ndim else leaf + step, state)


def main(argv: list[str]) -> None:
  folder, megabytes, limit_after = argv[1], int(argv[2]), int((*argv, 0)[3])
  checkpointer = Checkpointer(folder, keep=2)
  step = checkpointer.latest_step or 0
  if step:
    state, loader, _ = checkpointer.restore(state_of(0, megabytes))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step, megabytes))
    assert loader == {"next_step": step}
  print(f"restored {step}", flush=True)
  while True:
    step += 1
    checkpointer.check()
    checkpointer.save(state_of(step, megabytes), loader={"next_step": step}, trainer={})
    if limit_after and step == limit_after:
      checkpointer.wait()
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
    time.sleep(0.01)


if __name__ == "__main__":
  cli.set_up_logging()
  try:
    main(sys.argv)
  except Exception as error:
    cli.report(error)
    sys.exit(1)
