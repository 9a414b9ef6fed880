"""Pairs that are longer than rows: each answer is cut by itself, and what is lost is counted."""

import contextlib
import json

import numpy as np
import pytest

from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.where import OverLengthError, UnsupervisedError
from tests.support.data_toys import WHERE, turns, write_jsonl
from tests.support.pairs import (
  LONG,
  PACKED,
  P,
  fitted,
  make_loader,
  maker,
  pair,
  segments_of,
)


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
