"""Meta files, annotation files and the order of the stream."""

import json
import pickle
import time

import numpy as np
import pytest

from internvl_jax.data.schedule.order import EpochOrder, total_steps
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.meta import read_meta
from internvl_jax.data.where import DataError
from tests.support.data_toys import write_dataset, write_jsonl


def test_lines_are_read_by_number(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes('\ufeff{"a": 1}\n\n  \r\n{"a": "\u4f60"}\r\n{"a": 3}'.encode())
  lines = JsonlFile(path, "toy")
  assert [lines.read(i) for i in (2, 0, 1)] == [{"a": 3}, {"a": 1}, {"a": "\u4f60"}]
  assert [lines.where(i).line for i in range(len(lines))] == [1, 4, 5]
  copy = pickle.loads(pickle.dumps(lines))
  assert copy.read(1) == {"a": "\u4f60"}
  lines.close()
  assert lines.read(0) == {"a": 1}
  lines.close()
  copy.close()


def test_lines_across_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr("internvl_jax.data.source.spans.BLOCK_BYTES", 7)
  records = [{"a": "x" * i} for i in range(20)]
  write_jsonl(tmp_path / "a.jsonl", records)
  lines = JsonlFile(tmp_path / "a.jsonl", "toy")
  assert [lines.read(i) for i in range(len(lines))] == records
  lines.close()


def test_broken_and_empty_annotation_files(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n')
  lines = JsonlFile(path, "toy")
  with pytest.raises(
    DataError, match=r"a\.jsonl:2 \(dataset 'toy'\): broken JSON at column 7: Expecting value"
  ):
    lines.read(1)
  with pytest.raises(DataError, match=r"a\.jsonl:3 \(dataset 'toy'\): not UTF-8"):
    lines.read(2)
  lines.close()
  path.write_text("\n \n")
  with pytest.raises(DataError, match=r"a\.jsonl: dataset 'toy' is empty: 0 samples"):
    JsonlFile(path, "toy")
  path.write_text("")
  with pytest.raises(DataError, match="is empty: 0 samples"):
    JsonlFile(path, "toy")


def test_meta_file_with_paths_relative_to_it_or_to_the_working_directory(tmp_path, monkeypatch):
  data = tmp_path / "data"
  data.mkdir()
  meta = write_dataset(data, 4, repeat_time=2, data_augment=True, max_dynamic_patch=6, length=4)
  (spec,) = read_meta(meta)
  assert spec.annotation == str(data / "toy.jsonl") and spec.root == str(data)
  assert (spec.repeat_time, spec.data_augment, spec.max_dynamic_patch, spec.length) == (2, True, 6, 4)
  monkeypatch.chdir(data)
  (spec,) = read_meta("meta.json")
  assert (spec.annotation, spec.root) == ("toy.jsonl", "")
  # Annotations in a sub-folder, images beside the meta file, everything written relative to that file.
  monkeypatch.chdir(tmp_path)
  (data / "sub").mkdir()
  (data / "toy.jsonl").rename(data / "sub" / "toy.jsonl")
  meta.write_text(json.dumps({"toy": {"root": "../data", "annotation": "sub/toy.jsonl"}}))
  (spec,) = read_meta(meta)
  assert spec.annotation == str(data / "sub" / "toy.jsonl")
  assert (tmp_path / spec.root / "toy0.png").resolve() == (data / "toy0.png").resolve()


def test_images_decide_between_two_roots_that_both_exist(tmp_path, monkeypatch):
  data = tmp_path / "data"
  (data / "images").mkdir(parents=True)
  (tmp_path / "images").mkdir()
  meta = write_dataset(data, 3, root="images")
  (data / "toy0.png").rename(data / "images" / "toy0.png")
  monkeypatch.chdir(tmp_path)
  assert read_meta(meta)[0].root == str(data / "images")
  (data / "images" / "toy0.png").rename(tmp_path / "images" / "toy0.png")
  assert read_meta(meta)[0].root == "images"


def test_videos_decide_as_images_do(tmp_path, monkeypatch):
  data = tmp_path / "data"
  (data / "films" / "a").mkdir(parents=True)
  (tmp_path / "films").mkdir()
  meta = write_dataset(data, 1, root="films")
  # Neither what is absolute nor what is a URL tells where a relative root lies.
  lines = [{"image": "/b.png"}, {"image": ["gs://bucket/b.png"]}, {"image": [], "video": "a/"}]
  write_jsonl(data / "toy.jsonl", lines)
  monkeypatch.chdir(tmp_path)
  assert read_meta(meta)[0].root == str(data / "films")
  (data / "films" / "a").rename(tmp_path / "films" / "a")
  assert read_meta(meta)[0].root == "films"


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"rot": "x"}, "unknown key 'rot'; did you mean 'root'?"),
    ({"repeat_time": "2"}, "'repeat_time' must be a number, got \"2\""),
    ({"repeat_time": True}, "'repeat_time' must be a number, got true"),
    ({"repeat_time": 1.5}, "whole number of repeats, got 1.5"),
    ({"repeat_time": 0}, "whole number of repeats, got 0"),
    ({"data_augment": 1}, "'data_augment' must be true or false, got 1"),
    ({"max_dynamic_patch": 6.0}, "'max_dynamic_patch' must be an integer, got 6.0"),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch must be 1 or more, got 0"),
    ({"max_dynamic_patch": 10**6}, "max_dynamic_patch must be 4096 or less, got 1000000"),
    ({"max_dynamic_patch": 10**400}, "4096 or less, got 10000000000000000000... (401 digits)"),
    *(
      ({"repeat_time": value}, f"whole number of repeats, got {value}; round it (it may be up to 1000000)")
      for value in (float("nan"), float("inf"), float("-inf"), 1e30, 1e308, 2**62, -1, 1e6 + 1)
    ),
    ({"repeat_time": 10**400}, "whole number of repeats, got 10000000000000000000... (401 digits)"),
    ({"repeat_time": {}}, "'repeat_time' must be a number, got {}"),
    ({"length": -1}, "length must be 0 or more, got -1"),
    ({"length": "7"}, "'length' must be an integer"),
    ({"annotation": "\ud800\0"}, "annotation file not found"),
    ({"root": "s3://[", "annotation": "s3://[/x"}, "nothing can be read from root"),
    ({"root": None}, "'root' must be a string, got null"),
    ({"annotation": "gone.jsonl"}, "annotation file not found; tried gone.jsonl and "),
    (
      {"root": "htp://host"},
      "nothing can be read from root 'htp://host': unknown scheme 'htp'; did you mean 'http'?",
    ),
  ],
)
def test_wrong_entries_are_named(tmp_path, entry, message):
  meta = write_dataset(tmp_path, 1, **entry)
  with pytest.raises(DataError) as caught:
    read_meta(meta)
  assert str(caught.value).startswith(str(meta)) and message in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{}", "the mixture is empty: 0 datasets"),
    ('{"a": \n}', r"meta.json:2: broken JSON at column 1"),
    ("[]", "expected a JSON object .*, got a list"),
    ('{"a": 1}', "dataset 'a': expected an object, got a number"),
    ('{"a": {"root": ""}}', "dataset 'a': key 'annotation' is missing"),
    ('{"a": {}, "a": {}}', "key 'a' stands twice"),
    ('{"a": {"root": "", "root": "x"}}', "key 'root' stands twice"),
    ("[" * 100_000, "JSON that cannot be read"),
    ('{"a": {"length": ' + "9" * 5000 + "}}", "JSON that cannot be read"),
    ('{"a\\ud800": {}}', "the name must be a text that can be printed"),
    ('{"": {}}', "the name must be a text"),
    ('{"a": [{}]}', "dataset 'a': expected an object, got a list"),
    ("NaN", "expected a JSON object .*, got a number"),
  ],
)
def test_wrong_meta_files_are_named(tmp_path, text, message):
  (tmp_path / "meta.json").write_text(text)
  with pytest.raises(DataError, match=message):
    read_meta(tmp_path / "meta.json")
  with pytest.raises(DataError, match="the meta file cannot be read"):
    read_meta(tmp_path / "gone.json")


def test_a_meta_file_of_many_datasets_is_read_at_once(tmp_path):
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps({str(i): {} for i in range(20_000)})[:-1] + ', "7": {}}')
  start = time.process_time()
  with pytest.raises(DataError, match="key '7' stands twice"):
    read_meta(meta)
  assert time.process_time() - start < 3


def test_every_sample_once_an_epoch_and_no_break_between_epochs():
  plan = EpochOrder(10, seed=3, shuffle=True)
  epochs, indices = plan.places(0, 30)
  assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
  orders = indices.reshape(3, 10)
  assert (np.sort(orders, 1) == np.arange(10)).all()
  assert len({tuple(order) for order in orders.tolist()}) == 3
  assert indices.tolist() != EpochOrder(10, seed=4, shuffle=True).places(0, 30).indices.tolist()
  # Any window is a slice of the one stream.
  for start, count in ((0, 1), (7, 7), (9, 14), (29, 1)):
    part = plan.places(start, count)
    assert part.indices.tolist() == indices[start : start + count].tolist()
    assert part.epochs.tolist() == epochs[start : start + count].tolist()


def test_order_of_the_lines_without_shuffling():
  assert EpochOrder(4, seed=3, shuffle=False).places(2, 5).indices.tolist() == [2, 3, 0, 1, 2]


def test_steps_are_rounded_up_but_not_by_floating_point():
  assert total_steps(24, 1, 4) == 6
  assert total_steps(25, 1, 4) == 7
  assert total_steps(30, 0.1, 3) == 1
  assert total_steps(10, 2.5, 4) == 7
  assert total_steps(7, 3, 1) == 21
