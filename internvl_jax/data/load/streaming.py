"""Streams as a source of samples: read in order, measured and packed as they come; see `data.source.streams`.

A host reads shards of its own. Samples have numbers, 0, 1, 2, ... in the order in which the host meets them, and those that a
schedule still needs are kept in memory: as many as wait for a row, and those of the rows that are decoded ahead. A checkpoint holds
where the oldest of them was met; who goes on from it reads on from there.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from internvl_jax.data.load.fingerprint import Varying
from internvl_jax.data.load.messages import other_batches
from internvl_jax.data.load.samples import IndexedSamples, SampleSource, Settings
from internvl_jax.data.load.stream_mixture import Cursor, StreamMixture
from internvl_jax.data.schedule.order import Places
from internvl_jax.data.schedule.packed_steps import StepShape
from internvl_jax.data.schedule.schedule import Schedule
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.data.source import streams
from internvl_jax.data.source.meta import DatasetSpec, names_streams, read_meta
from internvl_jax.data.where import DataError

# Samples read at a time where rows look ahead: they are in memory with their images.
_CHUNK = 32
# A stream has no end, but numbers do.
_ENDLESS = 1 << 62
# Changes whenever the same stream would give other samples.
_VERSION = 1


def open_samples(settings: Settings) -> SampleSource:
  """Opens the data of a run: read by number, or streams.

  Raises:
    DataError: the meta file names both, or a setting is wrong.
  """
  meta = settings.data.meta_path
  if meta is None or not names_streams(meta):
    return IndexedSamples(settings)
  specs = read_meta(meta, cache=settings.loader.cache_dir)
  if odd := next((spec for spec in specs if spec.key not in streams.KEYS), None):
    raise DataError(
      f"{meta}: dataset {odd.name!r} is read by number, and others are streams; name all as streams, or none"
    )
  return StreamedSamples(settings, specs)


@dataclasses.dataclass(frozen=True, slots=True)
class StreamOrder:
  """The order of a stream: as it comes, see `order.Order`.

  Attributes:
    seed: of the order of its shards.
    shuffle: whether that is random.
  """

  seed: int
  shuffle: bool
  num_samples = _ENDLESS

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from a place of the stream on."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places of the stream."""
    return Places(np.zeros_like(positions), positions)

  def checksum(self) -> int:
    """The version of how a stream is read."""
    return _VERSION


class StreamedSamples:
  """Streams as the data of a run, see `samples.SampleSource`: the schedule is of this host's rows alone."""

  measured = True

  def __init__(self, settings: Settings, specs: Sequence[DatasetSpec]):
    """Opens the streams.

    Raises:
      DataError: a setting asks for what streams do not have.
    """
    _check(settings, specs)
    data, training, loader, *_, shards, _ = settings
    self._settings, self._specs = settings, specs
    self.lanes, self._lane = shards.feeders, shards.fed.start // len(shards.fed)
    self.samples = StreamMixture(settings, specs, self._lane, self.lanes)
    shape = StepShape.of(training, len(shards.fed))
    seed = training.seed if training.data_seed is None else training.data_seed
    self.schedule = Schedule(
      order=StreamOrder(seed, loader.shuffle),
      shape=shape,
      size_of=self.samples.size_of,
      packing=pack_settings(data) if data.use_packed_ds else None,
      # As HF's Trainer has it of data of unknown length: the run is one epoch.
      rows_per_epoch=training.max_steps * shape.rows,
      total_steps=training.max_steps,
      chunk=_CHUNK,
    )
    self.num_samples = training.max_steps * shape.rows * self.lanes
    self.workers = 0
    if training.dataloader_num_workers:
      logging.info("Streams are decoded by threads: training.dataloader_num_workers has no effect")

  def mine(self) -> range:
    """All rows of the schedule, which is this host's own."""
    return range(self.schedule.shape.micro_rows)

  def advance(self, state: dict[str, Any] | None, step: int) -> None:
    """Lets the samples go before the oldest that a schedule needs which goes on from this state."""
    self.samples.let_go(self._oldest(state, step))

  def _oldest(self, rows: dict[str, Any] | None, step: int) -> int:
    if rows is None:
      return step * self.schedule.shape.rows
    *_, waiting = rows["waiting"]
    return min([rows["position"], *waiting])

  def pack_state(self, rows: dict[str, Any] | None, step: int) -> dict[str, Any]:
    """The states of all hosts, each with the place of the oldest sample that it needs. All hosts call it at once."""
    sample, cursor = self.samples.place_of(self._oldest(rows, step))
    mine = {
      "lane": self._lane,
      "rows": rows,
      "sample": sample,
      "record": cursor.record,
      "places": cursor.places,
    }
    parts = self._settings.shards.hosts.together(lambda: json.dumps(mine).encode())
    lanes = {lane["lane"]: lane for lane in map(json.loads, parts)}
    return {"streams": [lanes[number] for number in sorted(lanes)]}

  def unpack_state(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Goes to where this host was; returns the state of its rows.

    Raises:
      DataError: the state is of other data, settings, or of another number of hosts.
    """
    if missing := {"next_step", "counters", "plan", "content", "streams"} - state.keys():
      raise other_batches(f"its state lacks {', '.join(sorted(missing))}, as it was not of streams", "data")
    for name, then in state["content"].items():
      if then != (now := self.content.get(name)):
        raise other_batches(
          f"{name} was {then!r} when its state was saved and is {now!r} now", "data and settings"
        )
    lanes = state["streams"]
    if len(lanes) != self.lanes:
      raise other_batches(
        f"{len(lanes)} hosts read shards of streams and {self.lanes} do now", "number of hosts"
      )
    mine = lanes[self._lane]
    places = tuple(tuple(place) for place in mine["places"])
    self.samples.go_to(int(mine["sample"]), Cursor(int(mine["record"]), places))
    if (mine["rows"] is None) != (self.schedule.packing is None):
      raise other_batches("its rows were packed or not when its state was saved", "settings")
    return mine["rows"]

  @property
  def content(self) -> dict[str, Any]:
    """A description of the streams, as far as they are known before they are read: names and settings."""
    data = self._settings.data
    settings = ("conv_style", "max_seq_length", "force_image_size", "dynamic_image_size", "use_thumbnail")
    settings = (
      *settings,
      "pad2square",
      "min_dynamic_patch",
      "max_dynamic_patch",
      "min_num_frame",
      "max_num_frame",
    )
    return {
      "streams": [[spec.name, spec.key, spec.annotation, spec.repeat_time] for spec in self._specs],
      "seed": self._settings.training.seed,
      "tokenizer": self._settings.tokenizer.vocabulary(),
      "loader.on_over_length": self._settings.loader.on_over_length,
      **{f"data.{name}": getattr(data, name) for name in settings},
    }

  def tell_changes(self) -> None:
    """Does nothing: what was read is not looked at again."""

  def fingerprint(self) -> str:
    """A hash of what the streams are."""
    return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

  def shared_facts(self) -> dict[str, Any]:
    """Facts that must be equal on all hosts, as JSON values by their names in messages."""
    return {f"{name} of the streams": value for name, value in self.content.items()}

  def first_varying(self) -> Varying | None:
    """The first stream: a sample comes once, so that nothing can be known of it beforehand."""
    return Varying(self._specs[0].name, "it is a stream, whose samples are not known before they come")

  def has_images(self) -> bool:
    """Always true: that is not known before a stream is read."""
    return True

  def size_counts(self) -> list[dict[str, Any]]:
    """None: sizes are not known before a stream is read."""
    return []


def _check(settings: Settings, specs: Sequence[DatasetSpec]) -> None:
  """Refuses what needs to know how many samples there are.

  Raises:
    DataError: a setting asks for it.
  """
  data, training = settings.data, settings.training
  blame = f"{data.meta_path}: dataset {specs[0].name!r} is a stream of unknown length"
  if training.max_steps <= 0:
    raise DataError(f"{blame}, of which epochs cannot be counted; set training.max_steps")
  asked = {
    "training.group_by_length": training.group_by_length,
    "data.use_data_resampling": data.use_data_resampling,
    "data.replacement": data.replacement and data.use_packed_ds,
  }
  if odd := next((name for name, value in asked.items() if value), None):
    raise DataError(
      f"{blame}, and {odd} needs the samples' number; set it to False (repeat_time says how datasets are mixed)"
    )
