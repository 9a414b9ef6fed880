"""Resumable checkpoints, by Orbax: sharded, asynchronous, complete or not there at all.

A checkpoint holds what the run changes: trainable parameters, optimizer moments, the loader's state and the
log. Frozen weights are read again from where they came from. All processes of a run save and restore together,
each what its devices hold.
"""

import contextlib
import copy
import dataclasses
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax.errors import UserError
from internvl_jax.outputs import CHECKPOINTS
from internvl_jax.state import TrainState

# What file systems say, through C++ libraries that know no errno, when they cannot take any more.
_DISK_ERRORS = re.compile(
  r"no space left|disk quota|file too large|read-only file system|input/output error", re.I
)


class _Manager(ocp.CheckpointManager):
  """Orbax's, without its own look at preemption notices.

  It would ask JAX in between the trainer's questions, and from another thread with the number of an older step;
  the hosts might then agree to stop at a step that has passed.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


Spare = Callable[[Collection[int]], int | None]
"""Which one of these steps is kept beside the newest ones."""


@dataclasses.dataclass(frozen=True)
class _NewestAndOne:
  """A preservation policy of Orbax's: the newest checkpoints, and one more."""

  keep: int
  spare: Spare

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [info.step for info in checkpoints]
    kept = {*sorted(steps)[-self.keep :], self.spare(steps)}
    return [step in kept for step in steps]


class Checkpointer:
  """Saves and restores a run under `output_dir/checkpoints/<step>`."""

  def __init__(self, output_dir: str | Path, *, keep: int | None, spare: Spare | None = None):
    """Opens (and makes) the folder.

    Args:
      output_dir: the run's directory.
      keep: how many of the newest checkpoints stay; None keeps all.
      spare: names one more that stays; asked whenever older ones are deleted.
    """
    several = jax.process_count() > 1
    self.folder = Path(output_dir).absolute() / CHECKPOINTS
    self.folder.mkdir(parents=True, exist_ok=True)
    everyone = set(range(jax.process_count())) if several else None
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if spare else keep,
      preservation_policy=_NewestAndOne(keep, spare) if spare and keep else None,
      enable_async_checkpointing=True,
      # What a killed run left half-written takes room, and is never read.
      cleanup_tmp_directories=True,
      create=False,
      # Hosts may see a shared folder's newest entries at different times; one of them looks for all.
      single_host_load_and_broadcast=several,
      # Naming the processes makes Orbax wait for them by messages, with a time limit. Otherwise it runs programs on
      # the devices for that, also from its own thread, where they get in between the steps' collectives.
      multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everyone),
    )
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "loader": ocp.JsonCheckpointHandler(),
      "trainer": ocp.JsonCheckpointHandler(),
    }
    self._manager = _Manager(self.folder, options=options, item_handlers=handlers)

  @property
  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """Steps of all complete checkpoints."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, loader: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Starts writing the state after its step; returns once everything is copied that the next step may change.

    A checkpoint of that step that is there already is left as it is. Older ones that are too many are deleted once
    this one is complete.

    Args:
      state: the train state.
      loader: the loader's state, as JSON values.
      trainer: the trainer's log, as JSON values.

    Raises:
      UserError: this checkpoint or the one before could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = {
      "state": ocp.args.StandardSave(_as_tree(state)),
      # Orbax copies arrays at once, but reads JSON values when its thread comes to write them: the log would by then
      # have the entries of later steps, which a run that goes on would write a second time.
      "loader": ocp.args.JsonSave(copy.deepcopy(loader)),
      "trainer": ocp.args.JsonSave(copy.deepcopy(trainer)),
    }
    with self._explained():
      self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(
    self, like: TrainState, *, step: int | None = None
  ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """Reads a complete checkpoint onto the devices.

    Args:
      like: shapes of a train state, and where its arrays go: `TrainState.describe`.
      step: which one; None: the newest.

    Returns:
      The train state, the loader's state and the trainer's log.

    Raises:
      UserError: the checkpoint holds other parameters than this run trains.
    """
    step = self.latest_step if step is None else step
    assert step is not None
    path = self.folder / str(step)
    self._check_same_parameters(step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        loader=ocp.args.JsonRestore(),
        trainer=ocp.args.JsonRestore(),
      ),
    )
    tree = restored["state"]
    opt_state = _from_tree(tree["opt_state"], like.opt_state)
    state = TrainState(tree["step"], tree["params"], opt_state, tree.get("running", {}))
    if int(state.step) != step:
      raise UserError(f"{path}: holds step {int(state.step)}, expected {step}; remove that folder")
    return state, restored["loader"], restored["trainer"]

  def _check_same_parameters(self, step: int, like: TrainState) -> None:
    metadata = self._manager.item_metadata(step)["state"]
    if sorted(metadata.get("running", {})) != sorted(like.running):
      raise UserError(
        f"{self.folder / str(step)}: was made by another objective (preference.loss_type) than this config's; use the "
        "settings it was made with, another output_dir, or overwrite_output_dir=True"
      )
    saved = metadata["params"]
    found = {path: tuple(leaf.shape) for path, leaf in saved.items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in like.params.items()}
    if found == wanted:
      return
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    raise UserError(
      f"{self.folder / str(step)}: trains other parameters than this config ({len(differing)} differ, first: "
      f"{differing[0]} is {found.get(differing[0])} there, {wanted.get(differing[0])} here); use the settings it was "
      "made with, another output_dir, or overwrite_output_dir=True"
    )

  def check(self) -> None:
    """Raises the error of a checkpoint that is being written, as soon as there is one; waits for nothing.

    Raises:
      UserError: it could not be written.
    """
    with self._explained():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Returns once everything is on disk.

    Raises:
      UserError: it could not be written.
    """
    with self._explained():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Turns a full disk, reported in many ways, into a line."""
    try:
      yield
    except Exception as error:
      found = _DISK_ERRORS.search(str(error))
      if found is None:
        raise
      free = shutil.disk_usage(self.folder).free / 2**30
      newest = max(
        (int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal()), default=None
      )
      stands = (
        "no checkpoint is complete" if newest is None else f"that of step {newest} is complete and kept"
      )
      raise UserError(
        f"{self.folder}: the checkpoint could not be written ({found[0].lower()}; {free:.1f} GiB are free); {stands}. "
        "Make room, or lower training.save_total_limit, and start the same command again"
      ) from error

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
  # The optimizer's tuples become a list of leaves, so that a checkpoint does not depend on optax's classes.
  tree = {"step": state.step, "params": state.params, "opt_state": dict(_leaves(state.opt_state))}
  return {**tree, "running": state.running} if state.running else tree


def _leaves(opt_state: Any) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
  return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in flat]


def _from_tree(saved: dict[str, Any], like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name, _ in _leaves(like)])
