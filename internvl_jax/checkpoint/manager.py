"""Orbax's classes, as far as they do not do what is needed here."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax import digests
from internvl_jax.storage.paths import is_bucket

Spare = Callable[[Collection[int]], int | None]
"""Which one of these steps is kept beside the newest ones."""


class Manager(ocp.CheckpointManager):
  """Orbax's, without its own look at preemption notices.

  It would ask JAX in between the trainer's questions, and from another thread with the number of an older step;
  the hosts might then agree to stop at a step that has passed.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False

  def forget(self, steps: set[int]) -> None:
    """Leaves checkpoints where they are, as if they were not there.

    Orbax saves no step before its latest one, and counts it among those that are kept.
    """
    self._checkpoints.delete_if(lambda info: info.step in steps)


class StateHandler(ocp.StandardCheckpointHandler):
  """Orbax's, which also computes digests of the numbers that this process writes."""

  async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
    futures = await super().async_save(directory, *args, **kwargs)
    return [*(futures or []), _Digests(directory)]


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.StandardSave):
  """Orbax's, for `StateHandler`."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class StateRestore(ocp.args.StandardRestore):
  """Orbax's, for `StateHandler`."""


class _Digests:
  """What Orbax's thread waits for after the numbers are written; it writes their digests then."""

  def __init__(self, directory: Any):
    """Takes Orbax's folder of the state, which may not be made yet."""
    self._directory = directory

  def result(self, timeout: float | None = None) -> None:
    """Reads what this process has written, which is still in memory, and no file that Orbax may write again."""
    del timeout
    place = getattr(self._directory, "path", self._directory)
    if is_bucket(str(place)):
      return  # The store computes them.
    folder = Path(place)
    process = f"process_{jax.process_index()}"
    mine = [file.relative_to(folder).as_posix() for file in (folder / f"ocdbt.{process}" / "d").glob("*")]
    digests.write(folder, digests.of_files(folder, mine, sync=True), f"digests-{process}.txt")

  def cancel(self) -> None:
    """Nothing runs before it is waited for."""


@dataclasses.dataclass(frozen=True)
class NewestAndOne:
  """A preservation policy of Orbax's: the newest checkpoints, and one more."""

  keep: int
  spare: Spare

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [info.step for info in checkpoints]
    kept = {*sorted(steps)[-self.keep :], self.spare(steps)}
    return [step in kept for step in steps]
