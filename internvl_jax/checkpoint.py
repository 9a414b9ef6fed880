"""Resumable checkpoints, by Orbax: sharded, asynchronous, complete or not there at all.

A checkpoint holds what the run changes: trainable parameters, optimizer moments, the loader's state and the
log. Frozen weights are read again from where they came from.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax.errors import UserError
from internvl_jax.state import TrainState

FOLDER = "checkpoints"
"""Folder of the checkpoints inside an output directory."""


class Checkpointer:
  """Saves and restores a run under `output_dir/checkpoints/<step>`."""

  def __init__(self, output_dir: str | Path, *, keep: int | None):
    """Opens (and makes) the folder.

    Args:
      output_dir: the run's directory.
      keep: how many of the newest checkpoints stay; None keeps all.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self.folder = Path(output_dir).absolute() / FOLDER
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "loader": ocp.JsonCheckpointHandler(),
      "trainer": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  @property
  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, *, loader: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Starts writing the state after its step; returns once the arrays are copied from the devices.

    A checkpoint of that step that is there already is left as it is.

    Args:
      state: the train state.
      loader: the loader's state, as JSON values.
      trainer: the trainer's log, as JSON values.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = {
      "state": ocp.args.StandardSave(_as_tree(state)),
      "loader": ocp.args.JsonSave(loader),
      "trainer": ocp.args.JsonSave(trainer),
    }
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """Reads the newest complete checkpoint onto the devices of `like`.

    Returns:
      The train state, the loader's state and the trainer's log.

    Raises:
      UserError: the checkpoint holds other parameters than this run trains.
    """
    step = self.latest_step
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
    state = TrainState(tree["step"], tree["params"], _from_tree(tree["opt_state"], like.opt_state))
    if int(state.step) != step:
      raise UserError(f"{path}: holds step {int(state.step)}, expected {step}; remove that folder")
    return state, restored["loader"], restored["trainer"]

  def _check_same_parameters(self, step: int, like: TrainState) -> None:
    saved = self._manager.item_metadata(step)["state"]["params"]
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

  def wait(self) -> None:
    """Returns once everything is on disk; a failed write is raised here."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the folder."""
    self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
  # The optimizer's tuples become a list of leaves, so that a checkpoint does not depend on optax's classes.
  return {"step": state.step, "params": state.params, "opt_state": dict(_leaves(state.opt_state))}


def _leaves(opt_state: Any) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
  return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in flat]


def _from_tree(saved: dict[str, Any], like: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name, _ in _leaves(like)])
