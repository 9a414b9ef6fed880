"""Caches that are damaged, cannot be written, or are written by two at once."""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from internvl_jax.data.source import sizes
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes
from tests.support.bad_lines import (
  GOOD,
  NOTHING_LOST,
  animation,
  hard_time_limit,  # noqa: F401 - a fixture
  loading,
  lost_by_doctor,
  make_loader,
  message_of,
  noise,
  texts,
  with_image,
  write_data,
)


@contextlib.contextmanager
def full_disk(size):
  """No file may become longer."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer, packed):
  meta = write_data(tmp_path, *texts(40))
  (tmp_path / "file").touch()
  message = message_of(lambda: make_loader(meta, tokenizer, packed=packed, cache=tmp_path / "file/cache"))
  assert message.startswith(f"the cache in {tmp_path}/file/cache cannot be written or read (Not a directory)")
  assert "set loader.cache_dir to a folder with free space" in message
  with full_disk(300):
    message = message_of(lambda: make_loader(meta, tokenizer, packed=packed))
  assert f"the cache in {tmp_path}/cache cannot be written" in message and "loader.cache_dir" in message
  assert not list((tmp_path / "cache").rglob("*.tmp"))
  with loading(meta, tokenizer, packed=packed) as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"samples": 40 if packed else 42}


def test_a_disk_that_fills_up_while_sizes_are_written(tmp_path, tokenizer):
  meta = write_data(tmp_path, *texts(40))
  with loading(meta, tokenizer):
    pass  # the index of lines is there
  with full_disk(300):
    message = message_of(lambda: make_loader(meta, tokenizer, packed=True))
  assert f"the cache in {tmp_path}/cache cannot be written" in message
  with loading(meta, tokenizer, packed=True) as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"samples": 40}


def test_a_cache_without_permission(tmp_path, tokenizer):
  if not os.geteuid():
    pytest.skip("root may write anywhere")
  meta = write_data(tmp_path, *texts(4))
  (tmp_path / "cache").mkdir(mode=0o500)
  message = message_of(lambda: make_loader(meta, tokenizer, packed=True))
  assert f"the cache in {tmp_path}/cache cannot be written or read (Permission denied)" in message


def damages(content):
  """Copies of a file's content, each damaged in another way."""
  for position in range(0, len(content), 3):
    damaged = bytearray(content)
    damaged[position] ^= 0x15
    yield bytes(damaged)
  for length in range(0, len(content), 20):
    yield content[:length]
    yield content[:length] + bytes(len(content) - length)
  yield from (b"PK\x03\x04 no archive", b"\x80\x04 no pickle", content + b"more", content[::-1])


def test_a_damaged_index_of_lines_is_built_anew(tmp_path):
  path, cache = tmp_path / "toy.jsonl", tmp_path / "cache"
  path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
  JsonlFile(path, "toy", cache=cache)
  (index,) = cache.iterdir()
  content = index.read_bytes()
  for damaged in damages(content):
    index.write_bytes(damaged)
    file = JsonlFile(path, "toy", cache=cache)
    assert [file.read(i)["a"] for i in range(len(file))] == [1, 2, 3]
    assert [file.where(i).line for i in range(3)] == [1, 3, 4]
    file.close()
    assert index.read_bytes() in (content, damaged)


def measure_letters(file, line):
  """Stands for a real one: the tokens are those that the line says; 13 cannot be read."""
  record = file.read(line)
  if record == 13:
    raise file.where(line).error("unlucky")
  return Size(record, record % 3, record // 2)


def sizes_in(folder, numbers):
  path = folder / "numbers.jsonl"
  path.write_text("".join(f"{number}\n" for number in numbers))
  os.utime(path, ns=(1, 1))
  file = JsonlFile(path, "toy")
  found = index_sizes(file, measure_letters, {}, folder / "cache", workers=0)
  file.close()
  return found


def test_damaged_sizes_are_measured_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(sizes, "BLOCK", 2)
  numbers = [5, 13, 7, 8, 13]
  errors = {line: f"{tmp_path}/numbers.jsonl:{line + 1} (dataset 'toy'): unlucky" for line in (1, 4)}
  expected = sizes_in(tmp_path, numbers).records.tolist()
  (folder,) = (tmp_path / "cache").iterdir()
  for path in [path for path in folder.iterdir() if path.name != "lock"]:
    content = path.read_bytes()
    for damaged in damages(content):
      path.write_bytes(damaged)
      found = sizes_in(tmp_path, numbers)
      assert found.records.tolist() == expected and found.errors == errors, (path, damaged)


BUILD_SLOWLY = """
import json, os, sys, time
from pathlib import Path
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes

def measure(file, line):
  with open("measured", "a") as log:
    log.write("x")
  time.sleep(0.002)
  record = file.read(line)
  if record == 13:
    raise file.where(line).error("unlucky")
  return Size(record, record % 3, record // 2)

Path(f"ready{sys.argv[1]}").touch()
while not (os.path.exists("ready0") and os.path.exists("ready1")):
  time.sleep(0.001)
file = JsonlFile("numbers.jsonl", "toy", cache="cache")
found = index_sizes(file, measure, {}, "cache", workers=0)
print(json.dumps([found.records.tolist(), found.errors]))
"""


def test_two_processes_build_one_index_at_once(tmp_path):
  numbers = [*range(20, 220), 13]
  path = tmp_path / "numbers.jsonl"
  path.write_text("".join(f"{number}\n" for number in numbers))
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", BUILD_SLOWLY, str(number)],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])},
      stdout=subprocess.PIPE,
    )
    for number in range(2)
  ]
  for process in processes:
    out, _ = process.communicate(timeout=20)
    records, errors = json.loads(out)
    assert records == [[number, number % 3, number // 2] for number in range(20, 220)] + [[0, 0, 0]]
    assert errors == {"200": "numbers.jsonl:201 (dataset 'toy'): unlucky"}
  # Who came second found the work done, and only looked again at what could not be read.
  assert len((tmp_path / "measured").read_text()) == 201 + 1


def test_two_processes_without_locks(tmp_path, monkeypatch):
  """Where a file system has no locks, what another process wrote over is noticed."""
  monkeypatch.setattr(sizes, "locked", lambda folder: contextlib.nullcontext())
  path = tmp_path / "numbers.jsonl"
  path.write_text("5\n6\n7\n")

  def interrupted(file, line):
    (folder,) = (tmp_path / "cache").iterdir()
    if line == 2:
      np.save(folder / "other.npy", np.zeros(3, sizes.SIZE))
      (folder / "other.npy").replace(folder / "sizes.npy")
    return measure_letters(file, line)

  build = {"key": {}, "cache": tmp_path / "cache", "workers": 0}
  message = message_of(lambda: index_sizes(JsonlFile(path, "toy"), interrupted, **build))
  assert "another process wrote these sizes at the same time" in message and "loader.cache_dir" in message
  found = index_sizes(JsonlFile(path, "toy"), measure_letters, **build)
  assert found.records["tokens"].tolist() == [5, 6, 7] and not found.errors


def test_one_missing_file_does_not_move_the_root(tmp_path, tokenizer):
  """The files beside the meta file decide, not whether the very first of them is there."""
  noise().save(tmp_path / "a.png")
  animation(tmp_path / "a.gif")
  meta = write_data(
    tmp_path, with_image("gone.png"), with_image("a.png"), {"video": "a.gif", **GOOD}, root=""
  )
  with loading(meta, tokenizer, policy="drop") as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"unreadable": 1}
  assert lost_by_doctor(meta, tokenizer, packed=True) == [
    f"{tmp_path}/toy.jsonl:1 (dataset 'toy'): image not found: {tmp_path}/gone.png; check the dataset's root in the "
    "meta file"
  ]
