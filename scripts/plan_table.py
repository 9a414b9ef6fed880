"""Fills the table of docs/scale.md: the smallest slice of TPUs that each published size trains on.

  python scripts/plan_table.py --results scale.json [--only 2.5-8b/full/v5e,3-14b] [--print_only]

An entry is a size, "full" or "lora", and a kind of chip; `--only` takes entries or what they begin with. Each is
looked for by a process of its own (`python -m internvl_jax.plan --search`), which takes minutes to hours, and its
outcome goes to the file of results at once, so that a run that was stopped goes on where it was; entries that
failed are tried again. At the end, and alone with --print_only, the table is printed as Markdown.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from internvl_jax.aot import recipe
from internvl_jax.hf import published

KINDS = ("v5e", "v6e", "v5p")
MODES = {"full": recipe.__file__, "lora": f"{recipe.__file__}:lora"}

_RESULTS = flags.DEFINE_string("results", None, "File of results; made if it is not there.", required=True)
_ONLY = flags.DEFINE_list("only", [], "Entries to look for, or what they begin with; none: all.")
_PRINT_ONLY = flags.DEFINE_bool("print_only", False, "Print the table of what is there.")
_HOURS = flags.DEFINE_float("hours", 6.0, "The longest that an entry may take.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
  """Fills what is missing, and prints the table."""
  del argv
  path = Path(_RESULTS.value)
  results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
  for entry in [] if _PRINT_ONLY.value else wanted():
    if "error" not in results.get(entry, {"error": "not there"}):
      continue
    print(f"{entry} ...", flush=True)
    results[entry] = look(entry)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{entry}: {cell(results[entry])}", flush=True)
  print("\n".join(table(results)))


def entries() -> list[str]:
  """All entries of the table."""
  return [f"{size}/{mode}/{kind}" for size in published.SIZES for mode in MODES for kind in KINDS]


def wanted() -> list[str]:
  """The entries asked for."""
  found = [entry for entry in entries() if not _ONLY.value or entry.startswith(tuple(_ONLY.value))]
  if not found:
    raise app.UsageError(f"--only={','.join(_ONLY.value)} names no entry; one is {entries()[0]}")
  return found


def look(entry: str) -> dict[str, Any]:
  """The outcome of an entry: the arrangement that fits and what it takes, or why there is none."""
  size, mode, kind = entry.split("/")
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / "found.json"
    command = [sys.executable, "-m", "internvl_jax.plan", f"--config={MODES[mode]}", f"--size={size}"]
    command += [f"--topology={kind}", "--search", f"--json={written}"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600 * _HOURS.value)
    except subprocess.TimeoutExpired:
      return {"error": f"took more than {_HOURS.value:g} hours"}
    if done.returncode:
      # A compiler that aborts writes a trace after its reason.
      lines = [line for line in done.stderr.splitlines() if "Check failed" in line or "error" in line.lower()]
      return {"error": (lines or done.stderr.splitlines() or ["no word"])[0]}
    attempts = json.loads(written.read_text())["attempts"]
  return {**outcome(attempts), "seconds": round(time.perf_counter() - start)}


def outcome(attempts: list[dict[str, Any]]) -> dict[str, Any]:
  """What the table holds of a search."""
  compiled = [attempt for attempt in attempts if attempt["compiled"]]
  fitting = [attempt for attempt in compiled if attempt["report"]["fits"]]
  tried = {"compiled": len(compiled)}
  if not fitting:
    return {"topology": None, **tried}
  best = fitting[-1]
  found = best["report"]
  return {
    "topology": best["topology"],
    "mesh": {axis: size for axis, size in best["mesh"].items() if size > 1},
    "remat": best["remat"],
    "bytes": found["total"],
    "limit": found["limit"],
    "step_seconds": found["roofline"]["step"],
    "mfu": found["roofline"]["mfu"],
    **tried,
  }


def table(results: dict[str, Any]) -> list[str]:
  """Rows of sizes, columns of kinds, as Markdown; only rows that hold something."""
  lines = [f"| size | trains | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
  for size in published.SIZES:
    for mode in MODES:
      cells = [results.get(f"{size}/{mode}/{kind}") for kind in KINDS]
      if any(cells):
        words = " | ".join(cell(found) if found else "" for found in cells)
        lines.append(f"| {size} | {mode} | {words} |")
  return lines


def cell(found: dict[str, Any]) -> str:
  """An entry in words: slice, mesh, remat, GiB of GiB a chip, bound of the MFU."""
  if "error" in found:
    return f"failed: {found['error']}"
  if found["topology"] is None:
    return "none"
  mesh = " ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one chip"
  used, limit = found["bytes"] / 2**30, found["limit"] / 2**30
  shape = found["topology"].partition(":")[2]
  return f"{shape}: {mesh}, {found['remat']}, {used:.1f} of {limit:.1f}, ≤ {found['mfu']:.0%}"


if __name__ == "__main__":
  app.run(main)
