"""The certificate: one page of Markdown, and the same as HTML without anything to load."""

import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from internvl_jax.certify.comparison import first_departure, largest_difference
from internvl_jax.certify.findings import Finding, Status
from internvl_jax.certify.ours import Ours
from internvl_jax.certify.recording import Recording

_MARKS = {Status.AGREES: "✓", Status.KNOWN: "~", Status.DEPARTS: "✗", Status.ABSENT: "·"}
_HEAD = ("", "stage", "agrees to", "compared", "where and why")


def verdict(findings: Sequence[Finding]) -> str:
  """The result in a sentence or two."""
  first = first_departure(list(findings))
  if first is not None:
    cause = f" Probable cause: {first.cause}." if first.cause else ""
    return f"Departs, first in {first.stage}: {first.where}.{cause}"
  known = [finding.stage for finding in findings if finding.status is Status.KNOWN]
  told = f" Known differences: {', '.join(known)}." if known else ""
  missing = [finding.stage for finding in findings if finding.status is Status.ABSENT]
  left = f" Not compared: {', '.join(missing)}." if missing else ""
  return f"Agrees; the largest relative difference is {largest_difference(list(findings)):.1e}.{told}{left}"


def table(findings: Sequence[Finding]) -> str:
  """The findings for a terminal: a line each, and a second one where there is something to say."""
  width = max(len(finding.stage) for finding in findings)
  lines = []
  for finding in findings:
    lines.append(
      f"{_MARKS[finding.status]} {finding.stage:<{width}}  {finding.digits:<11}  {finding.compared}".rstrip()
    )
    lines += [f"  {'':<{width}}  {text}" for text in (finding.where, finding.cause) if text]
  return "\n".join(lines)


def facts(recording: Recording, ours: Ours) -> dict[str, str]:
  """What was compared with what."""
  manifest = recording.manifest
  return {
    "checkpoint": f"{manifest['model']} (theirs), {ours.source.folder} (ours)",
    "samples": f"{len(manifest['samples'])} of {ours.meta}; gradients of {len(recording.deep)}",
    "theirs": f"{manifest['class']}, samples by {manifest['pipeline']}; {_listed(manifest['versions'])}",
    "ours": f"internvl_jax; {_listed(_versions())}",
    "settings": f"template {ours.tokenizer.template.name}, {_listed(manifest['settings']) or 'as the checkpoint says'}",
  }


def _versions() -> dict[str, str]:
  names = ("jax", "flax", "transformers", "numpy", "pillow")
  device = jax.devices()[0].device_kind
  return {
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in names},
    "device": device,
  }


def _listed(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())


def _rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
  return [
    (
      _MARKS[finding.status],
      finding.stage,
      finding.digits,
      finding.compared,
      ". ".join(text for text in (finding.where, finding.cause) if text),
    )
    for finding in findings
  ]


_KEY = (
  "Both compute in float32. ✓ agrees, ~ a difference that the documentation tells, ✗ departs, · not compared. Digits are those "
  "of the largest relative difference. The model is compared on their token ids and pixels, so that no stage inherits a "
  "difference of samples."
)


def markdown(findings: Sequence[Finding], said: Mapping[str, str]) -> str:
  """The page as Markdown."""

  def cells(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

  lines = ["# Certificate", "", verdict(findings), "", cells(_HEAD), "|" + "---|" * len(_HEAD)]
  lines += [cells(row) for row in _rows(findings)]
  lines += ["", _KEY, ""]
  lines += [f"- {name}: {value}" for name, value in said.items()]
  return "\n".join(lines) + "\n"


_STYLE = (
  "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222;background:#fff}"
  "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem;"
  "border-bottom:1px solid #ddd;overflow-wrap:anywhere}.verdict{font-size:1.15rem;padding:.8rem 1rem;border-radius:.4rem}"
  ".agrees{background:#e6f4ea}.departs{background:#fce8e6}td.agrees,td.departs{background:none}td.agrees{color:#137333}"
  "td.departs{color:#b3261e}dt{font-weight:600}dd{margin:0 0 .4rem}.wide{overflow-x:auto}"
)


def page(findings: Sequence[Finding], said: Mapping[str, str]) -> str:
  """The page as HTML."""
  departs = first_departure(list(findings)) is not None
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _HEAD)
  rows = []
  for finding, row in zip(findings, _rows(findings), strict=True):
    kind = {Status.AGREES: "agrees", Status.DEPARTS: "departs"}.get(finding.status, "")
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
    rows.append(f'<tr><td class="{kind}">{row[0]}</td>{cells}</tr>')
  listed = "".join(
    f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in said.items()
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Certificate</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<style>{_STYLE}</style></head><body><h1>Certificate</h1>"
    f'<p class="verdict {"departs" if departs else "agrees"}">{html.escape(verdict(findings))}</p>'
    f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div><p>{html.escape(_KEY)}</p>'
    f"<dl>{listed}</dl></body></html>\n"
  )


def write(folder: Path, findings: Sequence[Finding], said: Mapping[str, str]) -> None:
  """Writes certificate.md and certificate.html."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "certificate.md").write_text(markdown(findings, said), encoding="utf-8")
  (folder / "certificate.html").write_text(page(findings, said), encoding="utf-8")
