"""The report as a page: HTML with style, script, data and pictures in it, which may ask for nothing else."""

import base64
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2

import internvl_jax
from internvl_jax.reporting import curves, sections
from internvl_jax.reporting.run_files import RunFiles, read_run
from internvl_jax.storage.paths import AnyPath, write_whole

_FOLDER = Path(__file__).parent


def write_report(folder: AnyPath, output: AnyPath, *, ended: bool = False) -> AnyPath:
  """Writes the report of a run; returns where it is.

  Args:
    folder: the run's output directory, here or in a bucket.
    output: the file to write.
    ended: the run is over, although it may still hold its directory.

  Raises:
    UserError: there is no run.
  """
  write_whole(output, render(read_run(folder), ended=ended).encode())
  return output


def render(run: RunFiles, *, ended: bool = False) -> str:
  """The page. All that comes from the run is escaped; the browser is told to load and to run nothing but what is here."""
  style, script = _text("page.css"), _text("page.js")
  charts = curves.charts(run.series)
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  return environment.from_string(_text("page.html")).render(
    policy=_policy(style, script),
    style=style,
    script=script,
    name=run.config.get("training", {}).get("run_name") or run.folder.absolute().name,
    folder=str(run.folder.absolute()),
    made=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    version=internvl_jax.__version__,
    status=sections.status(run, ended=ended),
    summary=sections.summary(run, ended=ended),
    charts=charts,
    curves=_embedded(charts),
    samples=sections.samples(run),
    reasons=sections.reasons(run),
    histograms=sections.histograms(run),
    predictions=sections.predictions(run),
    settings=sections.settings(run),
    starts=sections.starts(run),
  )


def _policy(style: str, script: str) -> str:
  """The content security policy: this style and this script, pictures that are in the page, and nothing else."""
  hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
  return "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)


def _embedded(value: Any) -> str:
  """JSON that ends no element of HTML."""
  return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _text(name: str) -> str:
  return (_FOLDER / name).read_text(encoding="utf-8")
