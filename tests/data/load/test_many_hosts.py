"""Batches do not depend on how many hosts make them, nor on how many made those before."""

import hashlib
import json

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import TokenBatch
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.schedule.balance import UNIT, RowCost
from internvl_jax.data.where import DataError
from internvl_jax.errors import UserError
from internvl_jax.outputs import read_from
from tests.data.schedule.test_packed import FRAMES, PACKED, write_mixture
from tests.support.data_toys import arguments, resumed, write_jsonl

SHARDS = 4
SETTINGS = {
  "packed": ({**PACKED, "max_packed_tokens": 400}, {}),
  "grouped": ({"max_seq_length": 256}, {"group_by_length": True}),
  "plain": ({"max_seq_length": 256}, {}),
  "balanced": ({**PACKED, "max_packed_tokens": 400}, {}),
  "drawn and balanced": ({**PACKED, "max_packed_tokens": 400, "replacement": True}, {}),
}
COST = RowCost(per_tile=9 * UNIT, per_pair=UNIT // 32)


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("mixture"), 60)


class Hosts:
  """The loaders of several hosts, as one."""

  def __init__(self, meta, tokenizer, name, hosts, *, state=None, shards=SHARDS, cost=COST, **training):
    data, more = SETTINGS[name]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 120}
    settings |= {"disable_tqdm": True} | more | training
    each, self.reads = shards // hosts, None
    self.loaders = [
      self.open(
        arguments(meta, **FRAMES | data),
        TrainingArguments(**settings),
        LoaderConfig(
          cache_dir=str(meta.parent / "cache"), on_bad_sample="drop", max_bad_fraction=0.5, balance_steps=6
        ),
        tokenizer,
        shards=Shards(
          count=shards,
          mine=range(host * each, (host + 1) * each),
          all_sum=self.all_sum,
          row_cost=cost if "balanced" in name else None,
        ),
        state=state,
      )
      for host in range(hosts)
    ]

  def all_sum(self, counts):
    """What a collective gives, once all have said what they have read."""
    return counts if self.reads is None else sum(self.reads)

  def open(self, *settings, shards, state):
    return resumed(TrainLoader(*settings, tokens_per_tile=4, shards=shards), state)

  def step(self):
    """The global batch: rows and shards of the hosts side by side."""
    parts = [next(loader) for loader in self.loaders]
    return TokenBatch(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))

  def state(self):
    """The state of the first host, with the counts of all, as a sum over hosts gives it to each."""
    self.reads = [loader._tally.read for loader in self.loaders]
    states = [json.loads(json.dumps(loader.get_state())) for loader in self.loaders]
    assert all(state == states[0] for state in states)
    return states[0]

  def close(self):
    for loader in self.loaders:
      loader.close()


def digest(batch):
  text = hashlib.sha256()
  for array in batch:
    text.update(repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
  return text.hexdigest()


@pytest.mark.parametrize("name", ["packed", "grouped", "plain", "drawn and balanced"])
@pytest.mark.parametrize(("before", "after"), [(3, 9), pytest.param(10, 100, marks=pytest.mark.slow)])
def test_batches_after_other_workers_and_hosts(meta, tokenizer, name, before, after):
  """An epoch has four of them, or fewer; workers take seconds to start."""
  straight = Hosts(meta, tokenizer, name, 1)
  expected = [digest(straight.step()) for _ in range(before + after)]
  assert len(set(expected)) == before + after
  wanted = straight.state()
  straight.close()
  first = Hosts(meta, tokenizer, name, 2, dataloader_num_workers=int(name == "plain" or after > 9))
  found = [digest(first.step()) for _ in range(before)]
  state = first.state()
  first.close()
  second = Hosts(meta, tokenizer, name, 4, state=state)
  found += [digest(second.step()) for _ in range(after)]
  assert found == expected
  assert second.state() == wanted
  second.close()


@pytest.mark.parametrize("name", ["packed", "plain"])
def test_a_batch_that_is_ready_ahead_is_not_yet_handed_out(meta, tokenizer, name):
  both = straight, ahead = [Hosts(meta, tokenizer, name, 1, max_steps=8).loaders[0] for _ in range(2)]
  batches, states = [], []
  for step in range(8):
    ahead.prefetch()
    assert ahead.get_state() == straight.get_state()
    states.append(json.loads(json.dumps(ahead.get_state())))
    batches.append(digest(next(straight)))
    assert digest(next(ahead)) == batches[-1]
    assert ahead.batch_samples(step) == straight.batch_samples(step)
  ahead.prefetch()  # There is none.
  assert ahead.get_state() == straight.get_state()
  again = Hosts(meta, tokenizer, name, 1, max_steps=8, state=states[5]).loaders[0]
  assert [digest(next(again)) for _ in range(3)] == batches[5:]
  for loader in (*both, again):
    loader.close()


def test_what_goes_wrong_ahead_is_met_when_the_batch_is_due(meta, tokenizer, monkeypatch):
  (loader,) = Hosts(meta, tokenizer, "packed", 1, max_steps=8).loaders
  loader.prefetch()
  assert loader._iterator is None  # The first one may need other hosts.
  next(loader)
  before = loader.get_state()
  monkeypatch.setattr(loader, "_assemble", lambda *arguments: 1 / 0)
  loader.prefetch()
  assert loader.get_state() == before
  with pytest.raises(ZeroDivisionError):
    next(loader)
  monkeypatch.undo()
  assert loader.get_state() == before
  loader.prefetch()
  loader.close()
  assert loader.get_state() == before


def spoilt(value, path=()):
  """Copies of a JSON value with one entry each left out, or of another kind; with the place."""
  if isinstance(value, dict):
    for key, entry in value.items():
      yield (*path, key, "left out"), {name: kept for name, kept in value.items() if name != key}
      for place, changed in spoilt(entry, (*path, key)):
        yield place, {**value, key: changed}
  yield (*path, "of another kind"), "x" if isinstance(value, dict | list | int) else 7


def test_a_state_that_was_changed_is_refused_in_a_line(meta, tokenizer):
  """As those of checkpoints without digests may be; what is missing there since earlier versions may be missing."""
  (loader,) = Hosts(meta, tokenizer, "packed", 1).loaders
  next(loader)
  state = json.loads(json.dumps(loader.get_state()))
  loader.close()
  told = []
  for _, changed in spoilt(state):
    try:
      with read_from(meta.parent, "loader"):
        Hosts(meta, tokenizer, "packed", 1, state=changed)
    except UserError as error:
      told.append(str(error))
  assert len(told) > 20 and not any("\n" in text for text in told)


def test_whether_there_are_images_is_known_before_any_is_read(meta, tokenizer, tmp_path):
  for name in ("packed", "plain"):  # By their sizes, and by their lines.
    assert Hosts(meta, tokenizer, name, 1).loaders[0].has_images()
  folder = tmp_path / "text"
  folder.mkdir()
  talk = [{"from": "human", "value": 'which "colour"?'}, {"from": "gpt", "value": "red image video"}]
  write_jsonl(folder / "text.jsonl", [{"conversations": talk}] * 9)
  text = folder / "meta.json"
  text.write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  for name in ("packed", "plain"):
    assert not Hosts(text, tokenizer, name, 1).loaders[0].has_images()


def test_grouping_gives_the_same_samples_and_even_shards(meta, tokenizer):
  grouped = Hosts(meta, tokenizer, "grouped", 1, max_steps=20)
  plain = Hosts(meta, tokenizer, "plain", 1, max_steps=20)

  def rows(batch):
    return sorted(row.tobytes() for row in batch.input_ids.reshape(-1, batch.input_ids.shape[-1]))

  def spread(batch):
    loads = (batch.segment_ids > 0).sum(-1).reshape(2 * SHARDS, -1).sum(-1)
    return loads.max() / loads.min()

  loads = []
  for _ in range(20):
    ours, theirs = grouped.step(), plain.step()
    assert rows(ours) == rows(theirs)
    loads.append((spread(ours), spread(theirs)))
  ours, theirs = np.median(loads, axis=0)
  assert ours < 1.1 < theirs
  grouped.close()
  plain.close()


def test_balanced_shards_are_even_and_the_log_says_so(meta, tokenizer, caplog):
  def loads(batch):
    pairs = ((batch.positions + 1) * (batch.segment_ids > 0)).sum(-1)
    tokens = (batch.segment_ids > 0).sum(-1)
    tiles = (batch.image_index >= 0).sum(-1) / 4
    return (9 * tiles + tokens + pairs / 32).reshape(2, SHARDS, -1).sum(-1)

  found = []
  with caplog.at_level("INFO"):
    for name in ("packed", "balanced"):
      hosts = Hosts(meta, tokenizer, name, 1, max_steps=18)
      each = [loads(hosts.step()) for _ in range(18)]
      found.append(np.sum(np.max(each, axis=2)) / np.sum(np.mean(each, axis=2)))
      hosts.close()
  assert found[1] - 1 < 0.5 * (found[0] - 1)
  told = [record.getMessage() for record in caplog.records if "slowest device" in record.getMessage()]
  assert len(told) == 3 and told[1].startswith("Steps 7 to 12: the slowest device has 1.0")


def test_a_run_goes_on_as_it_began_whether_balanced_or_not(meta, tokenizer, caplog):
  for began, now, how in (("packed", "balanced", "are not balanced"), ("balanced", "packed", "over 6 steps")):
    straight = Hosts(meta, tokenizer, began, 1, max_steps=9)
    for _ in range(4):
      straight.step()
    state = straight.state()
    rest = [digest(straight.step()) for _ in range(5)]
    with caplog.at_level("INFO"):
      other = Hosts(meta, tokenizer, now, 1, max_steps=9, state=state)
    assert [digest(other.step()) for _ in range(5)] == rest
    assert any("goes on as it began" in text and how in text for text in caplog.messages)
    straight.close()
    other.close()
    caplog.clear()


def test_balanced_batches_are_the_same_on_one_to_four_hosts_and_from_three_to_two(meta, tokenizer):
  one_row = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 12,
    "shards": 12,
  }
  found, states = {}, {}
  for hosts in (1, 2, 3, 4):
    loaders = Hosts(meta, tokenizer, "balanced", hosts, **one_row)
    found[hosts] = [digest(loaders.step()) for _ in range(4)]  # Of a window of six.
    states[hosts] = loaders.state()
    found[hosts] += [digest(loaders.step()) for _ in range(4 * (hosts == 1))]
    loaders.close()
  assert len(set(found[1])) == 8
  assert found[2] == found[3] == found[4] == found[1][:4]
  assert states[1] == states[2] == states[3] == states[4]
  # By other costs, rows would be in other steps, but a run goes on by those that it began with.
  other = RowCost(per_tile=0, per_pair=UNIT)
  resumed_on_two = Hosts(meta, tokenizer, "balanced", 2, state=states[3], cost=other, **one_row)
  assert [digest(resumed_on_two.step()) for _ in range(4)] == found[1][4:]
  resumed_on_two.close()
  anew = Hosts(meta, tokenizer, "balanced", 2, cost=other, **one_row)
  assert [digest(anew.step()) for _ in range(4)] != found[1][:4]
  anew.close()


def test_shards_that_do_not_divide_are_refused(meta, tokenizer):
  for shards in (range(3), range(0), range(2, 6), range(0, 4, 2)):
    with pytest.raises(DataError, match=r"this host's shards range\(.* are not an equal part of 4"):
      TrainLoader(
        arguments(meta),
        TrainingArguments(max_steps=1),
        LoaderConfig(),
        tokenizer,
        tokens_per_tile=4,
        shards=Shards(count=4, mine=shards),
      )
