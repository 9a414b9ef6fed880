"""Pairs whose answers share their prompt's tokens, and what else batches tell of pairs."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.show import as_json, show_batch, show_sample
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import Chat, ChatTokenizer
from internvl_jax.data.where import DataError, OverLengthError
from internvl_jax.tasks.preference.lines import shared_tokens
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl
from tests.support.pairs import (
  LINES,
  LONG,
  PACKED,
  P,
  assert_equal,
  lines_of,
  make_loader,
  maker,
  pair,
  pairs_of,
)


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
