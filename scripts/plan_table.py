"""Fills the tables of docs/scale_tables.md: what arrangements take, and the smallest slice or fewest cards for each size.

  python scripts/plan_table.py [--results benchmarks/scale.json] [--only 2.5-8b/full/h100,3-14b,named] [--print_only]

The named arrangements are compiled each by `python -m internvl_jax.plan`, at level O1. An entry of the other tables
is a size, "full" or "lora", and a kind of chip or card ("h100", or "rtx4090:1" for one card alone), and is looked for
with `--search`, which compiles as often as it has to: tens of seconds to minutes. `--only` takes entries or what they begin
with; `--kinds` those of some kinds. Every outcome goes to the file of results at
once, so that a run that was stopped goes on where it was; entries that failed are tried again. Sizes of one
architecture are compiled once. At the end, and alone with --print_only, the tables are written into docs/scale_tables.md,
between their markers.
"""

import dataclasses
import json
import re
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

TABLES = {
  "slices": ("v5e", "v6e", "v5p"),
  "cards": ("a100-80g", "h100", "h200", "b200"),
  "one card": ("rtx4090:1", "l40s:1", "h100:1"),
}
"""Marker in the page -> the kinds that are its columns."""

KINDS = tuple(kind for kinds in TABLES.values() for kind in kinds)
MODES = {
  "full": recipe.__file__,
  "lora": f"{recipe.__file__}:lora",
  "full, ViT frozen": recipe.__file__,
  "MPO": f"{recipe.__file__}:mpo",
  "MPO, reference computed once": f"{recipe.__file__}:mpo",
}
SEARCHED = ("full", "lora")
DOCS = Path(__file__).parents[1] / "docs"
GIB = 2**30

_RESULTS = flags.DEFINE_string(
  "results", str(DOCS.parent / "benchmarks" / "scale.json"), "File of results; made if it is not there."
)
_ONLY = flags.DEFINE_list("only", [], "Entries to look for, or what they begin with; none: all.")
_KINDS = flags.DEFINE_list("kinds", [], "Kinds to look for; none: all.")
_PRINT_ONLY = flags.DEFINE_bool("print_only", False, "Write the tables of what is there.")
_HOURS = flags.DEFINE_float("hours", 1.0, "The longest that an entry may take.", lower_bound=0)
_PAGE = flags.DEFINE_string("page", str(DOCS / "scale_tables.md"), "Page to write the tables into.")


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """A run on a slice: one row a data shard, of so many tokens and tiles."""

  size: str
  mode: str
  topology: str
  mesh: tuple[tuple[str, int], ...] = ()
  tokens: int = 8192
  tiles: int = 40

  @property
  def entry(self) -> str:
    """Its key among the results."""
    axes = "".join(f" {axis}={size}" for axis, size in self.mesh)
    return f"named/{self.size}/{self.mode}/{self.topology}{axes} {self.tokens}+{self.tiles}"

  @property
  def options(self) -> list[str]:
    """What `plan` is called with."""
    options = [f"--config={MODES[self.mode]}", f"--size={self.size}", f"--topology={self.topology}"]
    options += [f"--config.mesh.{axis}={size}" for axis, size in self.mesh]
    if self.mode.endswith("ViT frozen"):
      options.append("--config.model.freeze_backbone=True")
    if self.mode.endswith("computed once"):
      options.append("--config.preference.precompute_reference=True")
    return [*options, f"--tokens={self.tokens}", f"--tiles={self.tiles}", "--optimization_level=O1"]


NAMED = (
  Arrangement("2.5-8b", "full", "v5e:4x4"),
  Arrangement("2.5-8b", "full", "v5e:4x8"),
  Arrangement("2.5-8b", "full", "v5e:8x8"),
  Arrangement("2.5-8b", "full, ViT frozen", "v5e:8x8"),
  Arrangement("2.5-8b", "full", "v5e:8x8", (), 16384, 48),
  Arrangement("2.5-8b", "full", "v5e:8x8", (("sequence", 8),), 65536, 320),
  Arrangement("2.5-8b", "full", "v6e:2x4"),
  Arrangement("2.5-8b", "full", "v5p:2x2x1"),
  Arrangement("2.5-8b", "full", "v4:2x2x2"),
  Arrangement("2.5-8b", "lora", "v6e:2x2"),
  Arrangement("2.5-8b", "lora", "v5e:2x4"),
  Arrangement("2.5-78b", "full", "v5p:4x4x4", (("tensor", 4),)),
  Arrangement("2.5-78b", "full", "v5p:4x4x8", (("tensor", 4),)),
  Arrangement("2.5-78b", "full", "v5e:16x16", (("tensor", 8),)),
  Arrangement("3.5-30b-a3b", "full", "v5e:8x8", (("expert", 8),)),
  Arrangement("3.5-30b-a3b", "full", "v6e:4x8", (("expert", 8),)),
  Arrangement("3.5-30b-a3b", "full", "v5p:2x4x4", (("expert", 8),)),
  Arrangement("3.5-241b-a28b", "full", "v6e:16x16", (("expert", 8),)),
  Arrangement("3.5-241b-a28b", "full", "v5p:4x4x8", (("expert", 8),)),
  Arrangement("3.5-241b-a28b", "full", "v5p:4x4x4", (("expert", 4),)),
  Arrangement("3-8b", "MPO", "v5p:4x4x4"),
  Arrangement("3-8b", "MPO", "v5e:4x4"),
  Arrangement("3-8b", "MPO, reference computed once", "v5e:4x4"),
  Arrangement("3-8b", "full", "v5e:4x4"),
  Arrangement("2.5-8b", "full", "h100:8"),
  Arrangement("2.5-78b", "full", "h100:4x8"),
  Arrangement("3.5-30b-a3b", "full", "h100:8"),
  Arrangement("2.5-8b", "lora", "h100:1"),
  Arrangement("2.5-8b", "lora", "rtx4090:1"),
)
"""What docs/scale_tables.md promises."""


def main(argv: Sequence[str]) -> None:
  """Fills what is missing, and writes the tables."""
  del argv
  path = Path(_RESULTS.value)
  for entry in [] if _PRINT_ONLY.value else wanted():
    if "error" in read(path).get(entry, {"error": "not there"}):
      print(f"{entry} ...", flush=True)
      found = compiled(entry) if entry.startswith("named/") else searched(entry)
      # Others may have written meanwhile.
      path.write_text(json.dumps(read(path) | {entry: found}, indent=1) + "\n")
      print(f"{entry}: {found.get('error') or cell(found)}", flush=True)
  results = read(path)
  page = Path(_PAGE.value)
  empty = "".join(f"<!-- {marker} -->\n" for marker in ("named", *TABLES))
  text = fill(page.read_text(encoding="utf-8") if page.is_file() else empty, "named", named_table(results))
  for marker, kinds in TABLES.items():
    text = fill(text, marker, table(results, kinds))
  page.write_text(text, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
  """The results so far."""
  return json.loads(path.read_text()) if path.is_file() else {}


def fill(text: str, marker: str, lines: list[str]) -> str:
  """The page with a table after its marker, in place of the one there."""
  start = text.index(f"<!-- {marker} -->\n") + len(f"<!-- {marker} -->\n")
  old = re.match(r"(\|.*\n)*", text[start:])
  assert old
  return text[:start] + "".join(f"{line}\n" for line in lines) + text[start + old.end() :]


# --- What there is to find out ------------------------------------------------------------------------------


def entries() -> list[str]:
  """All entries, those of one architecture under its first size."""
  sizes = [size for size in published.SIZES if first_of(size) == size]
  kinds = [kind for kind in KINDS if kind.removesuffix(":1") == kind or kind.removesuffix(":1") not in KINDS]
  searches = [f"{size}/{mode}/{kind}" for size in sizes for mode in SEARCHED for kind in kinds]
  return [*(arrangement.entry for arrangement in NAMED), *searches]


def first_of(size: str) -> str:
  """The first of the sizes that have the same architecture."""
  return next(other for other in published.SIZES if published.config_of(other) == published.config_of(size))


def wanted() -> list[str]:
  """The entries asked for."""
  only = tuple(_first(name) for name in _ONLY.value)
  found = [entry for entry in entries() if not only or entry.startswith(only)]
  if _KINDS.value:
    found = [entry for entry in found if entry.rpartition("/")[2] in _KINDS.value]
  if not found:
    raise app.UsageError(f"--only and --kinds name no entry; one is {entries()[-1]}")
  return found


def _first(name: str) -> str:
  """What an entry is called where its size stands for others of the same architecture."""
  size, slash, rest = name.partition("/")
  return f"{first_of(size)}{slash}{rest}" if size in published.SIZES else name


def compiled(entry: str) -> dict[str, Any]:
  """The outcome of a named arrangement."""
  arrangement = next(arrangement for arrangement in NAMED if arrangement.entry == entry)
  return run(arrangement.options, brief)


def searched(entry: str) -> dict[str, Any]:
  """The outcome of a search: the arrangement that fits and what it takes."""
  size, mode, kind = entry.split("/")
  options = [f"--config={MODES[mode]}", f"--size={size}", f"--topology={kind}", "--search"]
  return run(options, outcome)


def run(options: list[str], shorten) -> dict[str, Any]:
  """What `plan` writes, shortened, or why it wrote nothing; and the seconds that it took."""
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / "found.json"
    command = [sys.executable, "-m", "internvl_jax.plan", *options, f"--json={written}"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600 * _HOURS.value)
    except subprocess.TimeoutExpired:
      return {"error": f"took more than {_HOURS.value:g} hours"}
    if done.returncode:
      # A compiler that aborts writes a trace after its reason.
      lines = [line for line in done.stderr.splitlines() if "Check failed" in line or "error" in line.lower()]
      return {"error": (lines or done.stderr.splitlines() or ["no word"])[0]}
    found = shorten(json.loads(written.read_text()))
  return {**found, "seconds": round(time.perf_counter() - start)}


def brief(report: dict[str, Any]) -> dict[str, Any]:
  """What the tables hold of a report."""
  return {
    "topology": report["topology"],
    "mesh": {axis: size for axis, size in report["mesh"].items() if size > 1},
    "remat": report["execution"]["remat"],
    "fits": report["fits"],
    "bytes": report["total"],
    "limit": report["limit"],
    "floor": 16 * report["trainable"] // report["chips"] + report["memory"]["frozen parameters"],
    "memory": report["memory"],
    "peak": [buffer for buffer in report["peak"] if buffer["origin"] != "gradients"][:12],
    "step_seconds": report["roofline"]["step"],
    "mfu": report["roofline"]["mfu"],
    "compile_seconds": round(report["lower_seconds"] + report["compile_seconds"], 1),
  }


def outcome(found: dict[str, Any]) -> dict[str, Any]:
  """What the table holds of a search; of what did not fit, what it would take."""
  attempts = found["attempts"]
  tried = [
    {key: attempt[key] for key in ("topology", "mesh", "remat", "bytes", "compiled", "outcome")}
    for attempt in attempts
    if attempt["outcome"] != "cannot fit"
  ]
  fitting = [attempt for attempt in attempts if attempt["report"] and attempt["report"]["fits"]]
  if not fitting:
    return {"topology": None, "tried": tried}
  return {**brief(fitting[-1]["report"]), "tried": tried}


# --- Words --------------------------------------------------------------------------------------------------


def named_table(results: dict[str, Any]) -> list[str]:
  """The named arrangements as Markdown; only those that were compiled."""
  lines = [
    "| size | trains | tokens + tiles a row | slice, mesh | GiB a chip, of | floor | beyond it: the largest, and all else | s |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for arrangement in NAMED:
    found = results.get(arrangement.entry)
    if not found:
      continue
    head = (
      f"| {same_as(arrangement.size)} | {arrangement.mode} | {arrangement.tokens} + {arrangement.tiles} |"
    )
    if "error" in found:
      lines.append(f"{head} {arrangement.topology} | failed: {found['error']} | | | |")
      continue
    used = f"{found['bytes'] / GIB:.2f}" if found["fits"] else f"**{found['bytes'] / GIB:.2f}**"
    lines.append(
      f"{head} {found['topology']} {mesh_of(found)} | {used} of {found['limit'] / GIB:.2f} | "
      f"{found['floor'] / GIB:.2f} | {beyond(found)} | {found['compile_seconds']:.0f} |"
    )
  return lines


def beyond(found: dict[str, Any]) -> str:
  """The largest temporaries beyond the floor, and what is left: negative where gradients are not all there at the peak."""
  words, rest = [], found["bytes"] - found["floor"]
  for buffer in found["peak"][:3]:
    times = f"{buffer['count']} x " if buffer["count"] > 1 else ""
    origin = buffer["origin"].split(":")[0]
    words.append(f"{buffer['bytes'] / GIB:.2f} {origin} `{times}{buffer['shape']}`")
    rest -= buffer["bytes"]
  return "; ".join([*words, f"{rest / GIB:.2f}"])


def same_as(size: str) -> str:
  """The size and those of the same architecture."""
  return ", ".join(other for other in published.SIZES if first_of(other) == first_of(size))


def table(results: dict[str, Any], kinds: Sequence[str]) -> list[str]:
  """Rows of sizes, columns of kinds, as Markdown; only rows that hold something."""
  lines = [f"| size | trains | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
  for size in published.SIZES:
    if first_of(size) != size:
      continue
    for mode in SEARCHED:
      cells = [found_for(results, f"{size}/{mode}", kind) for kind in kinds]
      if any(cells):
        words = " | ".join(cell(found) if found else "" for found in cells)
        lines.append(f"| {same_as(size)} | {mode} | {words} |")
  return lines


def found_for(results: dict[str, Any], run: str, kind: str) -> dict[str, Any] | None:
  """An entry of the results; of one card also by the search through more of them, which begins with one."""
  if (found := results.get(f"{run}/{kind}")) is not None:
    return found
  more = results.get(f"{run}/{kind.removesuffix(':1')}")
  if more is None or "error" in more or more["topology"] == kind:
    return more
  return {"topology": None}


def cell(found: dict[str, Any]) -> str:
  """An entry in words: slice or cards, mesh, remat, GiB of GiB a device, bound of the MFU."""
  if "error" in found:
    return f"failed: {found['error']}"
  if found["topology"] is None:
    return "none"
  used, limit = found["bytes"] / GIB, found["limit"] / GIB
  shape = found["topology"].partition(":")[2]
  return f"**{shape}**: {mesh_of(found)}, {found['remat']}, {used:.1f} of {limit:.1f}, ≤ {found['mfu']:.0%}"


def mesh_of(found: dict[str, Any]) -> str:
  """The axes of the mesh that split anything."""
  return " ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"


if __name__ == "__main__":
  app.run(main)
