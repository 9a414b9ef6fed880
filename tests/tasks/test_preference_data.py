"""Preference pairs: two conversations about the same tiles, in the rows, files and counters of other samples."""

import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.load.show import as_json, show_batch, show_sample
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import Chat, ChatTokenizer
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError, OverLengthError, UnsupervisedError
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.lines import PairLines, shared_tokens
from internvl_jax.tasks.sft.data import DATA
from tests.support.data_toys import WHERE, arguments, resumed, turns, write_jsonl

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
  sample = maker(files, tokenizer).make(pair(question, "red circle", "no", **media), WHERE, frames=3)
  assert (sample.truncated, sample.fully_masked) == (False, False)
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
  assert isinstance(batch.rows, TokenBatch) and (A, R) == (2, 2)
  shapes = [(array.shape, array.dtype) for array in batch[1:]]
  K = S // 4
  assert shapes == [
    ((A, R, K), np.float32),
    ((A, R, K), np.int32),
    ((A, R, K, 2), np.float32),
    ((A, R, K, 2), np.int32),
    ((A, R, S), np.int32),
  ]
  np.testing.assert_array_equal(batch.answers > 0, np.stack([batch.pair_weight == 1] * 2, axis=-1))
  assert not batch.parent.any()
  assert np.isnan(batch.reference).all() and batch.pair_weight.sum(-1).max() > 1
  np.testing.assert_array_equal(batch.pair_weight == 1, batch.pair_index >= 0)
  np.testing.assert_array_equal(batch.rows.loss_weight == 1, batch.rows.targets != IGNORE_INDEX)
  assert set(np.unique(batch.rows.loss_weight)) == {0, 1}


def test_packed_equals_unpacked(meta, tokenizer, unpacked):
  assert sorted(index for index, *_ in unpacked) == list(range(36))
  with contextlib.closing(
    make_loader(meta, tokenizer, data=PACKED, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=1)
  ) as loader:
    assert loader.num_samples == 36 and loader.schedule.rows_per_epoch < 25
    found = [entry for batch in loader for entry in segments_of(batch)]
    counters = loader.counters()
  assert sorted(found) == sorted(unpacked)
  assert [counts["samples"] for counts in counters.values()] == [12, 24]


@pytest.mark.parametrize("name", ["unpacked", "grouped", "packed"])
def test_resume_is_bit_identical_for_any_workers_and_hosts(meta, tokenizer, name):
  settings = {"data": PACKED if name == "packed" else {}, "group_by_length": name == "grouped", "shards": 2}
  with contextlib.closing(make_loader(meta, tokenizer, **settings)) as loader:
    expected, wanted = list(loader), loader.get_state()
  batches, state = [], None
  for workers, steps in ((1, 1), (0, 2)):
    with contextlib.closing(
      make_loader(meta, tokenizer, **settings, state=state, dataloader_num_workers=workers)
    ) as loader:
      batches += [next(loader) for _ in range(steps)]
      state = json.loads(json.dumps(loader.get_state()))
  with contextlib.ExitStack() as stack:
    hosts = [
      stack.enter_context(
        contextlib.closing(make_loader(meta, tokenizer, **settings, state=state, my_shards=range(i, i + 1)))
      )
      for i in range(2)
    ]
    for _ in range(2):
      parts = [next(host) for host in hosts]
      joined = [np.concatenate(arrays, axis=1) for arrays in zip(*map(leaves, parts), strict=True)]
      batches.append(PreferenceBatch(TokenBatch(*joined[:7]), *joined[7:]))
    assert hosts[0].next_step == wanted["next_step"]
  for batch, other in zip(batches, expected, strict=True):
    assert_equal(batch, other)


# --- Prompts that stand once -----------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def whole(meta, tokenizer):
  found, _ = pairs_of(meta, tokenizer)
  assert len(found) == 36 and not any(shared for shared, *_ in found.values())
  return found


@pytest.mark.parametrize("data", [{}, PACKED], ids=["unpacked", "packed"])
def test_a_shared_prompt_is_the_whole_one(meta, tokenizer, whole, data):
  # Packed rows are decoded against the planned sizes: a sample of another size would be lost.
  found, counters = pairs_of(meta, tokenizer, data=data, share_prompts=True)
  assert found.keys() == whole.keys()
  assert all(counts["unreadable"] == 0 for counts in counters.values())
  for index, (shared, *parts) in found.items():
    taught = int((whole[index][1]["targets"] != IGNORE_INDEX).argmax())
    assert shared == taught > 100  # The last prompt token predicts the answer, and each answer has its own.
    for part, other in zip(parts, whole[index][1:], strict=True):
      for name in other:
        np.testing.assert_array_equal(part[name], other[name], name)


@pytest.mark.parametrize("name", LINES)
def test_sizes_count_a_shared_prompt_once(files, tokenizer, name):
  media, question, _ = LINES[name]
  record = pair(question, "red circle", "no", **media)
  whole = maker(files, tokenizer).make(record, WHERE, frames=3)
  sharing = maker(files, tokenizer, share_prompts=True)
  sample = sharing.make(record, WHERE, frames=3)
  chosen, rejected = whole.segments()
  prompt = int((chosen.labels != IGNORE_INDEX).argmax())
  assert (whole.shared, sample.shared) == (0, prompt - 1)
  assert sample.lengths == (len(chosen.input_ids), len(rejected.input_ids) - prompt + 1)
  size = sharing.measure(record, WHERE, 3)
  assert (
    (size.tokens, size.tiles)
    == (len(sample.input_ids), len(sample.tiles))
    == (sum(sample.lengths), size.tiles)
  )
  assert size.supervised == maker(files, tokenizer).measure(record, WHERE, 3).supervised
  assert sharing.pieces(record, WHERE, 3) == [(size.tokens, size.tiles)]
  np.testing.assert_array_equal(sample.tiles, whole.tiles)
  for conversation, other in zip(sample.conversations(), (chosen, rejected), strict=True):
    np.testing.assert_array_equal(conversation.input_ids, other.input_ids)
    np.testing.assert_array_equal(conversation.labels, other.labels)
  assert not (sample.segments()[1].input_ids == tokenizer.image_token_id).any() and not sample.fully_masked
  text = show_sample(sample, tokenizer, lines_of())
  assert f" tokens ({prompt - 1} of them shared), " in text
  assert text.splitlines()[1:] == show_sample(whole, tokenizer, lines_of()).splitlines()[1:]
  assert as_json(sample, lines_of()) == as_json(whole, lines_of())


def test_long_answers_behind_a_shared_prompt_are_cut_alike(files, tokenizer, lengths):
  prompt, chosen, rejected = lengths
  total = chosen + rejected - prompt + 1

  def both(**limits):
    samples = [
      maker(files, tokenizer, limits=Limits(**limits), share_prompts=share).make(LONG, WHERE)
      for share in (False, True)
    ]
    sharing = maker(files, tokenizer, limits=Limits(**limits), share_prompts=True)
    assert sharing.pieces(LONG, WHERE, 8) == [(len(samples[1].input_ids), len(samples[1].tiles))]
    return samples

  for most in (chosen, chosen - 1, rejected, prompt + 21):
    whole, sample = both(max_length=most)
    assert sample.shared == prompt - 1 and sample.truncated == whole.truncated
    for part, other in zip(sample.conversations(), whole.segments(), strict=True):
      np.testing.assert_array_equal(part.input_ids, other.input_ids)
      np.testing.assert_array_equal(part.labels, other.labels)
  room = {"max_length": chosen, "row_tokens": total, "row_tiles": 8}
  sharing = maker(files, tokenizer, limits=Limits(**room, policy="drop"), share_prompts=True)
  assert len(sharing.make(LONG, WHERE).input_ids) == total
  less = Limits(**room | {"row_tokens": total - 1}, policy="truncate")
  with pytest.raises(OverLengthError, match=f"are {total} tokens of one row, more than it has room for"):
    maker(files, tokenizer, limits=less, share_prompts=True).make(LONG, WHERE)
  shrinking = maker(files, tokenizer, limits=less._replace(policy="shrink_tiles"), share_prompts=True)
  sample = shrinking.make(LONG, WHERE)
  fewer = P * (3 - len(sample.tiles))
  assert sample.shrunk and (len(sample.input_ids), sample.shared) == (total - fewer, prompt - 1 - fewer)
  assert shrinking.pieces(LONG, WHERE, 8) == [(total - fewer, len(sample.tiles))]


@pytest.mark.parametrize("data", [{}, PACKED], ids=["unpacked", "packed"])
def test_long_pairs_of_a_mixture_share_what_is_left(meta, tokenizer, data):
  settings = {
    "data": data | {"max_seq_length": 283},
    "loader": {"on_bad_sample": "drop", "max_bad_fraction": 1.0},
  }
  (whole, counts), (found, same) = (
    pairs_of(meta, tokenizer, **settings, share_prompts=share) for share in (False, True)
  )
  assert counts == same and sum(entry["truncated"] for entry in counts.values()) > 0
  assert found.keys() == whole.keys()
  for index, (shared, *parts) in found.items():
    assert shared > 100
    for part, other in zip(parts, whole[index][1:], strict=True):
      for name in other:
        np.testing.assert_array_equal(part[name], other[name], name)


def test_what_is_shared_are_the_tokens_that_are_the_same(files, hf_tokenizer):
  base = get_template("internvl2_5")
  # The first letter of an answer may become a part of the prompt's last token.
  merging = dataclasses.replace(base, whole=True, openings={**base.openings, "gpt": "<|im_start|>assistan"})
  tokenizer = ChatTokenizer(hf_tokenizer, merging)
  record = pair("what?", "t red", "x no", image="a.png")
  whole = maker(files, tokenizer).make(record, WHERE)
  sample = maker(files, tokenizer, share_prompts=True).make(record, WHERE)
  one, other = (part.input_ids for part in whole.segments())
  same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
  assert tokenizer.decode(one[same : same + 1]) == "assistant"
  assert whole.segments()[0].labels[same] == IGNORE_INDEX and sample.shared == same - 1
  for part, expected in zip(sample.conversations(), whole.segments(), strict=True):
    np.testing.assert_array_equal(part.input_ids, expected.input_ids)


def test_prompts_that_cannot_be_shared_stand_twice():
  def chat(prompt, answer, images=()):
    ids = np.array([*prompt, *answer], np.int32)
    labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE_INDEX, ids)
    return Chat(ids, labels, np.array(images, np.int64))

  assert shared_tokens((chat([1, 2, 3], [4]), chat([1, 2, 3], [5])), []) == 2
  assert shared_tokens((chat([1, 2, 3, 4], [6], [1]), chat([1, 2, 3, 4], [5], [1])), [8]) == 10
  assert shared_tokens((chat([1], [4]), chat([1], [5])), []) == 0
  assert shared_tokens((chat([], [4, 5]), chat([], [4, 6])), []) == 0
  assert shared_tokens((chat([1, 2, 3], [4], [2]), chat([1, 2, 3], [5], [2])), [8]) == 0
  # The answer begins earlier in one of them.
  assert shared_tokens((chat([1, 2], [3, 4]), chat([1, 2, 3], [5])), []) == 1


def test_a_pair_that_shares_nothing_stays_as_it_was(meta, tokenizer, whole, monkeypatch):
  monkeypatch.setattr("internvl_jax.tasks.preference.lines.shared_tokens", lambda chats, image_tokens: 0)
  with contextlib.closing(make_loader(meta, tokenizer, share_prompts=True)) as loader:
    batch = next(loader)
  with contextlib.closing(make_loader(meta, tokenizer)) as loader:
    assert_equal(batch, next(loader))


@pytest.mark.parametrize("data", [{}, PACKED], ids=["unpacked", "packed"])
def test_shared_prompts_resume(meta, tokenizer, data):
  settings = {"data": data, "shards": 2, "share_prompts": True}
  with contextlib.closing(make_loader(meta, tokenizer, **settings)) as loader:
    expected = list(loader)
    assert loader.sequence_sizes[-1] == (1600 if data else 1024)
  with contextlib.closing(make_loader(meta, tokenizer, **settings, dataloader_num_workers=1)) as loader:
    batches = [next(loader) for _ in range(2)]
    state = json.loads(json.dumps(loader.get_state()))
    fingerprint = loader.fingerprint()
    text = show_batch(batches[0], tokenizer)
  assert "[shared prompt of " in text and text.count("<|im_start|>user") < text.count("»red")
  with contextlib.closing(make_loader(meta, tokenizer, **settings, state=state)) as loader:
    batches += list(loader)
  for batch, other in zip(batches, expected, strict=True):
    assert_equal(batch, other)
  with pytest.raises(DataError, match="share_prompts was 1 when its state was saved and is 0 now"):
    make_loader(meta, tokenizer, **settings | {"share_prompts": False}, state=state)
  with contextlib.closing(make_loader(meta, tokenizer, **settings | {"share_prompts": False})) as loader:
    assert loader.fingerprint() != fingerprint


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
    assert loader.batch_samples(0) == f"{meta.parent}/one.jsonl:1,2"


def test_states_and_sizes_of_fine_tuning_are_others(files, tokenizer):
  both = pair("who?", "red", "no", conversations=turns("who?", "red circle"))
  write_jsonl(files / "toy.jsonl", [both] * 3)
  meta = files / "meta.json"
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.jsonl"}}))
  sizes, states = [], []
  for preference in (False, True):
    mixture = Mixture(
      arguments(meta), tokenizer, tokens_per_tile=P, seed=42, cache=files, lines=lines_of(preference)
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


# --- Too long --------------------------------------------------------------------------------------------------


@pytest.fixture
def lengths(files, tokenizer):
  """Tokens of the prompt, and of the two conversations about an image."""
  sample = maker(files, tokenizer).make(LONG, WHERE)
  prompt = int((sample.segments()[0].labels != IGNORE_INDEX).argmax())
  return prompt, *sample.lengths


LONG = pair("what?", "red " * 40, "red " * 20 + "no " * 3, image="a.png")


def fitted(files, tokenizer, record=LONG, **limits):
  limits = Limits(**limits)
  limited = maker(files, tokenizer, limits=limits)
  sample = limited.make(record, WHERE)
  assert limited.pieces(record, WHERE, 8) == [(len(sample.input_ids), len(sample.tiles))]
  return sample


def test_each_answer_is_cut_by_itself(files, tokenizer, lengths):
  prompt, chosen, rejected = lengths
  whole = maker(files, tokenizer).make(LONG, WHERE).segments()
  for most in (chosen, chosen - 1, rejected, prompt + 21):
    sample = fitted(files, tokenizer, max_length=most)
    assert sample.lengths == (min(chosen, most), min(rejected, most))
    assert sample.truncated == (most < chosen) and not sample.shrunk
    for segment, full in zip(sample.segments(), whole, strict=True):
      np.testing.assert_array_equal(segment.input_ids, full.input_ids[:most])
      np.testing.assert_array_equal(segment.labels, full.labels[:most])


def test_what_is_left_must_tell_the_answers_apart(files, tokenizer, lengths):
  prompt, chosen, rejected = lengths
  # Both answers begin with the same twenty tokens.
  for most, cause in (
    (prompt + 20, f"the {prompt + 20} tokens that are kept are the same for both answers"),
    (prompt, f"{prompt} tokens are kept, and none of an answer"),
  ):
    with pytest.raises(UnsupervisedError) as caught:
      fitted(files, tokenizer, max_length=most)
    assert f"a chosen answer of {chosen} and a rejected one of {rejected} tokens" in str(caught.value)
    assert f"exceed data.max_seq_length={most}: {cause}" in str(caught.value)
  with pytest.raises(OverLengthError, match="kept, without 1 of the images, and none of an answer; raise it"):
    fitted(files, tokenizer, max_length=prompt // 2)


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_pair_that_is_not_to_be_shortened_is_named(files, tokenizer, lengths, policy):
  _, chosen, rejected = lengths
  fitted(files, tokenizer, max_length=chosen, row_tokens=chosen + rejected, row_tiles=3, policy=policy)
  for limits in ({"max_length": chosen - 1}, {"row_tokens": chosen + rejected - 1}, {"row_tiles": 2}):
    settings = {"max_length": chosen, "row_tokens": chosen + rejected, "row_tiles": 3} | limits
    with pytest.raises(OverLengthError, match=r"with 3 tiles exceed data\.max_seq_length=.*on_over_length"):
      fitted(files, tokenizer, **settings, policy=policy)


def test_images_shrink_until_both_answers_fit_a_row(files, tokenizer, lengths):
  _, chosen, rejected = lengths
  limits = {"max_length": chosen, "row_tokens": chosen + rejected - 1, "row_tiles": 8}
  sample = fitted(files, tokenizer, **limits, policy="shrink_tiles")
  assert sample.shrunk and not sample.truncated and len(sample.tiles) < 3
  assert sum(sample.lengths) == chosen + rejected - 2 * P * (3 - len(sample.tiles))
  with pytest.raises(OverLengthError, match=r"one row, more than it has room for \(.*max_packed_tokens=\d+"):
    fitted(files, tokenizer, **limits, policy="truncate")
  with pytest.raises(OverLengthError, match=r"room for \(.*num_images_expected=2\), and a pair is not split"):
    fitted(files, tokenizer, **limits | {"row_tokens": 4096, "row_tiles": 2}, policy="truncate")


def test_videos_get_fewer_frames_in_both(files, tokenizer):
  record = pair("who?", "red", "no", video="v.gif")
  whole = maker(files, tokenizer).make(record, WHERE, frames=4)
  limits = Limits(4096, len(whole.input_ids) - 1, 8, "shrink_tiles")
  sample = maker(files, tokenizer, limits=limits).make(record, WHERE, frames=4)
  assert (len(whole.tiles), len(sample.tiles), sample.shrunk) == (4, 3, True)


@pytest.mark.parametrize("data", [{}, PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_long_pairs_are_counted(tmp_path, tokenizer, data, policy):
  records = [pair("who?"), pair("who?", "red " * 300), pair("who?", "red " * 90, "red " * 91), pair("who?")]
  write_jsonl(tmp_path / "toy.jsonl", records)
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.jsonl"}}))
  options = {"on_over_length": policy, "on_bad_sample": "drop", "max_bad_fraction": 0.5, "shuffle": False}
  prompt = len(tokenizer.encode(turns("who?", ""), [], WHERE).input_ids)
  settings = {"data": data | {"max_seq_length": prompt + 50}, "loader": options}
  more = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1}
  rows = 1 if data else 4
  with contextlib.closing(
    make_loader(meta, tokenizer, **settings, **more, per_device_train_batch_size=rows)
  ) as loader:
    (batch,) = loader
    counts = loader.counters()["toy"]
  expected = {
    "truncate": {"truncated": 1, "fully_masked": 1},
    "drop": {"over_long": 2},
  }
  assert counts == dict.fromkeys(EVENTS, 0) | {"samples": 4} | expected[policy]
  kept = [0, 1, 3] if policy == "truncate" else [0, 3]
  assert sorted(index for index, *_ in segments_of(batch)) == kept


# --- Lines that are wrong --------------------------------------------------------------------------------------

GOOD = pair("what is it?", "red circle", "no")
WRONG = {
  "missing": (
    {"question": "a", "chosen": "b"},
    "key 'rejected' is missing; the line has 'question', 'chosen',",
  ),
  "nothing": ({}, "key 'question', 'chosen', 'rejected' is missing; the line has no key"),
  "none": (pair(None), "'question' must be a text that is not empty, got null"),
  "number": (pair("a", 3), "'chosen' must be a text that is not empty, got 3"),
  "empty": (pair("a", "b", ""), "'rejected' must be a text that is not empty, got \"\""),
  "blank": (pair("a", " \n"), "'chosen' must be a text that is not empty, got \" \\n\""),
  "surrogate": (pair("a", "b\ud800"), "'chosen': character 2 is '\\ud800', half of a surrogate pair"),
  "equal": (
    pair("a", "red", "red"),
    "'chosen' and 'rejected' are the same text 'red', which prefers nothing",
  ),
  "list": ([1], "expected a JSON object, got list"),
  "fine-tuning": (
    {"conversations": turns("a", "b")},
    "'conversations' for supervised fine-tuning, but preference.loss_type is set; unset it, or give a line with",
  ),
  "no image": (pair("<image>\na"), "1 <image> in 'question' but 0 images; make the numbers equal"),
  "two places": (pair("<image> <image>", image="a.png"), "2 <image> in 'question' but 1 images"),
  "no places": (pair("a", image=["a.png", "b.png"]), "0 <image> in 'question' but 2 images"),
  "in chosen": (
    pair("a", "<image>", image="a.png"),
    "1 <image> in 'chosen', but only the question shows images",
  ),
  "in rejected": (pair("a", "b", "c <image>"), "1 <image> in 'rejected', but only the question shows images"),
  "context": (pair("a", "<IMG_CONTEXT>"), "the text itself contains <IMG_CONTEXT>; take it out"),
  "gone": (pair("a", image="nowhere.png"), "image not found"),
  "cut": (pair("a", image="cut.png"), "cut.png"),
  "both": (pair("a", image="a.png", video="v.gif"), "the line has both 'image' 'a.png' and 'video' 'v.gif'"),
}


def with_line(folder, line):
  write_jsonl(folder / "toy.jsonl", [GOOD, line, GOOD])
  (folder / "meta.json").write_text(json.dumps({"toy": {"root": str(folder), "annotation": "toy.jsonl"}}))
  return folder / "meta.json"


def lost_by_doctor(meta, tokenizer, packed, *, preference=True):
  data = arguments(meta, **(PACKED if packed else {}))
  lines = lines_of(preference)
  mixture = Mixture(data, tokenizer, tokens_per_tile=P, seed=42, cache=meta.parent, lines=lines)
  mixture.index_sizes(meta.parent / f"doctor{packed}", workers=0, quiet=True)
  lines = [line for report in examine(mixture) for line in report.examples]
  lines += decode_all(mixture, packed=packed, workers=0)
  mixture.close()
  return lines


def assert_named(meta, tokenizer, cause, **options):
  for data in ({}, PACKED):
    rows = {"max_steps": 1, "per_device_train_batch_size": 1 if data else 3, "gradient_accumulation_steps": 1}
    settings = {"data": data, **rows, **options}
    with contextlib.closing(make_loader(meta, tokenizer, loader={"shuffle": False}, **settings)) as loader:
      with pytest.raises(DataError) as caught:
        next(loader)
      message = str(caught.value)
      assert message.startswith(f"{meta.parent}/toy.jsonl:2 (dataset 'toy'): ") and cause in message, message
      assert message.isprintable() and len(message) < 1000
    drop = {"shuffle": False, "on_bad_sample": "drop", "max_bad_fraction": 0.5}
    with contextlib.closing(make_loader(meta, tokenizer, loader=drop, **settings)) as loader:
      batch = next(loader)
      counts = loader.counters()["toy"]
    assert counts == dict.fromkeys(EVENTS, 0) | {"samples": 3, "unreadable": 1}
    preference = options.get("preference", True)
    if preference:
      assert [index for index, *_ in segments_of(batch)] == [0, 2]
    assert lost_by_doctor(meta, tokenizer, bool(data), preference=preference) == [message]


@pytest.mark.parametrize("name", WRONG)
def test_a_line_that_is_wrong_is_named_and_counted(files, tokenizer, name):
  line, cause = WRONG[name]
  (files / "cut.png").write_bytes((files / "a.png").read_bytes()[:300])
  assert_named(with_line(files, line), tokenizer, cause)


def test_a_pair_in_fine_tuning_is_named(files, tokenizer):
  good = {"conversations": turns("a", "b")}
  write_jsonl(files / "toy.jsonl", [good, GOOD, good])
  (files / "meta.json").write_text(json.dumps({"toy": {"root": "", "annotation": "toy.jsonl"}}))
  cause = (
    "the line is a preference pair, of 'chosen' and 'rejected', which needs preference.loss_type, such as"
  )
  assert_named(files / "meta.json", tokenizer, cause, preference=False)


def test_answers_of_the_same_tokens_are_refused(files, hf_tokenizer):
  strips = ChatTokenizer(hf_tokenizer, dataclasses.replace(get_template("internvl2_5"), strips=True))
  with pytest.raises(DataError, match=r"'chosen' and 'rejected' become the same \d+ tokens"):
    maker(files, strips).make(pair("a", "red", " red"), WHERE)


def test_buckets_must_hold_both_answers(meta, tokenizer):
  cause = "largest, 512, is below twice data.max_seq_length, for the two answers of a pair, 1024"
  with pytest.raises(DataError, match=cause):
    make_loader(meta, tokenizer, loader={"sequence_buckets": (512,)})
  with contextlib.closing(make_loader(meta, tokenizer)) as loader:
    assert loader.sequence_sizes == (256, 512, 1024)


# --- What is told about the data -------------------------------------------------------------------------------


def test_show_and_dump(files, tokenizer):
  sample = maker(files, tokenizer).make(pair("what?", "red", "no", image="b.png"), WHERE)
  about, question, chosen, rejected = show_sample(sample, tokenizer, lines_of()).splitlines()
  assert about == f"{WHERE}, {sample.lengths[0]} + {sample.lengths[1]} tokens, {len(sample.tiles)} tiles:"
  assert question.startswith("  question: <|im_start|>system") and "»" not in question
  assert (
    question.endswith("<|im_start|>assistant\\n") and f"<IMG_CONTEXT>x{len(sample.tiles) * P}" in question
  )
  assert (chosen, rejected) == ("  chosen: »red<|im_end|>«\\n", "  rejected: »no<|im_end|>«\\n")
  parts = as_json(sample, lines_of())
  assert list(parts) == ["chosen", "rejected"]
  for part, segment in zip(parts.values(), sample.segments(), strict=True):
    assert part == {"input_ids": segment.input_ids.tolist(), "labels": segment.labels.tolist()}


def test_show_batch(meta, tokenizer):
  with contextlib.closing(make_loader(meta, tokenizer, loader={"shuffle": False})) as loader:
    text = show_batch(next(loader), tokenizer)
  assert "row 0: " in text and text.count("»red") == 2


def test_the_fingerprint_tells_data_apart(files, tokenizer):
  def fingerprint(folder=files, **changes):
    with contextlib.closing(make_loader(folder / "meta.json", tokenizer, data=changes)) as loader:
      return loader.fingerprint()

  with_line(files, GOOD)
  first = fingerprint()
  assert len(first) == 64 and first == fingerprint()
  os.utime(files / "toy.jsonl")
  assert first == fingerprint()
  changes = [{"max_dynamic_patch": 3}, {"max_seq_length": 256}, {"pad2square": True}, {"max_num_frame": 5}]
  found = {fingerprint(**change) for change in changes}
  with_line(files, pair("what is it?", "red circle", "yes"))
  found.add(fingerprint())
  entries = json.loads((files / "meta.json").read_text())
  entries["toy"]["repeat_time"] = 2
  (files / "meta.json").write_text(json.dumps(entries))
  found.add(fingerprint())
  assert len(found | {first}) == 7


def test_datasets_that_differ_between_epochs_are_named(meta, files, tokenizer):
  with contextlib.closing(make_loader(meta, tokenizer)) as loader:
    varying = loader.first_varying()
  assert varying.dataset == "two" and varying.cause.endswith(
    f"from {meta.parent}/two.jsonl:2 (dataset 'two') on"
  )

  def of_toy(line, **entry):
    with_line(files, line)
    entries = {"toy": {"root": "", "annotation": "toy.jsonl", **entry}}
    (files / "meta.json").write_text(json.dumps(entries))
    with contextlib.closing(make_loader(files / "meta.json", tokenizer)) as loader:
      return loader.first_varying()

  assert of_toy(pair("a", 'a "video"', video="")) is None
  assert of_toy(pair("a", video="v.gif"), repeat_time=0.5) is None  # only the first line is in use
  assert of_toy(pair("a", video="v.gif")).dataset == "toy"
  assert of_toy(GOOD, data_augment=True).cause.startswith("data_augment re-encodes its images")


def test_a_system_message_of_the_line_itself(tmp_path, tokenizer):
  record = pair("What?", system="Be brief.", image=picture(tmp_path, "a.png"))
  chosen, _ = maker(tmp_path, tokenizer).make(record, WHERE).segments()
  alone = maker(tmp_path, tokenizer, preference=False)
  system = {"from": "system", "value": "Be brief."}
  conversations = [system, *turns("<image>\nWhat?", "red")]
  expected = alone.make({"image": "a.png", "conversations": conversations}, WHERE)
  np.testing.assert_array_equal(chosen.input_ids, expected.input_ids)
  np.testing.assert_array_equal(chosen.labels, expected.labels)
  with pytest.raises(DataError, match="'system' must be a text that is not empty, got 3"):
    maker(tmp_path, tokenizer).make({**record, "system": 3}, WHERE)
  # InternVL3.5's data call it otherwise.
  other = {key: value for key, value in record.items() if key != "system"} | {"system_prompt": "Be brief."}
  same, again = (maker(tmp_path, tokenizer).make(line, WHERE) for line in (record, other))
  np.testing.assert_array_equal(same.input_ids, again.input_ids)
  with pytest.raises(DataError, match="the line has both 'system', 'system_prompt'; leave one"):
    maker(tmp_path, tokenizer).make({**record, "system_prompt": "x"}, WHERE)
