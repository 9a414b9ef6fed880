"""States of checkpoints and caches on disk that version 0.1.0 wrote are read as they were meant.

`tests/assets/earlier/` was written by that version, by `record` at the end of this file, from the same datasets.
"""

import hashlib
import json
import os
import re
import shutil
import types

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.line_digests import digests_of
from internvl_jax.data.source.sizes import index_folder
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.lines import PairLines
from tests.support.data_toys import ASSETS, arguments, resumed, turns, write_dataset, write_jsonl

EARLIER = ASSETS / "earlier"
PACKED = {"use_packed_ds": True, "max_packed_tokens": 200, "num_images_expected": 12, "strict_mode": False}
STEPS = 2
FACTS = ("preference", "share_prompts")


def write_text(folder, name, records):
  write_jsonl(folder / f"{name}.jsonl", records)
  meta = folder / "meta.json"
  meta.write_text(json.dumps({name: {"root": "", "annotation": f"{name}.jsonl"}}))
  return meta


def shuffled(folder):
  """Rows of one sample of two datasets, one of them seen twice an epoch."""
  write_dataset(folder, 7, name="first", repeat_time=2)
  return write_dataset(folder, 4, name="second"), {}, {}


def packed(folder):
  """Packed rows, of which one sample is split and one is lost."""
  meta = write_dataset(folder, 23)
  with (folder / "toy.jsonl").open("a") as file:
    file.write(json.dumps({"conversations": turns("hi", "red " * 300)}) + "\n")
    file.write(json.dumps({"image": "gone.png", "conversations": turns("<image>\nhi", "red")}) + "\n")
  return meta, PACKED, {}


def pairs(folder):
  """Packed rows of preference pairs that share their prompts."""
  records = [
    {"question": f"what is number {i}?", "chosen": "red " * (1 + i % 5), "rejected": "no"} for i in range(17)
  ]
  return write_text(folder, "pairs", records), PACKED, {"task": PairData(lines=PairLines(share_prompts=True))}


CASES = {"shuffled": shuffled, "packed": packed, "pairs": pairs}


def make_loader(case, folder, tokenizer, state=None):
  meta, data, task = CASES[case](folder)
  training = TrainingArguments(
    per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=6, disable_tqdm=True
  )
  loader = LoaderConfig(cache_dir=str(folder / "cache"), on_bad_sample="drop", max_bad_fraction=1)
  opened = TrainLoader(arguments(meta, **data), training, loader, tokenizer, tokens_per_tile=4, **task)
  return resumed(opened, state)


def digest_of(batch):
  """A digest of the tokens of a batch; tiles vary with the version of Pillow."""
  rows = getattr(batch, "rows", batch)
  names = ("input_ids", "targets", "loss_weight", "positions", "segment_ids", "image_index")
  arrays = [np.ascontiguousarray(getattr(rows, name)) for name in names]
  return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def cache_of(folder):
  """The files of a cache, by names without what hashes the path and dates of an annotation file."""
  named = {}
  for path in sorted((folder / "cache").rglob("*")):
    parts = path.relative_to(folder / "cache").parts
    # Names of rows and pieces tell of the content, wherever it lies.
    kept = [p if p.startswith(("rows-", "pieces-")) else re.sub(r"-[0-9a-f]{16}", "", p) for p in parts]
    if path.is_file() and path.suffix in (".npy", ".npz", ".txt"):
      named["/".join(kept)] = path
  return named


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_then_goes_on_with_the_same_batches(case, tmp_path, tokenizer):
  then = json.loads((EARLIER / f"{case}.json").read_text())
  loader = make_loader(case, tmp_path, tokenizer, then["state"])
  assert [digest_of(batch) for batch in loader] == then["later"]
  loader.close()
  loader = make_loader(case, tmp_path, tokenizer)
  assert [digest_of(next(loader)) for _ in range(STEPS)] == then["earlier"]
  # What is not so of a kind of line is left out now.
  plan = {name: value for name, value in then["state"]["plan"].items() if value or name not in FACTS}
  assert json.loads(json.dumps(loader.get_state())) == {**then["state"], "plan": plan}
  loader.close()


@pytest.mark.parametrize("case", ["packed", "pairs"])
def test_a_cache_of_then_is_read(case, tmp_path, tokenizer, monkeypatch):
  make_loader(case, tmp_path, tokenizer).close()
  now, then = cache_of(tmp_path), EARLIER / case
  assert set(now) == {str(path.relative_to(then)) for path in then.rglob("*.*")}
  for name, path in now.items():
    assert path.suffix == ".npz" or path.read_bytes() == (then / name).read_bytes(), name
    shutil.copy(then / name, path)
  # Nothing is measured again but what could not be read.
  measured = []
  measure = SampleMaker.measure
  monkeypatch.setattr(
    SampleMaker,
    "measure",
    lambda self, record, *more: measured.append(record) or measure(self, record, *more),
  )
  make_loader(case, tmp_path, tokenizer).close()
  assert all(record.get("image") for record in measured)


def test_files_of_a_cache_are_named_as_they_were(tmp_path):
  file = types.SimpleNamespace(path="/data/toy.jsonl")
  assert index_folder(file, {"b": 1, "a": [2]}, tmp_path) == tmp_path / "toy-bbb4abab14dc6293"
  path = tmp_path / "a.jsonl"
  write_jsonl(path, [{"a": 1}])
  os.utime(path, ns=(5, 7))
  file = JsonlFile(path, "toy", cache=tmp_path / "cache")
  digests_of(file, 1, tmp_path / "cache")
  stat = path.stat()
  stamp = (str(path), stat.st_ino, 9, 7, stat.st_ctime_ns)
  texts = {"lines": f"{path} 9 7", "digests": f"{stamp} 1 1"}
  assert {found.stem for found in (tmp_path / "cache").iterdir()} == {
    f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}" for name, text in texts.items()
  }


def record(folder, tokenizer):
  """Writes `tests/assets/earlier`."""
  for case in CASES:
    (folder / case).mkdir()
    loader = make_loader(case, folder / case, tokenizer)
    earlier = [digest_of(next(loader)) for _ in range(STEPS)]
    state = loader.get_state()
    content = {"state": state, "earlier": earlier, "later": [digest_of(batch) for batch in loader]}
    loader.close()
    (EARLIER / f"{case}.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, path in cache_of(folder / case).items():
      (EARLIER / case / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, EARLIER / case / name)
