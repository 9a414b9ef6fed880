"""Preference pairs: two conversations about the same tiles, in the rows, files and counters of other samples."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image

from data_toys import WHERE, arguments, turns, write_jsonl
from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, PreferenceBatch, SFTBatch
from internvl_jax.data.errors import DataError
from internvl_jax.data.fitting import Limits
from internvl_jax.data.meta import DatasetSpec
from internvl_jax.data.mixture import Mixture
from internvl_jax.data.pipeline import TrainLoader
from internvl_jax.data.sample import SampleMaker

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


def maker(folder, tokenizer, *, preference=True, limits=None, **changes):
  return SampleMaker(
    spec=DatasetSpec(name="toy", root=str(folder), annotation="toy.jsonl"),
    data=arguments("unused.json", **FRAMES | changes),
    tokenizer=tokenizer,
    tokens_per_tile=P,
    limits=limits or Limits(4096),
    preference=preference,
  )


# --- What a line becomes ---------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
  picture(tmp_path, "a.png")
  picture(tmp_path, "b.png", 16, 48)
  picture(tmp_path, "v.gif", frames=5)
  return tmp_path


LINES = {
  "one image": ({"image": "a.png"}, "what?", "<image>\nwhat?"),
  "its place": ({"image": "a.png"}, "what is <image>?", "what is <image>?"),
  "several": ({"image": ["a.png", "b.png"]}, "<image> or <image>?", "<image> or <image>?"),
  "text": ({}, "who?", "who?"),
  "video": ({"video": "v.gif"}, "who?", "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwho?"),
}


@pytest.mark.parametrize("name", LINES)
def test_both_conversations_are_those_of_fine_tuning(files, tokenizer, name):
  media, question, written = LINES[name]
  sample = maker(files, tokenizer).make(
    pair(question, "red circle", "no", **media), WHERE, frames=3, index=7, dataset=2
  )
  assert (sample.index, sample.dataset, sample.truncated, sample.fully_masked) == (7, 2, False, False)
  if "video" in media:
    image_tokens = [P] * 3
  else:
    names = media.get("image", [])
    plain = {"conversations": turns("<image>" * len(np.atleast_1d(names)), "red"), **media}
    other = maker(files, tokenizer, preference=False).make(plain, WHERE)
    np.testing.assert_array_equal(sample.tiles, other.tiles)
    runs = np.diff(np.flatnonzero(np.diff(other.input_ids == tokenizer.image_token_id, prepend=False)))[::2]
    image_tokens = runs.tolist()
  assert len(sample.tiles) * P == sum(image_tokens)
  for segment, answer in zip(sample.segments(), ("red circle", "no"), strict=True):
    expected = tokenizer.encode(turns(written, answer), image_tokens, WHERE)
    np.testing.assert_array_equal(segment.input_ids, expected.input_ids)
    np.testing.assert_array_equal(segment.labels, expected.labels)
    taught = segment.labels[segment.labels != IGNORE_INDEX]
    assert tokenizer.decode(taught, special=True) == f"{answer}<|im_end|>"


def test_the_frames_of_other_data_keep_their_names(files, tokenizer):
  record = {"video": "v.gif", "conversations": turns("who?", "red")}
  sample = maker(files, tokenizer, preference=False).make(record, WHERE, frames=2)
  assert "Frame-2: " in tokenizer.decode(sample.input_ids, special=True)


# --- Rows ------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("pairs"))


def make_loader(meta, tokenizer, *, data=None, loader=None, shards=1, **more):
  names = ("my_shards", "state", "reference", "preference")
  options = {"preference": True} | {name: more.pop(name) for name in names if name in more}
  settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5}
  settings |= {"disable_tqdm": True}
  return TrainLoader(
    arguments(meta, **FRAMES | (data or {})),
    TrainingArguments(**settings | more),
    LoaderConfig(**{"cache_dir": str(meta.parent / "cache")} | (loader or {})),
    tokenizer,
    tokens_per_tile=P,
    data_shards=shards,
    **options,
  )


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


@pytest.fixture(scope="module")
def unpacked(meta, tokenizer):
  loader = make_loader(meta, tokenizer, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1)
  found = [entry for batch in loader for entry in segments_of(batch)]
  loader.close()
  return found


def test_a_batch_is_as_its_schema_says(meta, tokenizer):
  with contextlib.closing(make_loader(meta, tokenizer, data=PACKED, shards=2)) as loader:
    batch = next(loader)
  A, R, S = batch.rows.input_ids.shape
  assert isinstance(batch.rows, SFTBatch) and (A, R) == (2, 2)
  shapes = [(array.shape, array.dtype) for array in batch[1:]]
  K = S // 4
  assert shapes == [((A, R, K), np.float32), ((A, R, K), np.int32), ((A, R, K, 2), np.float32)]
  assert np.isnan(batch.reference).all() and batch.pair_weight.sum(-1).max() > 1
  np.testing.assert_array_equal(batch.pair_weight == 1, batch.pair_index >= 0)
  np.testing.assert_array_equal(batch.rows.loss_weight == 1, batch.rows.targets != IGNORE_INDEX)
  assert set(np.unique(batch.rows.loss_weight)) == {0, 1}


def test_packed_equals_unpacked(meta, tokenizer, unpacked):
  assert sorted(index for index, *_ in unpacked) == list(range(36))
  with contextlib.closing(
    make_loader(meta, tokenizer, data=PACKED, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1)
  ) as loader:
    assert loader.num_samples == 36 and loader.rows_per_epoch < 25
    found = [entry for batch in loader for entry in segments_of(batch)]
    counters = loader.counters()
  assert sorted(found) == sorted(unpacked)
  assert [counts["samples"] for counts in counters.values()] == [12, 24]


@pytest.mark.parametrize("data", [{}, PACKED], ids=["unpacked", "packed"])
def test_resume_is_bit_identical_for_any_workers_and_hosts(meta, tokenizer, data):
  with contextlib.closing(make_loader(meta, tokenizer, data=data, shards=2)) as loader:
    expected, wanted = list(loader), loader.get_state()
  batches, state = [], None
  for workers, steps in ((1, 1), (0, 2)):
    with contextlib.closing(
      make_loader(meta, tokenizer, data=data, shards=2, state=state, dataloader_num_workers=workers)
    ) as loader:
      batches += [next(loader) for _ in range(steps)]
      state = json.loads(json.dumps(loader.get_state()))
  with contextlib.ExitStack() as stack:
    hosts = [
      stack.enter_context(
        contextlib.closing(
          make_loader(meta, tokenizer, data=data, shards=2, state=state, my_shards=range(i, i + 1))
        )
      )
      for i in range(2)
    ]
    for _ in range(2):
      parts = [next(host) for host in hosts]
      joined = [np.concatenate(arrays, axis=1) for arrays in zip(*map(leaves, parts), strict=True)]
      batches.append(PreferenceBatch(SFTBatch(*joined[:7]), *joined[7:]))
    assert hosts[0].next_step == wanted["next_step"]
  for batch, other in zip(batches, expected, strict=True):
    assert_equal(batch, other)


def test_the_reference_is_looked_up_by_index(meta, tokenizer):
  table = np.random.default_rng(0).normal(size=(36, 2)).astype(np.float32)
  asked = []

  def look_up(indices):
    asked.append(indices)
    return table[indices]

  with contextlib.closing(make_loader(meta, tokenizer, data=PACKED, reference=look_up)) as loader:
    batch = next(loader)
  assert np.concatenate(asked).dtype == np.int64
  real = batch.pair_index >= 0
  np.testing.assert_array_equal(batch.reference[real], table[batch.pair_index[real]])
  assert np.isnan(batch.reference[~real]).all()


def test_the_pairs_of_a_batch_are_told(meta, tokenizer):
  with contextlib.closing(make_loader(meta, tokenizer, loader={"shuffle": False})) as loader:
    next(loader)
    assert loader.describe_batch(0) == f"{meta.parent}/one.jsonl:1,2"


def test_states_and_sizes_of_fine_tuning_are_others(files, tokenizer):
  both = pair("who?", "red", "no", conversations=turns("who?", "red circle"))
  write_jsonl(files / "toy.jsonl", [both] * 3)
  meta = files / "meta.json"
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.jsonl"}}))
  sizes, states = [], []
  for preference in (False, True):
    mixture = Mixture(
      arguments(meta), tokenizer, tokens_per_tile=P, seed=42, cache=files, preference=preference
    )
    mixture.index_sizes(files / "sizes", workers=0, quiet=True)
    sizes.append(mixture.size_of(np.arange(3))[:, 0].tolist())
    mixture.close()
    with contextlib.closing(make_loader(meta, tokenizer, preference=preference)) as loader:
      next(loader)
      states.append(loader.get_state())
  answers = [len(tokenizer.encode(turns("who?", text), [], WHERE).input_ids) for text in ("red", "no")]
  assert sizes == [[answers[0] + 1] * 3, [sum(answers)] * 3]
  with pytest.raises(DataError, match="preference was 0 when its state was saved and is 1 now"):
    make_loader(meta, tokenizer, state=states[0])
