"""The file of results: written after every row, so that a run that is cut leaves what it has."""

import json
from pathlib import Path
from typing import Any

from internvl_jax.outputs import write_json


class Results:
  """What was measured: {"machine": {...}, "units": {unit: {"status", "rows", ...}}} in a JSON file.

  One process at a time has it open for a change; every change is read, made and written at once.
  """

  def __init__(self, folder: str | Path):
    self.path = Path(folder) / "results.json"

  def read(self) -> dict[str, Any]:
    """All of it so far."""
    empty: dict[str, Any] = {"machine": {}, "units": {}}
    return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else empty

  def describe(self, **facts: Any) -> None:
    """Adds facts about the machine and the versions."""
    found = self.read()
    found["machine"] |= facts
    self._write(found)

  def begin(self, unit: str) -> None:
    """Forgets what an earlier run left of a unit."""
    found = self.read()
    found["units"][unit] = {"status": "running", "rows": []}
    self._write(found)

  def end(self, unit: str, status: str, **facts: Any) -> None:
    """Says how a unit ended; its rows stay."""
    found = self.read()
    found["units"][unit] = {"rows": [], **found["units"].get(unit, {}), "status": status, **facts}
    self._write(found)

  def add(self, unit: str, **row: Any) -> None:
    """Adds a row to a unit."""
    found = self.read()
    found["units"].setdefault(unit, {"status": "running", "rows": []})["rows"].append(row)
    self._write(found)
    print(f"{unit}: {json.dumps(row)}", flush=True)

  def _write(self, found: dict[str, Any]) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(self.path, found)
