"""Streams: the batches of the same samples read by number, exact resume, hosts of their own, what they cannot do."""

import gzip
import json
import tarfile
import threading

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.where import DataError
from tests.support.data_kinds import as_struct, lines_of, members_of, records_of, with_images, write_tar
from tests.support.data_toys import arguments, resumed, write_dataset
from tests.support.thread_hosts import on_hosts

COUNT = 40
PACKED = {
  "use_packed_ds": True,
  "max_packed_tokens": 300,
  "num_images_expected": 8,
  "max_buffer_size": 1,
  "max_seq_length": 256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """40 samples in four tars, and in a jsonl."""
  found = tmp_path_factory.mktemp("streams")
  write_dataset(found, COUNT)
  records = records_of(found)
  for shard in range(4):
    chosen = records[shard * 10 : shard * 10 + 10]
    write_tar(found / f"{shard}.tar", members_of(chosen, found), tarfile.PAX_FORMAT)
  return found


def open_loader(folder, tokenizer, entry=None, *, shards=None, loader=None, training=None, **data):
  meta = folder / f"meta{abs(hash(json.dumps(entry)))}.json"
  entry = entry or {"stream": "{0..3}.tar"}
  # Replaced at once: threads that stand for hosts write it at the same time, and read it.
  written = meta.with_suffix(f".{threading.get_ident()}")
  written.write_text(json.dumps(entry if "toy" in entry else {"toy": entry}))
  written.replace(meta)
  settings = {"per_device_train_batch_size": 2, "max_steps": 12, "disable_tqdm": True, **(training or {})}
  return TrainLoader(
    arguments(meta, **data),
    TrainingArguments(**settings),
    LoaderConfig(cache_dir=str(folder / "cache"), **{"shuffle": False, **(loader or {})}),
    tokenizer,
    tokens_per_tile=4,
    shards=shards or Shards(),
  )


def check_equal(found, expected):
  assert len(found) == len(expected) > 0
  for batch, other in zip(found, expected, strict=True):
    for array, wanted in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("packed", [True, False])
def test_a_stream_makes_the_batches_of_its_records_by_number(folder, tokenizer, packed):
  data = PACKED if packed else {}
  loader = open_loader(folder, tokenizer, {"stream": "{0..3}.tar"}, **data)
  indexed = open_loader(folder, tokenizer, {"root": "", "annotation": "toy.jsonl"}, **data)
  # Within the first pass: an epoch's last rows are those of its last samples, and a stream goes on.
  steps = 4
  check_equal([next(loader) for _ in range(steps)], [next(indexed) for _ in range(steps)])
  sizes = loader.next_sizes()
  batch = next(loader)
  assert (sizes["S"], sizes["T"]) == (batch.input_ids.shape[-1], batch.tiles.shape[2])
  assert loader.epoch_of(12) == 1 and loader.total_steps == 12
  assert "a stream of unknown length, 4 shards" in loader.dataset_lines()[0]
  loader.close()
  indexed.close()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_exact(folder, tokenizer, packed, shuffle):
  """Over the borders of shards and passes: 30 steps see the 40 records more than once."""
  options = {"loader": {"shuffle": shuffle}, "training": {"max_steps": 30}, **(PACKED if packed else {})}
  whole = open_loader(folder, tokenizer, **options)
  states, expected = [whole.get_state()], []
  for batch in whole:
    whole.prefetch()
    expected.append(batch)
    states.append(json.loads(json.dumps(whole.get_state())))
  counters = whole.counters()["toy"]["samples"]
  assert counters > COUNT if packed else counters == 60
  # A few samples are kept in memory, however many came.
  assert len(whole._samples._met) < 40
  assert "toy" not in whole.batch_samples(29) and ".tar:" in whole.batch_samples(29)
  whole.close()
  for step in (1, 5, 23):
    loader = resumed(open_loader(folder, tokenizer, **options), states[step])
    check_equal(list(loader), expected[step:])
    assert loader.counters()["toy"]["samples"] == counters
    loader.close()


def test_two_streams_are_mixed_by_their_weights(folder, tokenizer):
  lines = lines_of(records_of(folder))
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
  entry = {
    "toy": {"stream": "{0..3}.tar", "repeat_time": 3},
    "b": {"root": "", "stream": "b.jsonl.gz", "repeat_time": 1},
  }
  loader = open_loader(folder, tokenizer, entry, training={"max_steps": 60})
  for _ in range(30):
    next(loader)
  state = loader.get_state()
  counts = {name: found["samples"] for name, found in loader.counters().items()}
  assert sum(counts.values()) == 60 and 35 <= counts["toy"] <= 55 and counts["b"] >= 5
  expected = [next(loader) for _ in range(5)]
  loader.close()
  again = resumed(open_loader(folder, tokenizer, entry, training={"max_steps": 60}), state)
  check_equal([next(again) for _ in range(5)], expected)
  again.close()


def records_of_function():
  return iter([{"question": f"what is {i}?", "answer": "red"} for i in range(5)])


def test_kinds_of_streams(folder, tokenizer, tmp_path):
  def first(entry, **data):
    loader = open_loader(folder, tokenizer, entry, **data)
    found = [next(loader) for _ in range(5)]
    line = loader.dataset_lines()[0]
    loader.close()
    return found, line

  expected, _ = first({"stream": "{0..3}.tar"})
  records = records_of(folder)
  (folder / "all.jsonl").write_bytes(lines_of(records))
  check_equal(first({"root": "", "stream": "all.jsonl"})[0], expected)
  module, name = records_of_function.__module__, records_of_function.__name__
  found, line = first({"iterable": f"{module}:{name}"})
  assert found[0].input_ids.shape[1] == 2 and "(iterable, 'question' and 'answer')" in line
  datasets = pytest.importorskip("datasets")
  table = datasets.Dataset.from_list(with_images(records, folder, as_struct))
  table.to_parquet(folder / "all.parquet")
  check_equal(first({"stream": "all.parquet"})[0], expected)
  (folder / "hub").mkdir()
  table.cast_column("image", datasets.Image()).to_parquet(folder / "hub/train.parquet")
  check_equal(first({"dataset_stream": f"{folder}/hub:train"})[0], expected)


def test_hosts_read_shards_of_their_own_and_resume(folder, tokenizer):
  count, options = 2, {"loader": {"shuffle": True}, "training": {"max_steps": 6}, **PACKED}

  def run(hosts, state=None):
    shards = Shards(count=2, mine=range(hosts.me, hosts.me + 1), hosts=hosts, all_sum=hosts_sum(hosts))
    loader = resumed(open_loader(folder, tokenizer, shards=shards, **options), state)
    batches, states, seen = [], [loader.get_state()], set()
    for batch in loader:
      batches.append(batch)
      states.append(loader.get_state())
      seen |= {part.split(":")[0] for part in loader.batch_samples(loader.next_step - 1).split("; ")}
    facts = (loader.global_batch, loader.shared_facts())
    loader.close()
    return batches, states, seen, facts

  _, first = on_hosts(count, run)
  one, other = first
  assert one[1] == other[1] and one[3] == other[3] and one[3][0] == 4
  assert not one[2] & other[2] and len(one[2] | other[2]) == 4
  for a, b in zip(one[0], other[0], strict=True):
    assert [x.shape for x in a] == [x.shape for x in b]
  state = json.loads(json.dumps(one[1][3]))
  for host, (again, *_) in enumerate(on_hosts(count, lambda hosts: run(hosts, state))[1]):
    check_equal(again, first[host][0][3:])
  alone = open_loader(folder, tokenizer, **options)
  with pytest.raises(DataError, match="2 hosts read shards of streams and 1 do now"):
    alone.set_state(state | {"content": alone.get_state()["content"]})
  alone.close()


def test_what_hosts_pass_over_is_counted_by_all(folder, tokenizer):
  lines = lines_of(records_of(folder)).splitlines(keepends=True)
  for shard in range(2):
    (folder / f"lost-{shard}.jsonl").write_bytes(
      b"".join([b"{}\n"] * (shard + 1) + lines[shard * 20 : shard * 20 + 20])
    )
  entry = {"root": "", "stream": "lost-{0..1}.jsonl"}
  drop = {"on_bad_sample": "drop", "shuffle": False, "max_bad_fraction": 0.5}

  def run(hosts):
    shards = Shards(count=2, mine=range(hosts.me, hosts.me + 1), hosts=hosts, all_sum=hosts_sum(hosts))
    loader = open_loader(folder, tokenizer, entry, shards=shards, loader=drop, **PACKED)
    next(loader)
    state = loader.get_state()
    loader.close()
    return state

  _, (one, other) = on_hosts(2, run)
  assert one == other and one["counters"]["toy"]["unreadable"] == 3


def hosts_sum(hosts):
  def all_sum(counts):
    parts = hosts.gather(np.ascontiguousarray(counts, np.int64).tobytes())
    return np.sum([np.frombuffer(part, np.int64) for part in parts], axis=0).reshape(counts.shape)

  return all_sum


def test_what_streams_cannot_do_is_refused(folder, tokenizer):
  for options, message in (
    (
      {"training": {"max_steps": -1}},
      "is a stream of unknown length, of which epochs cannot be counted; set",
    ),
    ({"training": {"group_by_length": True}}, "training.group_by_length needs the samples' number"),
    ({"use_data_resampling": True}, "data.use_data_resampling needs"),
    ({"replacement": True, **PACKED}, "data.replacement needs"),
    (
      {"entry": {"toy": {"stream": "0.tar"}, "b": {"root": "", "annotation": "toy.jsonl"}}},
      "dataset 'b' is read by number, and others are streams; name all as streams, or none",
    ),
    ({"entry": {"stream": "9.tar"}}, "annotation file not found"),
    ({"entry": {"iterable": "no.module:f"}}, "must be 'module:function'"),
  ):
    with pytest.raises(DataError, match=message):
      open_loader(folder, tokenizer, **options)
  loader = open_loader(folder, tokenizer)
  state = loader.get_state()
  loader.close()
  (folder / "m.json").write_text(json.dumps({"toy": {"stream": "0.tar"}}))
  with pytest.raises(DataError, match="is a stream, which is trained on in its order alone"):
    Mixture(arguments(folder / "m.json"), tokenizer, tokens_per_tile=4, seed=0)
  loader = open_loader(folder, tokenizer, max_dynamic_patch=3)
  with pytest.raises(DataError, match=r"data.max_dynamic_patch was 4 when its state was saved and is 3 now"):
    loader.set_state(state)
  loader.close()
  shards = Shards(count=8, mine=range(1))
  with pytest.raises(DataError, match="has 4 shards, and 8 hosts read one each at least"):
    open_loader(folder, tokenizer, shards=shards)


def test_bad_records_and_shards_are_counted(folder, tokenizer, tmp_path):
  lines = lines_of(records_of(folder)).splitlines(keepends=True)
  lines[3], lines[7] = b"{broken\n", b'{"image": "gone.png", "question": "x"}\n'
  (folder / "bad.jsonl").write_bytes(b"".join(lines))
  whole = (folder / "0.tar").read_bytes()
  (folder / "cut.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512 + 700])
  for entry, lost in (
    ({"root": "", "stream": "bad.jsonl"}, "bad.jsonl:4 (dataset 'toy'): broken JSON"),
    ({"stream": ["cut.tar", "1.tar"]}, "cut.tar: dataset 'toy': the tar ends"),
  ):
    loader = open_loader(folder, tokenizer, entry, **PACKED)
    with pytest.raises(DataError) as caught:
      list(loader)
    assert lost in str(caught.value)
    loader.close()
    drop = {"on_bad_sample": "drop", "shuffle": False, "max_bad_fraction": 0.5}
    loader = open_loader(folder, tokenizer, entry, loader=drop, **PACKED)
    list(loader)
    counted = loader.counters()["toy"]
    assert counted["unreadable"] >= 1 and counted["samples"] > 20
    loader.close()


def test_over_long_records_are_split_and_go_on_exactly(folder, tokenizer):
  record = {
    "image": ["toy0.png", "toy1.png", "toy3.png"],
    "conversations": [
      {"from": "human", "value": "<image>\nwhat?" + " blue" * 20},
      {"from": "gpt", "value": "red " * 120},
      {"from": "human", "value": "<image>\n<image>\nwhat?"},
      {"from": "gpt", "value": "red " * 150},
    ],
  }
  (folder / "long.jsonl").write_bytes(lines_of([record] * 12))
  data = {**PACKED, "num_images_expected": 4, "max_dynamic_patch": 2, "max_seq_length": 1024}
  loader = open_loader(folder, tokenizer, {"root": "", "stream": "long.jsonl"}, **data)
  found = [next(loader) for _ in range(3)]
  assert loader.counters()["toy"]["split"] > 0
  state = loader.get_state()
  expected = [next(loader) for _ in range(4)]
  loader.close()
  loader = resumed(open_loader(folder, tokenizer, {"root": "", "stream": "long.jsonl"}, **data), state)
  check_equal([next(loader) for _ in range(4)], expected)
  loader.close()
  assert len(found) == 3


def test_a_stream_without_records_is_named(folder, tokenizer):
  (folder / "blank.jsonl").write_bytes(b"\n\n")
  loader = open_loader(folder, tokenizer, {"root": "", "stream": "blank.jsonl"})
  with pytest.raises(DataError, match="the stream is empty: 0 records"):
    next(loader)
  loader.close()
