"""The measurement of forgetting: its halves of the questions, what it chooses, and a run of two steps of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import load
from tests.support.toy import REPOSITORY

forgetting = load(REPOSITORY / "benchmarks" / "forgetting.py")


def test_halves_share_no_image():
  kinds = ("color", "shape", "yes_no_color", "yes_no_shape")
  lines = [{"image": f"test/{i // 4}.png", "type": kinds[i % 4]} for i in range(24)]
  found = forgetting.halves(lines)
  assert {name: len(of) for name, of in found.items()} == dict.fromkeys(
    ("new", "new-chosen-by", "old", "old-chosen-by"), 6
  )
  assert {line["type"] for line in found["new"]} == {"color", "yes_no_color"}
  images = {name: {line["image"] for line in of} for name, of in found.items()}
  assert images["new"] == images["old"] and not images["new"] & images["new-chosen-by"]


QUESTIONS = {
  "color": [("what color is the shape?", "red"), ("what color is the shape?", "teal")],
  "yes_no_color": [("is there a blue shape?", "no"), ("is there a gray shape?", "yes")],
  "shape": [("what shape is there?", "circle")],
  "yes_no_shape": [("is there a circle?", "yes")],
}


def lines_of(entry):
  return Path(entry["annotation"]).read_text().splitlines()


def test_the_start_learns_everything_and_fine_tuning_no_shapes(tmp_path):
  (tmp_path / "data/train").mkdir(parents=True)
  meta, test = {}, []
  for kind, questions in QUESTIONS.items():
    lines = [
      {"image": f"test/{i}.png", "type": kind, "conversations": [{"value": asked}, {"value": answer}]}
      for i, (asked, answer) in enumerate(questions)
    ]
    (tmp_path / f"data/train/{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta[kind] = {
      "root": "images",
      "annotation": f"train/{kind}.jsonl",
      "length": len(lines),
      "repeat_time": 4,
    }
    test += lines
  (tmp_path / "data/meta.json").write_text(json.dumps(meta))
  (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test))
  experiment = forgetting.Experiment(data=tmp_path, out=tmp_path / "out")
  forgetting.write_data(experiment)
  begun, colors = (
    json.loads((tmp_path / f"out/data/{name}.json").read_text()) for name in ("start", "colors")
  )
  assert set(begun) == set(meta) and set(colors) == {"color", "yes_no_color"}
  assert {kind: begun[kind] for kind in colors} == colors
  assert all(
    entry["repeat_time"] == 4 and len(lines_of(entry)) == entry["length"] for entry in begun.values()
  )
  sets = json.loads(forgetting.sets(experiment))
  counts = {name: len(lines_of(entry)) for name, entry in sets.items()}
  assert counts == {"new": 2, "new-chosen-by": 2, "old": 0, "old-chosen-by": 2}


BEGUN = dict.fromkeys(("new", "new-chosen-by", "old", "old-chosen-by"), 0.8)


def way(new, old, by_new, by_old):
  return {"new": new, "old": old, "new-chosen-by": by_new, "old-chosen-by": by_old}


SCORES = {
  "plain": way(0.9, 0.3, 0.9, 0.3),
  "ema 0.9": way(0.7, 0.8, 0.7, 0.8),
  "ema 0.5": way(0.8, 0.5, 0.8, 0.5),
  "weight 0.0": way(0.1, 0.8, 0.1, 0.8),
  "weight 0.5": way(0.85, 0.79, 0.895, 0.6),
  "weight 0.6": way(0.9, 0.75, 0.9, 0.7),
  "weight 0.7": way(0.9, 0.85, 0.88, 0.85),
}


def test_settings_are_chosen_by_the_other_half():
  """The best of what is old at most a point below the best of what is new; or else what is new decides."""
  other = {name: {**of, "new": of["new"] - 0.1} for name, of in SCORES.items()}
  found = {row["way"]: row for row in forgetting.compare(BEGUN, [SCORES, other])}
  assert [name for name, row in found.items() if row["chosen"]] == ["plain", "ema 0.5", "weight 0.6"]
  row = found["weight 0.5"]
  assert (row["new"], row["old"]) == pytest.approx((0.8, 0.79))
  assert (row["kept"], row["lost"]) == pytest.approx((0.79 / 0.8, 0.05))
  assert row["by_seed"] == [(0.85, 0.79), (0.75, 0.79)]


def test_the_table_and_the_picture(tmp_path):
  rows = forgetting.compare(BEGUN, [SCORES])
  lines = forgetting.table(BEGUN, rows).splitlines()
  assert lines[2] == "| start | 0.8000 | 0.8000 | 100.0 % | |" and len(lines) == 3 + len(SCORES)
  assert "| **weight 0.6** | 0.9000 | 0.7500 | 93.8 % | 0.00 |" in lines
  pytest.importorskip("matplotlib")
  forgetting.draw(BEGUN, rows, tmp_path / "picture.png")
  assert 5_000 < (tmp_path / "picture.png").stat().st_size < 100_000


@pytest.mark.slow
def test_two_steps_of_everything(tmp_path):
  pytest.importorskip("easy_vqa")
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  commands = (
    ("scripts/quickstart_data.py", f"--out={tmp_path}"),
    ("benchmarks/forgetting.py", f"--data={tmp_path}", f"--out={tmp_path / 'out'}", "--seeds=1", "--toy"),
  )
  for command in commands:
    done = subprocess.run(
      [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
  found = json.loads((tmp_path / "out/forgetting.json").read_text())
  assert [row["way"] for row in found["ways"]] == ["plain", "l2 30", "weight 0.0", "weight 0.5", "weight 1.0"]
