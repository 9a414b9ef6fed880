"""Results as Markdown: a table for each part, with what is missing said."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError

BEGIN, END = "<!-- benchmarks/gpu.py: begin -->", "<!-- benchmarks/gpu.py: end -->"
"""What is between them on a page is replaced."""

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
  """A column: its heading, and the function of (row, machine) -> its cell."""

  heading: str
  cell: Callable[[Row, Row], str]


def _text(name: str) -> Callable[[Row, Row], str]:
  return lambda row, machine: "" if row.get(name) is None else str(row[name])


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row, Row], str]:
  return lambda row, machine: "" if row.get(name) is None else format(row[name] * scale, form)


def _gib(name: str) -> Callable[[Row, Row], str]:
  return _number(name, ".2f", 2**-30)


def _time(row: Row, machine: Row) -> str:
  del machine
  return f"{row['ms']:.3g} ({row['ms_least']:.3g} to {row['ms_most']:.3g})"


def _peak(row: Row, machine: Row) -> str:
  """The most memory in use; where it was before the first step, the step's own is not known."""
  found = _gib("peak_bytes")(row, machine)
  return f"≤ {found}" if found and row["peak_bytes"] == row["peak_before_bytes"] else found


def _mfu(row: Row, machine: Row) -> str:
  peak = machine.get("peak_tflops")
  return f"{row['useful_tflop'] / (row['ms'] / 1e3) / peak:.1%}" if peak else ""


_ERRORS = (
  Column("masks and sizes", _text("case")),
  Column("backend", _text("backend")),
  Column("forward, max", _number("forward_max", ".1e")),
  Column("mean", _number("forward_mean", ".1e")),
  Column("gradients, max", _number("backward_max", ".1e")),
  Column("mean", _number("backward_mean", ".1e")),
)
_ALONE = (
  Column("shape", _text("case")),
  Column("heads", _text("heads")),
  Column("operands, MiB", _text("mib")),
  Column("backend", _text("backend")),
  Column("pass", _text("pass")),
  Column("ms (range)", _time),
  Column("useful TFLOP/s", _number("tflops", ".1f")),
)
_STEP = (
  Column("model", _text("case")),
  Column("trains", _text("trains")),
  Column("tokens of row", lambda row, machine: f"{row['tokens']} of {row['row']}"),
  Column("tiles of pool", lambda row, machine: f"{row['tiles']} of {row['pool']}"),
  Column("attention, remat", lambda row, machine: f"{row['attention']}, {row['remat']}"),
  Column("ms a step (range)", _time),
  Column("tokens/s", _number("tokens_per_second", ".0f")),
  Column("MFU", _mfu),
  Column("peak GiB", _peak),
  Column("planned", _gib("planned_bytes")),
  Column("compiled in s", _number("compile_seconds", ".0f")),
)
_TORCH = (
  Column("model", _text("case")),
  Column("way", _text("way")),
  Column("ms a step (range)", _time),
  Column("tokens/s", _number("tokens_per_second", ".0f")),
  Column("MFU", _mfu),
  Column("tokens computed", _text("computed_tokens")),
  Column("peak GiB", _gib("peak_bytes")),
)
_TILINGS = (
  Column("shape", _text("case")),
  Column("kernel", _text("kernel")),
  Column("TB, SB, warps, stages", lambda row, machine: ", ".join(map(str, row["tiling"]))),
  Column("the table's", lambda row, machine: "yes" if row["own"] else ""),
  Column("ms (range)", _time),
  Column("useful TFLOP/s", _number("tflops", ".1f")),
)
_CURVE = (
  Column("run", _text("case")),
  Column("float32's first loss", _number("first", ".4f")),
  Column("and last", _number("last", ".4f")),
  Column("largest difference", _number("largest", ".4f")),
  Column("root mean square", _number("root_mean_square", ".4f")),
  Column("mean", _number("mean", "+.4f")),
)
_COSTS = (
  Column("model", _text("case")),
  Column("trains", _text("trains")),
  Column("attention, remat", lambda row, machine: f"{row['attention']}, {row['remat']}"),
  Column("setting", lambda row, machine: f"`{row['setting']}`" if row["setting"] else "none: tokens cost 0"),
  Column("ms of every step", _number("constant", ".3g")),
  Column("largest error", _number("worst", ".1%")),
  Column("a tile, times its FLOPs over a token's", _number("tile_of_flops", ".2f")),
  Column("a pair", _number("pair_of_flops", ".2f")),
)

PARTS: dict[str, tuple[str, tuple[Column, ...]]] = {
  "kernels": (
    "Kernels in bfloat16 against plain attention and `ragged_dot` in float32, error over the largest magnitude",
    _ERRORS,
  ),
  "step": ("Training step, one packed row", _STEP),
  "torch": ("PyTorch on the same row", _TORCH),
  "attention": ("Attention alone", _ALONE),
  "experts": ("Grouped matmul alone", _ALONE),
  "curve": ("Bfloat16 against float32", _CURVE),
  "tilings": ("Tilings of `models/attention/triton.py`", _TILINGS),
  "costs": ("Costs for `loader.balance_costs`, by fits to times of the training step", _COSTS),
}
"""Title and columns by part, in the order of the page."""


def part_of(unit: str) -> str:
  """The part that a unit belongs to: "step" of "step/3-1b"."""
  return unit.partition("/")[0]


def render(found: Row) -> list[str]:
  """All results as lines of Markdown."""
  machine, units = found["machine"], found["units"]
  lines = [", ".join(f"{name} {machine[key]}" for key, name in _FACTS.items() if machine.get(key)) + "."]
  lines += [f"Commands: {', '.join(_commands(units)) or 'none'}."]
  for part, (title, columns) in PARTS.items():
    mine = {name: unit for name, unit in units.items() if part_of(name) == part}
    rows = [row for unit in mine.values() for row in unit["rows"] if _why(row) is None]
    notes = [note for name, unit in mine.items() for note in _notes(name, unit)]
    if mine:
      lines += ["", f"### {title}", ""]
    if rows:
      lines += _table(rows, columns, machine) + [""] * bool(notes)
    lines += notes
  return lines


def first_line(error: BaseException) -> str:
  """The first words of an error, for a row's "refused"."""
  return f"{type(error).__name__}: {(str(error).splitlines() or ['no word'])[0][:200]}"


def _why(row: Row) -> str | None:
  """Why a row has no numbers; None where it has."""
  return row.get("refused") or row.get("skipped")


def _notes(name: str, unit: Row) -> list[str]:
  """What of a unit is not in its table, and why, a line each."""
  keys = ("case", "backend", "way", "pass", "kernel", "tiling")
  lines = [
    f"- {name}: {', '.join(str(row[key]) for key in keys if row.get(key))}: {_why(row)}"
    for row in unit["rows"]
    if _why(row) is not None
  ]
  return lines + ([] if unit["status"] == "done" else [f"- {name}: {unit['status']}"])


_FACTS = {
  "card": "Card",
  "driver": "driver",
  "jax": "jax",
  "jaxlib": "jaxlib",
  "torch": "torch",
  "transformers": "transformers",
  "flash_attn": "flash_attn",
  "python": "Python",
}


def _commands(units: Row) -> list[str]:
  """The commands that ran units, each once, with the day."""
  found = [f"`{unit['command']}` ({unit['date']})" for unit in units.values() if "command" in unit]
  return list(dict.fromkeys(found))


def _table(rows: list[Row], columns: tuple[Column, ...], machine: Row) -> list[str]:
  lines = ["| " + " | ".join(column.heading for column in columns) + " |", "|---" * len(columns) + "|"]
  for row in rows:
    cells = [column.cell(row, machine).replace("|", "/") for column in columns]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def write_page(page: Path, lines: list[str]) -> None:
  """Puts the lines between a page's markers, in the place of what was there.

  Raises:
    UserError: the page has no markers.
  """
  text = page.read_text(encoding="utf-8")
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise UserError(f"--page={page}: it has no line {BEGIN!r}, or none {END!r} after it; add them")
  page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
