"""The doctor finds what a run would lose, and says so by its status."""

import json
import os
import re
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from internvl_jax.config import TrainConfig
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.doctor import run
from internvl_jax.hf.tokenizer import load_tokenizer
from tests.support import forked
from tests.support.toy import ASSETS, CURVE

RECIPE = """
from tests.support.toy import curve_config

def get_config(arg):
  config = curve_config("unused")
  config.data.meta_path = arg
  return config
"""


@pytest.fixture
def data(tmp_path):
  """A copy of the curve's data."""
  folder = shutil.copytree(CURVE / "data", tmp_path / "data")
  (tmp_path / "recipe.py").write_text(RECIPE)
  return folder


def doctor(data, *flags):
  recipe = data.parent / "recipe.py"
  command = ["-m", "internvl_jax.doctor", f"--config={recipe}:{data / 'meta.json'}"]
  command += [f"--config.loader.cache_dir={data.parent / 'cache'}", *map(str, flags)]
  return forked.run(command, environment=os.environ, folder=data.parent)


def test_good_data(data, tmp_path):
  packed = ("--config.data.use_packed_ds=True", "--config.data.max_packed_tokens=1024")
  done = doctor(
    data, "--dump", tmp_path / "out.jsonl", "--picture", tmp_path / "sizes.png", "--show=1", *packed
  )
  assert done.returncode == 0, done.stderr
  assert "nothing would be lost" in done.stdout
  with Image.open(tmp_path / "sizes.png") as picture:
    assert picture.width > picture.height and len(picture.convert("L").getcolors()) > 2
  assert "packed rows an epoch: " in done.stdout and "»circle<|im_end|>«" in done.stdout
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  source = (data / "train.jsonl").read_text().splitlines()
  assert len(lines) == len(source) == 24
  tokenizer = load_tokenizer(CURVE / "init")
  for number, (line, record) in enumerate(zip(lines, map(json.loads, source), strict=True)):
    assert line["index"] == number and line["dataset"] == "easy"
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    supervised = tokenizer.decode([token for token in line["labels"] if token != -100])
    assert supervised == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert line["input_ids"].count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 4 * line["num_tiles"]


def test_waiting_is_told_for_the_numbers_of_devices_that_data_suffice_for():
  sizes = np.load(ASSETS / "packing_sizes.npz")["sizes"].astype(np.int64)
  mixture = types.SimpleNamespace(
    sizes=np.array([len(sizes)]),
    num_samples=len(sizes),
    size_of=lambda indices: sizes[indices],
    lengths_of=lambda indices: sizes[indices, 0],
  )
  config = TrainConfig()
  config.data.use_packed_ds, config.data.max_packed_tokens, config.data.num_images_expected = True, 8192, 40
  cost = RowCost(per_tile=775 * UNIT, per_pair=UNIT // 8192)
  stats = run.fill(mixture, pack_settings(config.data))
  assert run.fill_line(stats).startswith(
    "1,373 packed rows an epoch: 100.0 % of their tokens and 67.8 % of their tiles"
  )
  lines = run.waiting_lines(config, mixture, cost, stats.rows)
  assert [line.split()[0] for line in lines] == ["8", "64"]
  numbers = [list(map(float, re.findall(r"(\d\.\d+) times", line))) for line in lines]
  assert all(1.05 < before < 1.2 and 1 < after < 1.02 for before, after in numbers), lines
  assert lines[0].endswith("balanced over 64 steps")
  config.loader.balance_steps = 0
  assert all("balanced" not in line for line in run.waiting_lines(config, mixture, cost, stats.rows))
  assert len(run.waiting_lines(config, mixture, cost, 64)) == 1 and not run.waiting_lines(
    config, mixture, cost, 63
  )


def test_what_would_be_lost_is_named(data):
  lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
  with_image = [
    i for i, line in enumerate(lines) if line.get("image") and not isinstance(line["image"], list)
  ]
  cut, gone, masked = with_image[:3]
  names = [name for line in lines for name in [line.get("image")] if isinstance(name, str)]
  picture = next((data / "images").rglob("*.png"))
  (data / "images/cut.png").write_bytes(picture.read_bytes()[:200])
  lines[cut]["image"] = str(names[0]).replace(os.path.basename(str(names[0])), "cut.png")
  lines[gone]["image"] = "nowhere.png"
  lines[masked]["conversations"] = lines[masked]["conversations"][:1]
  (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  done = doctor(data, "--dump", data / "out.jsonl", "--show=24")
  assert done.returncode == 1, done.stdout + done.stderr
  assert "3 of 24 lines would be lost" in done.stdout
  lost = [line for line in done.stdout.splitlines() if line.startswith("lost: ")]
  assert len(lost) == 3
  for number, cause in (
    (gone, "image not found"),
    (masked, "no token is supervised"),
    (cut, "cannot be decoded"),
  ):
    assert any(f"train.jsonl:{number + 1} " in line and cause in line for line in lost), (cause, lost)
  # What can be decoded is shown and dumped all the same, and what cannot is named.
  starts = [line.split(": ")[0] for line in done.stdout.splitlines()]
  assert starts.count("not shown") == 2 and starts.count("not dumped") == 2
  assert len((data / "out.jsonl").read_text().splitlines()) == 22
