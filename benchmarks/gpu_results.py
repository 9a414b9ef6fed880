"""The file of results: written after every row, so that a run that is cut leaves what it has."""

import json
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.outputs import write_json


class Results:
  """What was measured: {"machine": {...}, "units": {unit: {"status", "rows", "command", ...}}} in a JSON file.

  One process at a time has it open for a change; every change is read, made and written at once.
  """

  def __init__(self, folder: str | Path):
    self.path = Path(folder) / "results.json"

  def read(self) -> dict[str, Any]:
    """All of it so far."""
    empty: dict[str, Any] = {"machine": {}, "units": {}}
    return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else empty

  def describe(self, **facts: Any) -> None:
    """Says what machine and versions the results are of.

    Raises:
      UserError: the file's are of others.
    """
    found = self.read()
    if found["units"] and (changed := [key for key in facts if facts[key] != found["machine"].get(key)]):
      was, now = (", ".join(str(which.get(key)) for key in changed) for which in (found["machine"], facts))
      raise UserError(
        f"--out={self.path.parent}: its results are of another {', '.join(changed)} ({was}, now {now}); name another folder"
      )
    self._write(found | {"machine": facts})

  def begin(self, unit: str, **facts: Any) -> None:
    """Forgets what an earlier run left of a unit."""
    found = self.read()
    found["units"][unit] = {"status": "running", "rows": [], **facts}
    self._write(found)

  def leave_out(self, unit: str, why: str) -> None:
    """Says that a unit was left out; what an earlier run has completed stays."""
    if self.read()["units"].get(unit, {}).get("status") != "done":
      self.begin(unit)
      self.end(unit, f"left out: {why}")

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
