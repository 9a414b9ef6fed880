"""Sizes are measured once for all hosts, whatever each has in its cache, and each has then what one alone would have."""

import collections
import json
import shutil

import numpy as np
import pytest

from internvl_jax.data.sample import long_samples
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.source import shared_sizes, sizes
from internvl_jax.data.source.hosts import ALONE
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size
from internvl_jax.data.where import OverLengthError, SharedDataError
from tests.support.thread_hosts import on_hosts

TOKENS = [*range(20, 43), 13, 50, 51, 13]
"""Blocks of four lines, the last one of three; lines of 13 tokens cannot be read."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(sizes, "BLOCK", 4)
  monkeypatch.setattr(shared_sizes, "ROUND_BLOCKS", 2)


def write(folder, tokens=TOKENS):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "a.jsonl"
  path.write_text("".join(json.dumps({"tokens": n, "tiles": n % 3}) + "\n" for n in tokens))
  return path


class Machine:
  """A host: what it measures is noted."""

  def __init__(self, path, cache, *, tiles=0, readable=()):
    self.path, self.cache, self.measured = path, cache, []
    self.tiles, self.readable = tiles, readable

  def measure(self, file, line):
    record = file.read(line)
    self.measured.append(line)
    if record["tokens"] == 13 and line not in self.readable:
      raise file.where(line).error("image not found: 13.jpg")
    return Size(record["tokens"], record["tiles"] + self.tiles * (record["tiles"] > 0), 1)

  def index(self, hosts, key=None, **options):
    file, key = JsonlFile(self.path, "toy"), key or {"a": 1, "root": str(self.cache)}
    return shared_sizes.index_sizes(
      sizes.MeasureLines(file, self.measure), key, self.cache, hosts, **{"workers": 0, **options}
    )

  def files(self):
    (folder,) = (path for path in self.cache.iterdir() if path.is_dir() and (path / "key.json").exists())
    return {name: (folder / name).read_bytes() for name in ("sizes.npy", "blocks.npy")}


def build(machines, **options):
  """Builds on all of them at once; returns the exchange and the sizes."""
  exchange, found = on_hosts(len(machines), lambda hosts: machines[hosts.me].index(hosts, **options))
  for one in found:
    assert isinstance(one, sizes.Sizes), one
  return exchange, found


def alone(tmp_path, path, **options):
  """What one host finds that begins with nothing."""
  machine = Machine(path, tmp_path / "alone", **options)
  return machine.index(ALONE), machine.files()


def assert_as_alone(machines, found, wanted, files):
  for machine, one in zip(machines, found, strict=True):
    np.testing.assert_array_equal(one.records, wanted.records)
    assert one.errors == wanted.errors
    assert machine.files() == files
    assert not list(one.folder.glob("hosts/*"))


CACHES = {"apart": "abc", "one for all": "aaa", "two share": "aba"}


@pytest.mark.parametrize("caches", CACHES)
def test_each_measures_its_part(tmp_path, caches):
  path = write(tmp_path)
  machines = [Machine(path, tmp_path / name) for name in CACHES[caches]]
  wanted, files = alone(tmp_path, path)
  told = [0, 0, 0]

  def index(hosts):
    def add(lines):
      told[hosts.me] += lines

    return machines[hosts.me].index(hosts, {"a": 1}, progress=add)

  _, found = on_hosts(3, index)
  assert_as_alone(machines, found, wanted, files)
  assert told == [len(TOKENS)] * 3
  measured = [line for machine in machines for line in machine.measured]
  assert sorted(measured) == list(range(len(TOKENS)))
  assert max(len(machine.measured) for machine in machines) <= 12  # 7 blocks of 4 lines: 3, 2 and 2
  # What is known is not exchanged again; of what could not be read, each line is tried by one.
  for machine in machines:
    machine.measured.clear()
  _, found = on_hosts(3, lambda hosts: machines[hosts.me].index(hosts, {"a": 1}))
  assert_as_alone(machines, found, wanted, files)
  assert sorted(line for machine in machines for line in machine.measured) == [23, 26]


def test_what_all_know_takes_one_message(tmp_path):
  path = write(tmp_path, range(20, 60))
  machines = [Machine(path, tmp_path / name) for name in "ab"]
  build(machines)
  exchange, _ = build(machines)
  assert exchange.calls == 1 and len(machines[0].measured) + len(machines[1].measured) == 40


def damage(folder):
  (path,) = folder.glob("*/sizes.npy")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # in the last block
  path.write_bytes(content)


def cut(folder):
  for path in folder.glob("*/*.npy"):
    path.write_bytes(path.read_bytes()[:7])


PASTS = {
  "empty": shutil.rmtree,
  "one flipped bit": damage,
  "cut": cut,
  "no key": lambda folder: next(folder.glob("*/key.json")).unlink(),
}


@pytest.mark.parametrize("past", PASTS)
def test_one_has_all_and_gives_it_to_others(tmp_path, past):
  path = write(tmp_path)
  wanted, files = alone(tmp_path, path)
  machines = [Machine(path, tmp_path / name) for name in "abc"]
  build(machines, key={"a": 1})
  for machine in machines:
    machine.measured.clear()
  for name in "bc":
    PASTS[past](tmp_path / name)
  _, found = build(machines, key={"a": 1})
  assert_as_alone(machines, found, wanted, files)
  assert sorted(line for machine in machines for line in machine.measured) == [23, 26]


def test_data_that_grew_on_hosts_that_know_different_parts(tmp_path):
  path = write(tmp_path, TOKENS[:12])
  first, second = Machine(path, tmp_path / "a"), Machine(path, tmp_path / "b")
  first.index(ALONE, {"a": 1})
  write(tmp_path, TOKENS[:16])
  second.index(ALONE, {"a": 1})
  write(tmp_path)
  first.measured, second.measured = [], []
  wanted, files = alone(tmp_path, path)
  _, found = build([first, second], key={"a": 1})
  assert_as_alone([first, second], found, wanted, files)
  assert sorted(first.measured + second.measured) == list(range(16, len(TOKENS)))


def test_what_hosts_know_differently_is_measured_again(tmp_path):
  """One of them was measured before its images were replaced."""
  path = write(tmp_path)
  Machine(path, tmp_path / "a", tiles=3).index(ALONE, {"a": 1})
  Machine(path, tmp_path / "b").index(ALONE, {"a": 1})
  machines = [Machine(path, tmp_path / name) for name in "ab"]
  wanted, files = alone(tmp_path, path)
  _, found = build(machines, key={"a": 1})
  assert_as_alone(machines, found, wanted, files)


def test_what_one_finds_replaced_all_measure_again(tmp_path):
  """The one that has nothing yet to look at must not lead the other one to keep what it knows."""
  path = write(tmp_path)
  Machine(path, tmp_path / "a").index(ALONE, {"a": 1})
  machines = [Machine(path, tmp_path / name, tiles=3) for name in "ab"]
  wanted, files = alone(tmp_path, path, tiles=3)
  _, found = build(machines, key={"a": 1}, probes=2)
  assert_as_alone(machines, found, wanted, files)


def test_lines_that_can_be_read_again_are_mended_on_all(tmp_path):
  path = write(tmp_path)
  build([Machine(path, tmp_path / name) for name in "ab"], key={"a": 1})
  machines = [Machine(path, tmp_path / name, readable=(23,)) for name in "ab"]
  wanted, files = alone(tmp_path, path, readable=(23,))
  _, found = build(machines, key={"a": 1})
  assert list(wanted.errors) == [26]
  assert_as_alone(machines, found, wanted, files)


@pytest.mark.parametrize("caches", CACHES)
def test_other_lines_on_one_host_are_left_to_the_comparison_of_data(tmp_path, caches):
  """Which names the file and the hosts; here nobody waits for anybody, and each has the sizes of its own lines."""
  machines = [
    Machine(write(tmp_path / str(i), [7, *TOKENS[1:]] if i == 1 else TOKENS), tmp_path / name)
    for i, name in enumerate(CACHES[caches])
  ]
  _, found = build(machines, key={"a": 1})
  assert [one.records["tokens"][0] for one in found] == [20, 7, 20]
  assert [len(machine.measured) for machine in machines] == [len(TOKENS)] * 3


def test_what_befalls_one_is_told_by_all(tmp_path, monkeypatch):
  path = write(tmp_path)
  machines = [Machine(path, tmp_path / name) for name in "abc"]
  blocked = tmp_path / "b"
  blocked.write_text("no folder")
  _, found = on_hosts(3, lambda hosts: machines[hosts.me].index(hosts))
  assert {type(one) for one in found} == {SharedDataError} and all(one.everywhere for one in found)
  (text,) = {str(one) for one in found}
  assert text.startswith(f"process 1 of 3: the cache in {blocked} cannot be written or read")
  # In the middle of it, too: what was measured until then is kept.
  blocked.unlink()
  write_to_disk, calls = sizes.Index.store_all, []

  def full(self, blocks, errors):
    calls.append(self)
    if len(calls) == 9:
      raise OSError(28, "No space left on device")
    write_to_disk(self, blocks, errors)

  monkeypatch.setattr(sizes.Index, "store_all", full)
  _, found = on_hosts(3, lambda hosts: machines[hosts.me].index(hosts, {"a": 1}))
  (text,) = {str(one) for one in found}
  assert "No space left on device" in text and "process" in text
  monkeypatch.undo()
  monkeypatch.setattr(sizes, "BLOCK", 4)
  before = sum(len(machine.measured) for machine in machines)
  build(machines, key={"a": 1})
  assert sum(len(machine.measured) for machine in machines) < before + len(TOKENS)


def test_worker_processes_are_shared_by_those_of_one_machine(tmp_path, monkeypatch):
  asked = []

  def serial(function, items, workers):
    asked.append(workers)
    return ((item, function(item)) for item in items)

  monkeypatch.setattr(shared_sizes, "map_items", serial)
  path = write(tmp_path)
  build([Machine(path, tmp_path / name) for name in "ab"], workers=8)
  assert asked == [4, 4]


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 1)])
def test_long_lines_are_laid_out_once(tmp_path, kept, monkeypatch):
  monkeypatch.setattr(long_samples, "_GROUP", 2)
  path = write(tmp_path)
  machines = [Machine(path, tmp_path / name) for name in "ab"]
  _, found = build(machines, key={"a": 1})
  limits, laid_out = Limits(30), collections.Counter()

  def pieces_of(file, line):
    laid_out[line] += 1
    if line == 12:
      raise file.where(line).error("longer than it may be", OverLengthError)
    return [(30, 1), (file.read(line)["tokens"] - 30, 0)]

  def lay_out(hosts, me=None):
    me = hosts.me if me is None else me
    file = JsonlFile(path, "toy")
    return long_samples.index_pieces(file, found[me], limits, pieces_of, workers=0, hosts=hosts)

  wanted = lay_out(ALONE, 0)
  for i in {0, 1} - {*kept}:
    for kept_file in found[i].folder.glob("pieces-*"):
      kept_file.unlink()
  if 1 in kept:
    lay_out(ALONE, 1)
  laid_out.clear()
  _, ours = on_hosts(2, lay_out)
  for one in ours:
    assert one.errors == wanted.errors and list(one.errors) == [12]
    for name in ("lines", "counts", "losses", "sizes"):
      np.testing.assert_array_equal(getattr(one, name), getattr(wanted, name))
  assert laid_out == ({} if kept == (0, 1) else dict.fromkeys(wanted.lines.tolist(), 1))
