"""Resumable checkpoints, by Orbax: sharded, asynchronous, complete or not there at all, checked before they are read.

A checkpoint holds what the run changes: trainable parameters, optimizer moments, the loader's state and the
log. Frozen weights are read again from where they came from. All processes of a run save and restore together,
each what its devices hold.

Before a checkpoint gets its name, digests of its files are put beside them: each process computes those of the numbers that
it wrote, the first one the rest, all of it in Orbax's threads, while training goes on; a bucket knows them by itself.
Before one is restored, each process compares a share of the files, and all of them choose the newest that is as it was
written.
"""

import contextlib
import copy
import itertools
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from internvl_jax import digests
from internvl_jax.checkpoint.folders import METADATA, class_of_folders, opened, settle
from internvl_jax.checkpoint.manager import (
  Manager,
  NewestAndOne,
  Spare,
  StateHandler,
  StateRestore,
  StateSave,
)
from internvl_jax.errors import UserError
from internvl_jax.outputs import CHECKPOINTS, checkpoint_steps, explained, is_complete, newest_checkpoint
from internvl_jax.parallel import distributed
from internvl_jax.state import TrainState
from internvl_jax.storage.paths import AnyPath, BucketPath, path_of

VERIFY_SECONDS = 3600
"""How long processes wait for the last one to read its share of a checkpoint: 1 TB over 64 hosts, from a slow disk."""

# An entry of Orbax's metadata: it shows that a missing file of digests was lost.
_MARK = {"digests": "crc32"}

# Numbers the messages between processes, the same on all of them.
_TALKS = itertools.count()

Restored = tuple[TrainState, dict[str, Any], dict[str, Any]]
"""The train state, the loader's state and the trainer's log."""


class Checkpointer:
  """Saves and restores a run under `output_dir/checkpoints/<step>`."""

  def __init__(self, output_dir: str | AnyPath, *, keep: int | None, spare: Spare | None = None):
    """Opens (and makes) the folder.

    Args:
      output_dir: the run's directory.
      keep: how many of the newest checkpoints stay; None keeps all.
      spare: names one more that stays; asked whenever older ones are deleted.
    """
    several = jax.process_count() > 1
    self.folder = path_of(output_dir).absolute() / CHECKPOINTS
    self.folder.mkdir(parents=True, exist_ok=True)
    everyone = set(range(jax.process_count())) if several else None
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if spare else keep,
      preservation_policy=NewestAndOne(keep, spare) if spare and keep else None,
      temporary_path_class=class_of_folders(self.folder),
      # Otherwise it reads files of all checkpoints at once, before it is known whether they are damaged.
      lightweight_initialize=True,
      enable_async_checkpointing=True,
      # What a killed run left incomplete takes space, and is never read. In a bucket, `settle` has deleted it.
      cleanup_tmp_directories=not isinstance(self.folder, BucketPath),
      create=False,
      # Hosts may see a shared folder's newest entries at different times; one of them looks for all.
      single_host_load_and_broadcast=several,
      # Naming the processes makes Orbax wait for them by messages, with a time limit. Otherwise it runs programs on
      # the devices for that, also from its own thread, where they get in between the steps' collectives.
      multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everyone),
    )
    handlers = {
      "state": StateHandler(),
      "loader": ocp.JsonCheckpointHandler(),
      "trainer": ocp.JsonCheckpointHandler(),
    }
    if isinstance(self.folder, BucketPath) and distributed.is_first():
      settle(self.folder)
    self._manager = Manager(opened(self.folder), options=options, item_handlers=handlers)
    self._steps, complete = self._listed()
    self._manager.forget(set(self._manager.all_steps()) - set(complete))

  def _listed(self) -> tuple[list[int], list[int]]:
    """The steps of all checkpoints, newest first, and of those that are complete: as the first process sees them."""
    steps = checkpoint_steps(str(self.folder.parent))
    complete = [step for step in steps if is_complete(self.folder / str(step))]
    return json.loads(self._exchanged(json.dumps([steps, complete]))[0])

  def _exchanged(self, text: str) -> list[str]:
    return distributed.exchanged(f"checkpoints {next(_TALKS)}", text, seconds=VERIFY_SECONDS)

  @property
  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None; as `outputs.newest_checkpoint`, but the same on all hosts."""
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
      "state": StateSave(_as_tree(state)),
      # Orbax copies arrays at once, but reads JSON values when its thread comes to write them: the log would by then
      # have the entries of later steps, which a resumed run would write a second time.
      "loader": ocp.args.JsonSave(copy.deepcopy(loader)),
      "trainer": ocp.args.JsonSave(copy.deepcopy(trainer)),
    }
    with self._explained():
      self._manager.save(step, args=ocp.args.Composite(**items), custom_metadata=_MARK)

  def restore(self, like: TrainState, *, step: int | None = None) -> Restored:
    """Reads a checkpoint, by default the newest intact one, onto the devices; a call that all processes make.

    Damaged ones that are newer are named in the log and left where they are, until the run saves the same step.

    Args:
      like: shapes of a train state, and where its arrays go: `TrainState.abstract`.
      step: which one; None: the newest.

    Returns:
      The train state, the loader's state and the trainer's log.

    Raises:
      UserError: no checkpoint is intact, or it holds other parameters than this run trains.
    """
    steps = sorted({*self._steps, *self._manager.all_steps()}, reverse=True) if step is None else [step]
    for step in steps:
      restored, damage = self._try(step, like)
      if restored is not None:
        return restored
      self._manager.forget({step})
      if distributed.is_first():
        logging.warning("%s: damaged (%s); it is left where it is", self.folder / str(step), damage)
    tried = ", ".join(map(str, steps))
    raise UserError(
      f"{self.folder}: none of the checkpoints (of steps {tried}) is intact, so there is nothing to resume from; put a copy "
      "of one there, or start over with another output_dir or overwrite_output_dir=True"
    )

  def _try(self, step: int, like: TrainState) -> tuple[Restored | None, str]:
    """A checkpoint, or None and what is wrong with it."""
    path, damage = self.folder / str(step), self._damage(step)
    checked = damage != digests.UNKNOWN
    if damage and checked:
      return None, damage
    if not checked and distributed.is_first():
      logging.warning("%s: is of an earlier version, which wrote no digests: damage would not be seen", path)
    try:
      return self._read(step, like), ""
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      words = f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
      # Not damage, or damage that other processes may not have met.
      if checked or jax.process_count() > 1:
        raise UserError(f"{path}: {words}; remove that folder to resume from the one before") from error
      logging.debug("Where it came from:", exc_info=error)
      return None, words

  def _damage(self, step: int) -> str:
    """What is wrong with a checkpoint, the same on all processes; see `digests.find_damage`."""
    path = self.folder / str(step)
    mine = digests.find_damage(path, part=jax.process_index(), parts=jax.process_count())
    if mine == digests.UNKNOWN and (lost := _lost(path)):
      mine = lost
    found = set(self._exchanged(mine))
    return min(found - {"", digests.UNKNOWN}, default=max(found))

  def _read(self, step: int, like: TrainState) -> Restored:
    path = self.folder / str(step)
    self._check_same_parameters(step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=StateRestore(abstract),
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
        f"{self.folder / str(step)}: was made by another way to learn (a task of internvl_jax/tasks) than this config's; use the "
        "settings it was made with, another output_dir, or overwrite_output_dir=True"
      )
    saved = metadata["params"]
    found = {path: tuple(leaf.shape) for path, leaf in saved.items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in like.params.items()}
    if found == wanted:
      self._check_same_optimizer(step, metadata.get("opt_state") or {}, like)
      return
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    raise UserError(
      f"{self.folder / str(step)}: trains other parameters than this config ({len(differing)} differ, first: "
      f"{differing[0]} is {found.get(differing[0])} there, {wanted.get(differing[0])} here); use the settings it was "
      "made with, another output_dir, or overwrite_output_dir=True"
    )

  def _check_same_optimizer(self, step: int, saved: dict[str, Any], like: TrainState) -> None:
    found = {name: tuple(leaf.shape) for name, leaf in saved.items()}
    if found != {name: tuple(leaf.shape) for name, leaf in _leaves(like.opt_state)}:
      raise UserError(
        f"{self.folder / str(step)}: was made by another optimizer (training.optim, training.optim_args) than this config's; "
        "use the settings it was made with, another output_dir, or overwrite_output_dir=True"
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

  def _explained(self) -> contextlib.AbstractContextManager[None]:
    """Turns a full disk into a line."""
    return explained(self.folder, "the checkpoint", self._what_stands)

  def _what_stands(self) -> str:
    # A bucket that takes nothing is not asked what it has.
    in_bucket = isinstance(self.folder, BucketPath)
    newest = self._manager.latest_step() if in_bucket else newest_checkpoint(str(self.folder.parent))
    stands = "no checkpoint is complete" if newest is None else f"that of step {newest} is complete and kept"
    room = "S" if in_bucket else "Free some space, or lower training.save_total_limit, and s"
    return f"{stands}. {room}tart the same command again"

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    self._manager.close()


def _lost(checkpoint: AnyPath) -> str:
  """Why a checkpoint without digests should have some; empty if it should not: it is of an earlier version."""
  name = METADATA
  try:
    metadata = json.loads((checkpoint / name).read_text(encoding="utf-8"))
    had_some = bool(metadata.get("custom_metadata"))
  except (OSError, ValueError, AttributeError):
    return f"{name}: missing or not what was written"
  return f"{digests.FILE}: missing" if had_some else ""


def _as_tree(state: TrainState) -> dict[str, Any]:
  # The optimizer's tuples become a list of leaves, so that a checkpoint does not depend on optax's classes.
  tree = {"step": state.step, "params": state.params, "opt_state": dict(_leaves(state.opt_state))}
  return {**tree, "running": state.running} if state.running else tree


def _leaves(opt_state: Any) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
  return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in flat]


def _from_tree(saved: dict[str, Any], like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name, _ in _leaves(like)])
