"""Lines of preference data: the conversations that they become, those that are wrong, and what is told about them."""

import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.show import as_json, show_batch, show_sample
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl
from tests.support.pairs import (
  LINES,
  PACKED,
  P,
  lines_of,
  make_loader,
  maker,
  pair,
  picture,
  segments_of,
)


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
