"""The output directory over the time of a run: one run holds it, and begins there once nothing speaks against it."""

import contextlib
from collections.abc import Iterator

from internvl_jax import lease, signals
from internvl_jax.config import TrainConfig, to_json
from internvl_jax.errors import UserError
from internvl_jax.outputs import LEASE_FILE, Beginning, begin_run, check_output_dir
from internvl_jax.parallel import distributed
from internvl_jax.storage.paths import AnyPath, path_of
from internvl_jax.tasks.settings import of_tasks
from internvl_jax.watchdog import Watchdog


def output_folder(config: TrainConfig) -> AnyPath:
  """The run's directory, which `validate` has made sure is named."""
  assert config.training.output_dir is not None
  return path_of(config.training.output_dir)


@contextlib.contextmanager
def output_dir_held(config: TrainConfig, watchdog: Watchdog) -> Iterator[Beginning]:
  """Keeps other runs out of the output directory; how this one begins there. Nothing in it is changed.

  The first process does; the others wait for it.

  Raises:
    UserError: another run writes to the directory, it must not be written to, or not all hosts see it.
  """
  folder, name = output_folder(config), f"training.output_dir={config.training.output_dir!r}"
  with contextlib.ExitStack() as stack:
    beginning: Beginning = "new"
    if distributed.is_first():
      place = lease.place_in(folder)
      stack.enter_context(signals.cleaned_up(place.release))
      stack.enter_context(lease.held(place, name))
      beginning = check_output_dir(config.training, _files_of_tasks())
    with watchdog.phase("barrier"):
      distributed.barrier("the output directory is prepared", seconds=distributed.JOIN_SECONDS)
    if not (folder / LEASE_FILE).exists():
      raise UserError(
        f"{name}: {distributed.host_name()} does not see what process 0 wrote there; name a bucket (gs://, s3://), or a "
        "folder of a file system that all hosts share"
      )
    yield beginning


def begin_output(config: TrainConfig, beginning: Beginning) -> None:
  """Clears the directory for a new run where the config allows it, and writes its configuration."""
  if distributed.is_first() and beginning != "resume":
    begin_run(output_folder(config), beginning, to_json(config), of_tasks=_files_of_tasks())
  distributed.barrier("the output directory is begun", seconds=distributed.JOIN_SECONDS)


def _files_of_tasks() -> list[str]:
  return [file for own in of_tasks() for file in own.files]
