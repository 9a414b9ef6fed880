"""The index of sizes: measured once, on all cores, again only where lines have changed."""

import functools
import json
import os
import pickle

import numpy as np
import pytest

from internvl_jax.data.source import jsonl, sizes
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes
from internvl_jax.data.where import DataError


def measure(log, file, line):
  """Stands for a real one: a line says its own sizes. It notes which lines it was asked for."""
  record = file.read(line)
  with open(log, "a") as out:
    out.write(f"{line}\n")
  if record["tokens"] == 13:
    raise file.where(line).error("image not found: 13.jpg")
  return Size(record["tokens"], record["tiles"], record["tokens"] // 2)


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(sizes, "BLOCK", 4)


def write(path, tokens):
  path.write_text("".join(json.dumps({"tokens": n, "tiles": n % 3}) + "\n" for n in tokens))
  return JsonlFile(path, "toy")


def build(tmp_path, file, key=None, **options):
  """Returns the sizes and the lines that were measured."""
  log = tmp_path / "measured"
  log.write_text("")
  found = index_sizes(
    file, functools.partial(measure, log), key or {"a": 1}, tmp_path / "cache", **{"workers": 0, **options}
  )
  return found, sorted(map(int, log.read_text().split()))


def test_measured_once_and_kept(tmp_path, small_blocks):
  tokens = list(range(1, 12))
  file = write(tmp_path / "a.jsonl", tokens)
  told = []
  found, measured = build(tmp_path, file, progress=told.append)
  assert found.records["tokens"].tolist() == tokens and sum(told) == 11
  assert found.records["tiles"].tolist() == [n % 3 for n in tokens] and not found.errors
  assert measured == list(range(11))
  found, measured = build(tmp_path, file, progress=told.append)
  assert found.records["tokens"].tolist() == tokens and not measured and told[-1] == 11
  # Another setting has sizes of its own.
  assert build(tmp_path, file, {"a": 2})[1] == list(range(11))
  assert build(tmp_path, file)[1] == []


def test_lines_that_are_added_or_changed_are_measured(tmp_path, small_blocks):
  path, tokens = tmp_path / "a.jsonl", list(range(1, 12))
  build(tmp_path, write(path, tokens))
  tokens += [21, 22]
  found, measured = build(tmp_path, write(path, tokens))
  assert found.records["tokens"].tolist() == tokens and measured == [8, 9, 10, 11, 12]  # blocks 8-11 and 12
  tokens[1] = 7
  found, measured = build(tmp_path, write(path, tokens))
  assert found.records["tokens"].tolist() == tokens and measured == [0, 1, 2, 3]
  del tokens[6:]
  found, measured = build(tmp_path, write(path, tokens))
  assert found.records["tokens"].tolist() == tokens and measured == [4, 5]


def test_unreadable_lines_are_told_until_they_are_mended(tmp_path, small_blocks):
  path = tmp_path / "a.jsonl"
  file = write(path, [5, 13, 6, 7, 8, 13])
  for _ in range(2):
    found, _ = build(tmp_path, file)
    assert found.records["tokens"].tolist() == [5, 0, 6, 7, 8, 0]
    assert found.errors == {i: f"{path}:{i + 1} (dataset 'toy'): image not found: 13.jpg" for i in (1, 5)}
  found, measured = build(tmp_path, write(path, [5, 9, 6, 7, 8, 13]))
  assert measured == [0, 1, 2, 3, 5] and list(found.errors) == [5]


def test_an_image_that_is_put_in_its_place_is_found(tmp_path, small_blocks):
  file = write(tmp_path / "a.jsonl", [5, 13, 6, 7, 8, 13])
  found, _ = build(tmp_path, file)
  assert sorted(found.errors) == [1, 5]

  def better(file, line):
    assert line in (1, 5), "what could be read is not measured again"
    if line == 5:
      raise file.where(line).error("image not found: still")
    return Size(40, 1, 2)

  found = index_sizes(file, better, {"a": 1}, tmp_path / "cache", workers=0)
  assert found.records["tokens"].tolist() == [5, 40, 6, 7, 8, 0]
  assert list(found.errors) == [5] and found.errors[5].endswith("still")
  found, measured = build(tmp_path, file)  # only what is still missing
  assert found.records["tokens"].tolist() == [5, 40, 6, 7, 8, 0] and measured == [5]


def test_a_few_lines_are_looked_at_again_and_tell_of_replaced_files(tmp_path, small_blocks):
  tokens = list(range(1, 12))
  file = write(tmp_path / "a.jsonl", tokens)
  build(tmp_path, file)
  # Every third is text alone, which no file can change.
  assert build(tmp_path, file, probes=3)[1] == [0, 4, 10]
  assert build(tmp_path, file, probes=99)[1] == [n - 1 for n in tokens if n % 3]

  def replaced(file, line):
    asked.append(line)
    return Size(tokens[line], 7, 1)

  for probes, expected in ((0, []), (3, [0, *range(11)])):
    asked = []
    found = index_sizes(file, replaced, {"a": 1}, tmp_path / "cache", workers=0, probes=probes)
    assert asked == expected
  assert found.records["tiles"].tolist() == [7] * 11


@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_a_stopped_build_goes_on(tmp_path, small_blocks, stop_at):
  tokens = list(range(1, 12))
  file = write(tmp_path / "a.jsonl", tokens)

  def stopping(file, line):
    if line == stop_at:
      raise KeyboardInterrupt
    return Size(tokens[line], 0, 0)

  with pytest.raises(KeyboardInterrupt):
    index_sizes(file, stopping, {"a": 1}, tmp_path / "cache", workers=0)
  found, measured = build(tmp_path, file)
  assert found.records["tokens"].tolist() == tokens
  assert measured == list(range(stop_at // 4 * 4, 11))


def test_worker_processes_measure_the_same(tmp_path, small_blocks):
  tokens = [5, 13, 6, 7, 8, 13, *range(20, 60)]
  file = write(tmp_path / "a.jsonl", tokens)
  alone, _ = build(tmp_path, file, {"w": 0})
  many, measured = build(tmp_path, file, {"w": 2}, workers=2)
  np.testing.assert_array_equal(many.records, alone.records)
  assert many.errors == alone.errors and measured == list(range(len(tokens)))


def test_a_worker_that_fails_is_heard(tmp_path, small_blocks):
  file = write(tmp_path / "a.jsonl", range(1, 12))
  with pytest.raises(FileNotFoundError):
    index_sizes(file, functools.partial(measure, tmp_path / "no/log"), {}, tmp_path / "cache", workers=2)


def test_a_damaged_cache_is_measured_anew(tmp_path, small_blocks):
  tokens = list(range(1, 12))
  file = write(tmp_path / "a.jsonl", tokens)
  build(tmp_path, file)
  (folder,) = (tmp_path / "cache").iterdir()
  for name in ("sizes.npy", "blocks.npy", "key.json"):
    (folder / name).write_bytes((folder / name).read_bytes()[:7])
    found, _ = build(tmp_path, file)
    assert found.records["tokens"].tolist() == tokens, name


def test_an_empty_line_is_a_data_error_as_before(tmp_path):
  (tmp_path / "a.jsonl").write_text("")
  with pytest.raises(DataError, match="is empty: 0 samples"):
    JsonlFile(tmp_path / "a.jsonl", "toy")


def test_the_places_of_lines_are_kept_on_disk(tmp_path, monkeypatch):
  path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
  path.write_text('{"a": 1}\n\n  \n{"a": 2}\n{"a": 3}')
  plain = JsonlFile(path, "toy")
  first = JsonlFile(path, "toy", cache=cache)
  monkeypatch.setattr(jsonl, "_line_bounds", None)  # a second time nothing is searched
  again = JsonlFile(path, "toy", cache=cache)
  copy = pickle.loads(pickle.dumps(again))
  for file in (first, again, copy):
    assert [file.read(i) for i in range(len(file))] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [file.where(i).line for i in range(3)] == [plain.where(i).line for i in range(3)] == [1, 4, 5]
  assert len(pickle.dumps(again)) < 1000
  monkeypatch.undo()
  path.write_text('{"a": 4}\n')
  os.utime(path, ns=(1, 1))
  assert JsonlFile(path, "toy", cache=cache).read(0) == {"a": 4}
