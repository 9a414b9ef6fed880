"""Annotation files that change while they are read."""

import os
import pathlib

import pytest

from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes
from tests.support.bad_lines import (
  NOTHING_LOST,
  hard_time_limit,  # noqa: F401 - a fixture
  loading,
  message_of,
  texts,
  write_data,
)
from tests.support.data_toys import WHERE, write_jsonl


def ids_of(batches):
  """The token ids of all rows that hold a sample."""
  rows = [row for batch in batches for row in zip(batch.input_ids[0], batch.segment_ids[0], strict=True)]
  return [ids[segments > 0].tolist() for ids, segments in rows if segments.any()]


def read_on(meta, tokenizer, change, **loader):
  """Counters and samples of a loader whose annotation file changes after its first sample."""
  with loading(meta, tokenizer, rows=1, policy="drop", prefetch=1, **loader) as loader:
    batches = [next(loader)]
    change(meta.parent / "toy.jsonl")
    batches += list(loader)
    return loader.counters()["toy"], ids_of(batches)


@pytest.mark.parametrize("into_the_line", [0, -1, 1, 30])
def test_an_annotation_file_that_is_cut_while_it_is_read(tmp_path, tokenizer, into_the_line):
  meta = write_data(tmp_path, *texts(40))
  content = (tmp_path / "toy.jsonl").read_bytes()
  kept = sum(len(line) for line in content.splitlines(keepends=True)[:20]) + into_the_line
  counts, samples = read_on(meta, tokenizer, lambda path: os.truncate(path, kept))
  # A line without its line break is whole.
  assert counts == NOTHING_LOST | {"samples": 40, "unreadable": 20}
  with loading(write_data(tmp_path, *texts(40)), tokenizer, rows=1) as loader:
    assert ids_of(loader)[:20] == samples
  with loading(meta, tokenizer, rows=1, prefetch=1) as loader:
    next(loader)
    os.truncate(tmp_path / "toy.jsonl", kept)
    message = message_of(lambda: list(loader))
    assert message.startswith(
      f"{tmp_path}/toy.jsonl:21 (dataset 'toy'): the file was changed after its lines"
    )
    assert message.endswith("start the run again")


def test_an_annotation_file_that_is_written_anew_while_it_is_read(tmp_path, tokenizer):
  records = texts(40)
  meta = write_data(tmp_path, *records)
  first = len(tokenizer.encode(records[0]["conversations"], [], WHERE).input_ids)

  def rewrite(path):
    with path.open("r+b") as file:  # the same file, not another of its name
      lines = file.read()
      file.seek(0)
      file.write(b" " + lines)

  counts, samples = read_on(meta, tokenizer, rewrite)
  assert counts["samples"] == 40 and counts["unreadable"] == 40 - len(samples) and len(samples) < 10
  # Where lines stand on lines, they are those of the file as it is; nothing is read from the middle of one.
  meta = write_data(tmp_path, *records)
  counts, samples = read_on(meta, tokenizer, lambda path: write_jsonl(path, records[::-1][:20]))
  assert counts["samples"] == 40 and counts["unreadable"] >= 20
  whole = [tokenizer.encode(record["conversations"], [], WHERE).input_ids.tolist() for record in records]
  assert all(sample in whole for sample in samples) and len(samples[0]) == first


def test_an_annotation_file_that_vanishes(tmp_path, tokenizer, caplog):
  meta = write_data(tmp_path, *texts(8))
  counts, samples = read_on(meta, tokenizer, pathlib.Path.unlink)
  assert counts == NOTHING_LOST | {"samples": 8} and len(samples) == 8  # it is still open
  meta = write_data(tmp_path, *texts(8))
  cause = f"{tmp_path}/toy.jsonl:1 (dataset 'toy'): the annotation file cannot be read: "
  for policy in ("error", "drop"):
    with loading(meta, tokenizer, policy=policy) as loader:
      (tmp_path / "toy.jsonl").rename(tmp_path / "away")
      # One bad batch does not end a run that drops what is bad.
      message = message_of(lambda: next(loader)) if policy == "error" else next(loader) and caplog.text
      (tmp_path / "away").rename(tmp_path / "toy.jsonl")
    assert cause in message and "restore it" in message


def test_an_annotation_file_that_changes_while_it_is_measured(tmp_path):
  write_data(tmp_path, *texts(8))
  path = tmp_path / "toy.jsonl"

  def measure(file, line):
    file.read(line)
    os.utime(path, ns=(1, 1))
    return Size(5, 0, 1)

  message = message_of(
    lambda: index_sizes(JsonlFile(path, "toy"), measure, {}, tmp_path / "cache", workers=0)
  )
  assert f"{path}: dataset 'toy': the file was changed after its lines were found" in message
  path.unlink()
  message = message_of(lambda: JsonlFile(path, "toy"))
  assert f"{path}: dataset 'toy': the annotation file cannot be read: " in message
