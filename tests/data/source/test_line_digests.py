"""A run goes on with the data that it began with: what annotation files held is kept, and a changed line is named."""

import json
import os

import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.source import line_digests
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.line_digests import digests_of, first_difference
from internvl_jax.data.where import DataError
from tests.support.data_toys import arguments, resumed, write_dataset


def write(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return JsonlFile(path, "toy")


def found_in(then, file, lines):
  """Numbers of the lines, from 0, among which the first difference is."""
  changed = first_difference(file, then, digests_of(file, lines, None))
  return None if changed is None else (changed.start, changed.stop)


@pytest.mark.parametrize(("most", "place"), [(1024, (4, 5)), (4, (4, 8)), (1, (0, 11))])
def test_the_first_line_that_differs_is_found(tmp_path, monkeypatch, most, place):
  monkeypatch.setattr(line_digests, "MOST_BLOCKS", most)
  texts = [f"number {i:02}" for i in range(11)]
  path = tmp_path / "a.jsonl"
  then = digests_of(write(path, texts), 11, None)
  assert found_in(then, JsonlFile(path, "toy"), 11) is None
  assert found_in(then, write(path, [*texts, "more"]), 12) is None
  texts[4], texts[9] = "another 4", "another 9"
  assert found_in(then, write(path, texts), 11) == place
  # Also where lines were added, and the digests of now are of other blocks.
  if most > 1:
    assert found_in(then, write(path, [*texts, *["more"] * 50]), 61) == place


def test_a_file_that_was_not_touched_is_not_read_again(tmp_path, monkeypatch):
  path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
  read = []
  digest_records = JsonlFile.digest_records
  monkeypatch.setattr(
    JsonlFile, "digest_records", lambda self, *lines: read.append(1) or digest_records(self, *lines)
  )
  first = digests_of(write(path, ["one", "two"]), 2, cache)
  assert len(read) == 2
  assert digests_of(JsonlFile(path, "toy"), 2, cache) == first and len(read) == 2
  # Touched, and as it was.
  os.utime(path, ns=(1, 1))
  assert digests_of(JsonlFile(path, "toy"), 2, cache) == first and len(read) == 4
  # As long as it was, and with its old date.
  path.write_text(path.read_text().replace("two", "TWO"))
  os.utime(path, ns=(1, 1))
  assert digests_of(JsonlFile(path, "toy"), 2, cache) != first and len(read) == 6


def test_damaged_digests_are_made_anew(tmp_path):
  path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
  first = digests_of(write(path, ["one", "two"]), 2, cache)
  (kept,) = cache.glob("digests-*")
  for text in (
    "",
    "{}",
    "[1]",
    '{"digests": 3}',
    kept.read_text().replace(first.text[0], "f" if first.text[0] != "f" else "0", 1),
  ):
    kept.write_text(text)
    assert digests_of(JsonlFile(path, "toy"), 2, cache) == first


def make_loader(meta, tokenizer, state=None, *, cache=None, data=None, policy="truncate", **training):
  opened = TrainLoader(
    arguments(meta, **(data or {})),
    TrainingArguments(
      output_dir="out",
      per_device_train_batch_size=1,
      max_steps=4,
      disable_tqdm=True,
      **{"learning_rate": 1e-3, **training},
    ),
    LoaderConfig(cache_dir=cache and str(cache), on_over_length=policy),
    tokenizer,
    tokens_per_tile=4,
  )
  return resumed(opened, state)


@pytest.fixture
def state(tmp_path, tokenizer):
  """Of a run that was stopped after a step, as it comes back from disk."""
  meta = write_dataset(tmp_path, 6, repeat_time=0.5)
  loader = make_loader(meta, tokenizer)
  next(loader)
  state = json.loads(json.dumps(loader.get_state()))
  loader.close()
  return state


def edit(path, line, *, old, new):
  lines = path.read_text().splitlines(keepends=True)
  assert old in lines[line - 1]
  lines[line - 1] = lines[line - 1].replace(old, new)
  path.write_text("".join(lines))


@pytest.mark.parametrize("cached", [False, True])
def test_a_changed_answer_is_refused_with_its_line(tmp_path, tokenizer, state, cached):
  meta, path, cache = tmp_path / "meta.json", tmp_path / "toy.jsonl", tmp_path / "cache" if cached else None
  make_loader(meta, tokenizer, state, cache=cache).close()
  edit(path, 2, old="red ", new="RED ")
  with pytest.raises(DataError, match=r"toy.jsonl: dataset 'toy': line 2 is not as it was") as caught:
    make_loader(meta, tokenizer, state, cache=cache)
  assert "overwrite_output_dir=True" in str(caught.value) and "\n" not in str(caught.value)
  edit(path, 2, old="RED ", new="red ")
  make_loader(meta, tokenizer, state, cache=cache).close()


def test_what_is_not_read_may_change(tmp_path, tokenizer, state):
  """Lines beyond the share in use, where the files lie, and what the documentation names."""
  meta, path = tmp_path / "meta.json", tmp_path / "toy.jsonl"
  edit(path, 5, old="red ", new="RED ")
  make_loader(meta, tokenizer, state, learning_rate=1.0, dataloader_num_workers=0).close()
  moved = tmp_path / "moved.jsonl"
  path.rename(moved)
  entries = json.loads(meta.read_text())
  entries["toy"]["annotation"] = str(moved)
  meta.write_text(json.dumps(entries))
  make_loader(meta, tokenizer, state).close()


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"repeat_time": 0.7}, r"meta.json: repeat_time of dataset 'toy' was 0.5 .* and is 0.7 now"),
    ({"data_augment": True}, "data_augment of dataset 'toy' was False .* and is True now"),
    ({"max_dynamic_patch": 1}, "max_dynamic_patch of dataset 'toy' was None .* and is 1 now"),
  ],
)
def test_a_changed_entry_of_the_meta_file_is_refused(tmp_path, tokenizer, state, entry, message):
  meta = tmp_path / "meta.json"
  entries = json.loads(meta.read_text())
  meta.write_text(json.dumps({"toy": entries["toy"] | entry}))
  with pytest.raises(DataError, match=message):
    make_loader(meta, tokenizer, state)
  meta.write_text(json.dumps({"renamed": entries["toy"]}))
  with pytest.raises(DataError, match=r"began with 1 datasets \(toy\), .* has 1 datasets \(renamed\) now"):
    make_loader(meta, tokenizer, state)


def test_other_settings_of_samples_are_refused(tmp_path, tokenizer, state):
  meta = tmp_path / "meta.json"
  with pytest.raises(DataError, match=r"data.max_dynamic_patch was 4 when .* and is 2 now"):
    make_loader(meta, tokenizer, state, data={"max_dynamic_patch": 2})
  with pytest.raises(DataError, match=r"training.seed was 42 when .* and is 1 now"):
    make_loader(meta, tokenizer, state, seed=1, data_seed=42)
  with pytest.raises(DataError, match=r"loader.on_over_length was 'truncate' when .* and is 'drop' now"):
    make_loader(meta, tokenizer, state, policy="drop")
  with pytest.raises(DataError, match="another tokenizer"):
    make_loader(meta, tokenizer, {**state, "content": {**state["content"], "tokenizer": "another"}})


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_line(tmp_path, tokenizer, state, caplog):
  del state["content"]
  with caplog.at_level("WARNING", logger="absl"):
    make_loader(tmp_path / "meta.json", tokenizer, state).close()
  assert "earlier version, which did not keep what its annotation files held" in caplog.text


def test_a_file_that_is_touched_while_it_is_read_is_told_once(tmp_path, tokenizer, caplog):
  loader, path = make_loader(write_dataset(tmp_path, 6), tokenizer), tmp_path / "toy.jsonl"
  with caplog.at_level("WARNING", logger="absl"):
    next(loader)
    assert loader.get_state() and not caplog.text
    path.chmod(0o600)
    assert loader.get_state() and not caplog.text
    edit(path, 2, old="red ", new="RED ")
    for _ in range(2):
      assert loader.get_state()["content"]["datasets"][0]["lines"] == 6
  assert caplog.text.count("toy.jsonl: dataset 'toy': the annotation file was written to") == 1
  loader.close()
