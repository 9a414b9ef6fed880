"""What the report says, as plain values: summary, samples, histograms, predictions, settings, starts."""

import base64
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.reporting.run_files import RunFiles

MOST_SHOWN = 24
"""Samples of a held-out set whose predictions are on the page."""

PICTURE_BYTES = 8 << 20
"""Bytes of pictures on the page, so that it stays one that can be sent; the others are named."""

EVENTS = {
  "unreadable": "could not be read",
  "over_long": "too long, left out",
  "fully_masked": "nothing supervised",
  "truncated": "lost their end",
  "shrunk": "fewer tiles or frames",
  "split": "further pieces",
}
"""Counter of `trainer_state.json` -> what it counts; the first three are lost."""

_LOST = ("unreadable", "over_long", "fully_masked")


def status(run: RunFiles, *, ended: bool) -> str:
  """What the run is at: "finished", "running", "stopped", or "started" where no step was logged."""
  step, total = last_step(run), run.state.get("max_steps")
  if total is not None and step >= total and (run.results or ended):
    return "finished"
  if run.is_running and not ended:
    return "running"
  return "stopped" if step else "started"


def last_step(run: RunFiles) -> int:
  """Steps taken, as far as is known."""
  logged = max((one.steps[-1] for one in run.series.values() if one.steps), default=0)
  return max(logged, run.state.get("global_step", 0))


def summary(run: RunFiles, *, ended: bool) -> list[tuple[str, str]]:
  """The run in a few numbers: (what, value)."""
  total, starts = run.state.get("max_steps"), run.facts.get("starts", [])
  found: list[tuple[str, str | None]] = [
    ("status", status(run, ended=ended)),
    ("steps", f"{last_step(run):,}" + (f" of {total:,}" if total else "")),
    ("epochs", _last(run, "train/epoch", "{:.2f}")),
    ("loss", _last(run, "train/loss", "{:.4f}")),
    *(
      (_score_name(name), _scored(_latest(run, name), _latest(run, f"{name}_change")))
      for name in _scores(run)
    ),
    *_final_scores(run),
    ("time of a step", _last(run, "train/seconds_per_step", "{:.3g} s")),
    ("MFU", _last(run, "train/mfu", "{:.1%}")),
    ("memory of a device", _gib(_latest(run, "train/peak_memory_bytes"))),
    ("time of the last start", _duration(run.results.get("train_runtime"))),
    ("devices", _devices(starts[-1]) if starts else None),
  ]
  return [(what, value) for what, value in found if value is not None]


def _scores(run: RunFiles) -> list[str]:
  """The first few scores of held-out data; their changes are told beside them."""
  names = [name for name in run.series if name.startswith("eval/") and name != "eval/epoch"]
  return [name for name in sorted(names) if name.removesuffix("_change") not in {*names} - {name}][:3]


def _final_scores(run: RunFiles) -> list[tuple[str, str | None]]:
  """The scores of the final model: of the only set, or of each set by its name."""
  scores = run.scores
  sets = {"": scores} if "num_questions" in scores else {f"{name} ": of for name, of in scores.items()}
  return [
    (f"{name}{metric} at the end".replace("_", " "), _scored(value, of.get(f"{metric}_change")))
    for name, of in sets.items()
    for metric, value in of.items()
    if metric != "num_questions" and not metric.endswith("_change") and isinstance(value, int | float)
  ][:4]


def _scored(value: Any, change: Any) -> str | None:
  """A score, and its change since the start where that is known."""
  text, changed = _number(value, "{:.4g}"), _number(change, "{:+.4g}")
  return text if text is None or changed is None else f"{text} ({changed} since the start)"


def _score_name(name: str) -> str:
  return name.removeprefix("eval/").replace("_", " ").replace("/", " ")


def _latest(run: RunFiles, name: str) -> float | None:
  series = run.series.get(name)
  return series.values[-1] if series and series.values else None


def _last(run: RunFiles, name: str, form: str) -> str | None:
  return _number(_latest(run, name), form)


def _number(value: Any, form: str) -> str | None:
  return form.format(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _gib(value: float | None) -> str | None:
  return None if value is None else f"{value / 2**30:.1f} GiB"


def _duration(seconds: Any) -> str | None:
  return str(datetime.timedelta(seconds=round(seconds))) if isinstance(seconds, int | float) else None


def _devices(start: Mapping[str, Any]) -> str:
  hosts = f" on {start['processes']} processes" if start["processes"] > 1 else ""
  return f"{start['devices']} × {start['device_kind']}{hosts}"


def samples(run: RunFiles) -> dict[str, Any]:
  """The ledger of samples: `events` that happened, and `rows` by dataset with their counts; the last row is the sum."""
  data: dict[str, dict[str, int]] = run.state.get("data", {})
  events = [event for event in EVENTS if any(counts.get(event) for counts in data.values())]
  named = list(data.items())
  if len(named) > 1:
    keys = ("samples", *events)
    named.append(("all", {key: sum(counts.get(key, 0) for counts in data.values()) for key in keys}))
  rows = []
  for name, counts in named:
    read = counts.get("samples", 0)
    lost = sum(counts.get(event, 0) for event in _LOST)
    counted = [counts.get(event, 0) for event in events]
    share = f"{lost / read:.2%}" if read else ""
    rows.append({"name": name, "read": read, "learned": read - lost, "counts": counted, "lost": share})
  return {"events": [EVENTS[event] for event in events], "rows": rows}


def reasons(run: RunFiles) -> list[tuple[str, list[str]]]:
  """For each dataset, why some of its lines are lost."""
  return [(one["name"], one["examples"]) for one in run.facts.get("data", []) if one["examples"]]


def histograms(run: RunFiles) -> list[dict[str, Any]]:
  """For each dataset, bars of its lines by tokens and by tiles: {"name", "lines", "tokens", "tiles"}."""
  return [
    {
      "name": one["name"],
      "lines": one["lines"],
      "tokens": bars(_by_doubling(one["tokens"])),
      "tiles": bars(_grouped(one["tiles"])),
    }
    for one in run.facts.get("data", [])
    if one["tokens"]
  ]


def _by_doubling(counts: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
  """Half of a doubling to a bar, those between the first and the last that are empty included."""
  found: dict[int, int] = {}
  for tokens, count in counts:
    # Bins begin at 2^(i/4), rounded up.
    place = math.floor(2 * math.log2(max(tokens, 1)))
    found[place] = found.get(place, 0) + count
  places = range(min(found), max(found) + 1)
  return [(f"{math.ceil(2 ** (place / 2)):,}", found.get(place, 0)) for place in places]


def _grouped(counts: Sequence[Sequence[int]], most: int = 16) -> list[tuple[str, int]]:
  """A bar for each number; where there are many, for equal ranges of them."""
  if not counts:
    return []
  width = math.ceil((counts[-1][0] + 1) / most)
  found: dict[int, int] = {}
  for tiles, count in counts:
    found[tiles // width] = found.get(tiles // width, 0) + count
  places = range(min(found), max(found) + 1)
  label = (
    (lambda place: f"{place}") if width == 1 else (lambda place: f"{place * width}–{(place + 1) * width - 1}")
  )
  return [(label(place), found.get(place, 0)) for place in places]


def bars(counts: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
  """Bars with their share of the longest, in percent."""
  most = max((count for _, count in counts), default=0)
  return [
    {"label": label, "count": count, "percent": round(100 * count / most, 1) if most else 0}
    for label, count in counts
  ]


def predictions(run: RunFiles) -> list[dict[str, Any]]:
  """For each held-out set, its samples with what was predicted at each evaluation: {"name", "samples", "left_out"}.

  A sample is known by its question, answer and pictures; the same prediction at evaluations that follow each other is one
  row.
  """
  budget, found = _Pictures(run), []
  for name, by_step in run.shown.items():
    samples: dict[str, dict[str, Any]] = {}
    for step, lines in by_step.items():
      for line in lines:
        key = json.dumps([line["question"], line["answer"], line["pictures"]])
        sample = samples.setdefault(key, {**line, "rows": []})
        _add_row(sample["rows"], step, line)
    chosen = list(samples.values())[:MOST_SHOWN]
    for sample in chosen:
      wanted = sample["answer"]
      sample["wanted"] = wanted if isinstance(wanted, list) else [wanted]
      sample["sources"] = [budget.source(picture) for picture in sample["pictures"]]
    found.append({"name": name, "samples": chosen, "left_out": len(samples) - len(chosen)})
  return found


def _add_row(rows: list[dict[str, Any]], step: int, line: Mapping[str, Any]) -> None:
  scores = [(name, f"{value:.4g}") for name, value in line["scores"].items()]
  if rows and (rows[-1]["prediction"], rows[-1]["scores"]) == (line["prediction"], scores):
    rows[-1]["last"] = step
  else:
    rows.append({"first": step, "last": step, "prediction": line["prediction"], "scores": scores})


class _Pictures:
  """Pictures as they are put into a page, up to `PICTURE_BYTES` of them."""

  def __init__(self, run: RunFiles):
    self._run, self._left, self._known = run, PICTURE_BYTES, dict[str, str | None]()

  def source(self, name: str) -> str | None:
    """The picture as a data: URL; None where it is not there, or does not fit."""
    if name not in self._known:
      content = self._run.picture(name)
      self._known[name] = None
      if content is not None and len(content) <= self._left:
        self._left -= len(content)
        self._known[name] = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    return self._known[name]


def settings(run: RunFiles) -> dict[str, Any]:
  """The settings: what differs from the `recipe`, as rows (path, there, here), and `whole`, all of them by leaf."""
  starts = run.facts.get("starts", [])
  last = starts[-1] if starts else {"recipe": None, "changed": None}
  changed = last["changed"]
  return {
    "recipe": last["recipe"],
    "changed": None
    if changed is None
    else [(path, _value(there), _value(here)) for path, there, here in changed],
    "whole": [
      (leaf, [(name, _value(value)) for name, value in fields.items()]) for leaf, fields in run.config.items()
    ],
  }


def _value(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


def starts(run: RunFiles) -> list[dict[str, Any]]:
  """The starts of the run, the last one first, with what each phase of the way to the first step took."""
  found = []
  for start in reversed(run.facts.get("starts", [])):
    phases = [(name, seconds) for name, seconds in start.get("phases", []) if seconds >= 0.05]
    beside = [(name, f"{seconds:.1f} s") for name, seconds in start.get("beside", []) if seconds >= 0.05]
    most = max((seconds for _, seconds in phases), default=0.0)
    shown = [
      {"label": name, "count": f"{seconds:.1f} s", "percent": round(100 * seconds / most, 1)}
      for name, seconds in phases
    ]
    seconds = start.get("seconds_to_first_step")
    whole = None if seconds is None else f"{seconds:.1f} s"
    found.append(
      {
        **start,
        "time": f"{datetime.datetime.fromisoformat(start['time']):%Y-%m-%d %H:%M} UTC",
        "command": start["command"].replace(" --", " \\\n  --"),
        "whole": whole,
        "bars": shown,
        "beside_them": beside,
        "where": _devices(start),
      }
    )
  return found
