"""Preference pairs for tests: lines, a mixture of them, loaders, and what batches must hold."""

import contextlib
import json

import numpy as np
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import NO_IMAGE
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.lines import PairLines
from internvl_jax.tasks.sft.data import DATA
from tests.support.data_toys import WHERE, arguments, resumed, write_jsonl

P = 4


PACKED = {"use_packed_ds": True, "max_packed_tokens": 1600, "num_images_expected": 24, "strict_mode": False}


FRAMES = {"min_num_frame": 2, "max_num_frame": 6}


def pair(question, chosen="red", rejected="no", **more):
  return {**more, "question": question, "chosen": chosen, "rejected": rejected}


def picture(folder, name, width=40, height=24, frames=1, seed=0):
  rng = np.random.default_rng(seed)
  pictures = [
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)
  ]
  more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
  pictures[0].save(folder / name, **more)
  return name


def lines_of(preference=True, share_prompts=False):
  return PairLines(share_prompts=share_prompts) if preference else DATA.lines


def maker(folder, tokenizer, *, preference=True, limits=None, share_prompts=False, **changes):
  return SampleMaker(
    spec=DatasetSpec(name="toy", root=str(folder), annotation="toy.jsonl"),
    data=arguments("unused.json", **FRAMES | changes),
    tokenizer=tokenizer,
    tokens_per_tile=P,
    limits=limits or Limits(4096),
    lines=lines_of(preference, share_prompts),
  )


LINES = {
  "one image": ({"image": "a.png"}, "what?", "<image>\nwhat?"),
  "its place": ({"image": "a.png"}, "what is <image>?", "what is <image>?"),
  "several": ({"image": ["a.png", "b.png"]}, "<image> or <image>?", "<image> or <image>?"),
  "text": ({}, "who?", "who?"),
  "video": ({"video": "v.gif"}, "who?", "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwho?"),
}


def write_mixture(folder, count=24):
  """Two datasets of pairs about texts, images, several images and gifs, of many lengths."""
  rng = np.random.default_rng(0)
  records = []
  for i in range(count):
    chosen, rejected = ("red " * int(n) for n in rng.choice(np.arange(1, 60), 2, replace=False))
    media = [
      lambda i=i: {},
      lambda i=i: {"image": picture(folder, f"{i}.png", 8 + 3 * i, 30, seed=i)},
      lambda i=i: {"image": [picture(folder, f"{i}_{k}.png", 30, 8 + 3 * i, seed=i + k) for k in range(2)]},
      lambda i=i: {"video": picture(folder, f"{i}.gif", frames=9, seed=i)},
    ][i % 4]()
    places = "<image> and <image> " if i % 4 == 2 else ""
    records.append(pair(f"{places}what is number {i}?", chosen, rejected, **media))
  write_jsonl(folder / "one.jsonl", records[::2])
  write_jsonl(folder / "two.jsonl", records[1::2])
  entries = {name: {"root": "", "annotation": f"{name}.jsonl"} for name in ("one", "two")}
  entries["two"]["repeat_time"] = 2
  (folder / "meta.json").write_text(json.dumps(entries))
  return folder / "meta.json"


def make_loader(meta, tokenizer, *, data=None, loader=None, shards=1, **more):
  lines = lines_of(more.pop("preference", True), more.pop("share_prompts", False))
  reference = more.pop("reference", None)
  task = PairData(lines=lines, reference=reference) if lines.kind == "preference" else DATA
  state, split = more.pop("state", None), Shards(count=shards, mine=more.pop("my_shards", None))
  settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5}
  settings |= {"disable_tqdm": True}
  opened = TrainLoader(
    arguments(meta, **FRAMES | (data or {})),
    TrainingArguments(**settings | more),
    LoaderConfig(**{"cache_dir": str(meta.parent / "cache")} | (loader or {})),
    tokenizer,
    tokens_per_tile=P,
    shards=split,
    task=task,
  )
  return resumed(opened, state)


def leaves(batch):
  return [*batch.rows, *batch[1:]]


def assert_equal(batch, other):
  assert isinstance(batch, PreferenceBatch) and isinstance(other, PreferenceBatch)
  for array, wanted in zip(leaves(batch), leaves(other), strict=True):
    assert array.dtype == wanted.dtype
    np.testing.assert_array_equal(array, wanted)


def segments_of(batch):
  """What each pair of a batch is, by its index: of both answers, all that a row says of a token, and its tile's pixels."""
  rows, found = batch.rows, []
  A, R, _ = rows.input_ids.shape
  D = rows.tiles.shape[1]
  for a, r in np.ndindex(A, R):
    pool = rows.tiles[a, r // (R // D)]
    for k in np.flatnonzero(batch.pair_weight[a, r]).tolist():
      answers = []
      for segment in (2 * k + 1, 2 * k + 2):
        mine = rows.segment_ids[a, r] == segment
        names = ("input_ids", "targets", "loss_weight", "positions")
        text = b"".join(getattr(rows, name)[a, r][mine].tobytes() for name in names)
        features = rows.image_index[a, r][mine & (rows.image_index[a, r] != NO_IMAGE)]
        assert features.size == 0 or (features % P).tolist() == list(range(P)) * (len(features) // P)
        answers.append((mine.sum().item(), text, pool[features // P].tobytes(), features.tobytes()))
      assert answers[0][3] == answers[1][3]  # the same features, not equal ones
      found.append((int(batch.pair_index[a, r, k]), *(part for answer in answers for part in answer[:3])))
    assert rows.segment_ids[a, r].max() == 2 * batch.pair_weight[a, r].sum()
  return found


def whole_pairs(batch):
  """Of each pair by its index: both conversations' ids, positions, targets and weights, with what they share."""
  rows, found = batch.rows, {}
  names = ("input_ids", "positions", "targets", "loss_weight", "image_index")
  for a, r in np.ndindex(*batch.pair_index.shape[:2]):
    for k in np.flatnonzero(batch.pair_weight[a, r]).tolist():
      first, second = (np.flatnonzero(rows.segment_ids[a, r] == s) for s in batch.answers[a, r, k])
      number = rows.segment_ids[a, r, first[0]]
      shared = first[batch.parent[a, r, first] == number]
      assert (shared == first[: len(shared)]).all() and not batch.parent[a, r, first[len(shared) :]].any()
      assert (batch.parent[a, r, second] == (number if len(shared) else 0)).all()
      parts = []
      for places in (first, np.concatenate([shared, second])):
        fields = {name: getattr(rows, name)[a, r, places] for name in names}
        pool = rows.tiles[a, r // (rows.input_ids.shape[1] // rows.tiles.shape[1])]
        features = fields.pop("image_index")
        fields["images"] = np.flatnonzero(features != NO_IMAGE)
        fields["tiles"] = pool[features[fields["images"]] // P]
        parts.append(fields)
      found[int(batch.pair_index[a, r, k])] = (len(shared), *parts)
  assert not batch.parent[rows.segment_ids == 0].any()
  return found


def pairs_of(meta, tokenizer, **settings):
  settings = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1} | settings
  with contextlib.closing(make_loader(meta, tokenizer, **settings)) as loader:
    found = {}
    for batch in loader:
      found |= whole_pairs(batch)
    return found, loader.counters()


LONG = pair("what?", "red " * 40, "red " * 20 + "no " * 3, image="a.png")


def fitted(files, tokenizer, record=LONG, **limits):
  limits = Limits(**limits)
  limited = maker(files, tokenizer, limits=limits)
  sample = limited.make(record, WHERE)
  assert limited.pieces(record, WHERE, 8) == [(len(sample.input_ids), len(sample.tiles))]
  return sample
