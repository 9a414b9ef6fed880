"""The report of a run: what it says, of runs of all kinds, and how a browser shows it."""

import html
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from internvl_jax.config import TrainConfig, to_json
from internvl_jax.errors import UserError
from internvl_jax.eval.shown import Picture, Shown, ShownFiles
from internvl_jax.metrics.writers.json_files import LogFiles
from internvl_jax.reporting import curves, page, sections
from internvl_jax.reporting.page import render, write_report
from internvl_jax.reporting.run_files import Series, read_run, read_series
from tests.support import browser, forked

HOSTILE = '</script><script>alert("x")</script><img src="https://example.com/x.png" onerror=alert(1)>'
DATA = {
  "one": {"samples": 1000, "unreadable": 3, "over_long": 2, "truncated": 7},
  "two": {"samples": 500, "fully_masked": 5},
}
START = {
  "time": "2026-11-28T20:11:02+00:00",
  "host": "here",
  "command": "python -m internvl_jax.train --config mine.py --config.training.learning_rate=2e-5",
  "step": 0,
  "processes": 2,
  "devices": 8,
  "platform": "tpu",
  "device_kind": "TPU v5 lite",
  "versions": {"jax": "0.12.0"},
  "recipe": "mine.py",
  "changed": [["training.learning_rate", 4e-5, 2e-5], ["data.meta_path", None, HOSTILE]],
}
TIMES = {
  "seconds_to_first_step": 9.5,
  "phases": [["imports", 4.0], ["weights", 5.5]],
  "beside": [["compile", 3.0]],
}
SIZES = {
  "name": "one",
  "lines": 1000,
  "tokens": [[64, 10], [91, 20], [1024, 970]],
  "tiles": [[0, 400], [1, 500], [33, 100]],
  "examples": [f"one.jsonl:3: {HOSTILE}"],
}


def entry(step, **others):
  return {
    "step": step,
    "epoch": step / 100,
    "loss": 4.0 / step,
    "learning_rate": 1e-5,
    "grad_norm": 1.0,
    **others,
  }


def run_at(folder, *, state=True, starts=(START | TIMES,), steps=40, shown=True):
  """A run's directory, with what is asked for."""
  config = TrainConfig()
  config.training.run_name = f"mine {HOSTILE}"
  (folder / "train_config.json").write_text(json.dumps(to_json(config)))
  log = LogFiles(folder)
  log.start(0)
  for step in range(1, steps + 1):
    log.add_entry(entry(step, data_seconds_per_step=0.1, seconds_per_step=1.0, mfu=0.4))
  changes = {"eval_docvqa/anls_change": -0.125, "eval_accuracy_cats_change": 0.5}
  scores = {"eval_docvqa/anls": 0.5, "eval_accuracy": 0.25, "eval_accuracy_cats": 0.75}
  log.add_entry({"step": steps, "epoch": 1.0, **scores, **changes})
  log.close()
  if starts:
    (folder / "run_facts.json").write_text(json.dumps({"starts": list(starts), "data": [SIZES]}))
  if state:
    whole = {"global_step": steps, "max_steps": steps, "data": DATA, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(whole))
    results = {"docvqa": {"anls": 0.5125, "anls_change": 0.0125, "num_questions": 8}}
    (folder / "eval_results.json").write_text(json.dumps(results))
    (folder / "train_results.json").write_text(json.dumps({"train_runtime": 61.0}))
  if shown:
    files, picture = ShownFiles(folder), Picture.of(Image.new("RGB", (600, 300), "green"))
    for step, prediction in ((10, "red"), (20, HOSTILE), (30, "green"), (40, "green")):
      line = {
        "question": f"Which? {HOSTILE}",
        "answer": ["green", "lime"],
        "scores": {"anls": float(step > 20)},
      }
      files.write(step, "colors", [Shown(**line, prediction=prediction, pictures=(picture,))])
  return folder


def texts(rendered):
  return re.sub(
    r"\s+", " ", html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", rendered, flags=re.S))
  )


def test_a_whole_run(tmp_path):
  run = read_run(run_at(tmp_path))
  assert dict(sections.summary(run, ended=False)) == {
    "status": "finished",
    "steps": "40 of 40",
    "epochs": "0.40",
    "loss": "0.1000",
    "accuracy": "0.25",
    "accuracy cats": "0.75 (+0.5 since the start)",
    "docvqa anls": "0.5 (-0.125 since the start)",
    "docvqa anls at the end": "0.5125 (+0.0125 since the start)",
    "time of a step": "1 s",
    "MFU": "40.0%",
    "time of the last start": "0:01:01",
    "devices": "8 × TPU v5 lite on 2 processes",
  }
  found = texts(render(run))
  assert "all 1,500 1,490 0.67% 3 2 5 7" in found
  assert "training.learning_rate 4e-05 2e-05" in found and "Changed from the recipe mine.py" in found
  assert (
    "From the command to the first step: 9.5 s" in found and "--config.training.learning_rate=2e-5" in found
  )
  charts = {chart["title"]: chart for chart in curves.charts(run.series)}
  assert list(charts)[-4:] == [
    "Held out: accuracy",
    "Held out: accuracy, change since the start",
    "Held out: anls",
    "Held out: anls, change since the start",
  ]
  assert [curve["name"] for curve in charts["Held out: accuracy"]["curves"]] == ["all", "cats"]


def test_all_that_comes_from_the_run_is_escaped(tmp_path):
  rendered = render(read_run(run_at(tmp_path)))
  assert HOSTILE in texts(rendered) and HOSTILE not in rendered
  assert rendered.count("<script") == 2 and '<img src="https' not in rendered


def test_predictions_over_time(tmp_path):
  run = read_run(run_at(tmp_path))
  ((name, samples),) = [(one["name"], one["samples"]) for one in sections.predictions(run)]
  (sample,) = samples
  rows = [(row["first"], row["last"], row["prediction"], row["scores"]) for row in sample["rows"]]
  assert (name, sample["wanted"]) == ("colors", ["green", "lime"])
  assert rows == [
    (10, 10, "red", [("anls", "0")]),
    (20, 20, HOSTILE, [("anls", "0")]),
    (30, 40, "green", [("anls", "1")]),
  ]
  assert sample["sources"][0].startswith("data:image/jpeg;base64,")


def test_pictures_beyond_the_budget_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(sections, "PICTURE_BYTES", 100)
  run = read_run(run_at(tmp_path))
  assert "data:image" not in render(run).partition("<body>")[2] and "pictures/" in texts(render(run))


def test_runs_that_have_less(tmp_path):
  """One under way before its first save, one that was just started, one of a version that recorded less, none."""
  folders = [tmp_path / name for name in "abcd"]
  for folder in folders:
    folder.mkdir()
  early = run_at(folders[0], state=False, shown=False, starts=(START,))
  (early / "run.lease").write_text("{}")
  with (early / "log").joinpath("99.jsonl").open("w") as file:
    file.write('{"start": 4}\n{"step": 5, "lo')
  run = read_run(early)
  assert sections.status(run, ended=False) == "running" and sections.last_step(run) == 4
  assert sections.status(run, ended=True) == "stopped"
  os.utime(early / "run.lease", (1e9, 1e9))  # Left behind by a crash.
  assert sections.status(read_run(early), ended=False) == "stopped"
  assert "Samples are counted at each save" in texts(render(run))
  (folders[1] / "train_config.json").write_text("{}")
  found = texts(render(read_run(folders[1])))
  assert "status started" in found and "Nothing was logged yet." in found and "Not recorded." in found
  old = {"global_step": 3, "max_steps": 8, "log_history": [entry(1), entry(2), entry(3)], "data": DATA}
  (folders[2] / "train_config.json").write_text("{}")
  (folders[2] / "trainer_state.json").write_text(json.dumps(old))
  run = read_run(folders[2])
  assert list(run.series["train/loss"].steps) == [1, 2, 3] and sections.status(run, ended=True) == "stopped"
  assert "3 of 8" in texts(render(run))
  with pytest.raises(UserError, match="is no output directory of a run"):
    read_run(folders[3])


def test_a_start_replaces_what_was_logged_after_its_step(tmp_path):
  (tmp_path / "1.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in ({"start": 2}, entry(3), entry(4)))
  )
  (tmp_path / "2.jsonl").write_text('{"start": 3}\n' + json.dumps(entry(4) | {"loss": 9.0}) + "\n")
  history = [entry(1), entry(2), entry(3) | {"loss": 7.0}]
  loss = read_series(tmp_path, history)["train/loss"]
  assert list(zip(loss.steps, loss.values, strict=True)) == [(1, 4.0), (2, 2.0), (3, 4.0 / 3), (4, 9.0)]


def test_of_many_points_extremes_stay():
  series = Series()
  for step in range(1, 100_001):
    series.add(step, 1000.0 if step == 77_777 else float(step % 2))
  found = curves.decimated(series)
  assert len(found["x"]) == len(found["y"]) == curves.MOST_POINTS
  assert (max(found["high"]), min(found["low"]), found["last"]) == (1000.0, 0.0, 0.0)
  np.testing.assert_allclose(found["y"][:100], 0.5, atol=0.005)
  few = curves.decimated(series, most=200_000)
  assert "low" not in few and len(few["x"]) == 100_000


def test_values_that_are_not_finite_are_left_out():
  series = Series()
  for step, value in ((1, 1.0), (2, float("nan")), (3, float("inf"))):
    series.add(step, value)
  assert curves.decimated(series)["x"] == [1]


def test_the_page_is_one_file(tmp_path):
  rendered = write_report(run_at(tmp_path), tmp_path / "report.html").read_text()
  tags = " ".join(re.findall(r"<[a-z]+ [^>]*>", rendered))
  links = re.findall(r' (?:src|href)="([^"]*)"', tags)
  assert links and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
  assert "url(" not in rendered and "@import" not in rendered


def test_the_command(tmp_path):
  environment = os.environ | {"PYTHONPATH": str(forked.REPOSITORY)}
  command = ["-m", "internvl_jax.report", "--output", str(tmp_path / "page.html")]
  done = forked.run([*command, str(run_at(tmp_path))], environment=environment, folder=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(tmp_path / "page.html") and (tmp_path / "page.html").is_file()
  done = forked.run(command, environment=environment, folder=tmp_path)
  assert done.returncode == 1 and "name the output directory of one run" in done.stderr


LOUD = """(() => {
  const svg = document.querySelector('.plot');
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 10, clientY: box.top + 9}));
  return svg.closest('figure').querySelector('.reading').textContent.replace(/\\s+/g, ' ').trim();
})()"""
LOG = """(() => {
  const figure = document.querySelector('.chart'), before = figure.querySelector('.curve[d]').getAttribute('d');
  figure.querySelector('button.log').click();
  const slider = document.getElementById('smoothing'), log = figure.querySelector('.curve[d]').getAttribute('d');
  slider.value = 0.9;
  slider.dispatchEvent(new Event('input'));
  return [before !== log, log !== figure.querySelector('.curve[d]').getAttribute('d'),
          !!figure.querySelector('.raw'), slider.nextElementSibling.textContent];
})()"""


@pytest.mark.skipif(browser.BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_in_a_browser(tmp_path):
  """Nothing is asked for but the page, nothing of the run is executed, and a telephone need not scroll sideways."""
  (tmp_path / "run").mkdir()
  file = write_report(run_at(tmp_path / "run"), tmp_path / "report.html")
  expressions = (
    "[document.documentElement.scrollWidth, innerWidth]",
    "document.querySelectorAll('.plot path').length",
    "[...document.images].every(image => image.complete && image.naturalWidth === 448)",
    LOUD,
    LOG,
  )
  with browser.browser(tmp_path / "profile") as at:
    for width in (1280, 390):
      seen = browser.look(at, file, width=width, expressions=expressions)
      assert [url for url in seen.requests if not url.startswith("data:")] == [file.resolve().as_uri()]
      assert seen.errors == []
      widths, paths, pictures, reading, changed = seen.answers
      assert widths == [width, width]
      assert paths == 11 and pictures
      assert reading == "step 40 0.1"
      assert changed == [True, True, True, "0.9"]
  assert page._policy("", "").startswith("default-src 'none'; img-src data:; ")
