"""The ids that a run has at trackers, kept in its output directory."""

import json
import threading

from internvl_jax.outputs import TRACKERS_FILE, write_json
from internvl_jax.storage.paths import AnyPath

_LOCK = threading.Lock()


class TrackerIds:
  """Ids of a run at trackers, so that a start that resumes it, also after a crash, adds to the same run there."""

  def __init__(self, output_dir: AnyPath):
    """Reads nothing yet.

    Args:
      output_dir: the run's directory; a run that begins anew there has deleted the ids of the one before.
    """
    self._path = output_dir / TRACKERS_FILE

  def get(self, tracker: str) -> str | None:
    """The run's id at a tracker; None where it has none."""
    return self._read().get(tracker)

  def keep(self, tracker: str, run_id: str) -> None:
    """Keeps it; each tracker calls on a thread of its own."""
    with _LOCK:
      ids = self._read()
      if ids.get(tracker) != run_id:
        write_json(self._path, {**ids, tracker: run_id})

  def _read(self) -> dict[str, str]:
    try:
      return json.loads(self._path.read_text(encoding="utf-8"))
    except FileNotFoundError:
      return {}
