"""What is left of samples that are too long: cut and split between tokens that belong together, or made smaller."""

import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample.fitting import Limits, limited
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.sample.tokenize import Chat
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError, OverLengthError, UnsupervisedError
from tests.data.schedule.test_packed import make_loader, samples_of
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl

P = 4
TEXT, START, CONTEXT, END = 5, 1, 2, 3


def chat(*parts):
  """A conversation from "i" for an image, a number for so many words, and a negative one for supervised words."""
  ids, labels = [], []
  for part in parts:
    piece = [START, CONTEXT, END] if part == "i" else [TEXT] * abs(part)
    ids += piece
    labels += piece if part != "i" and part < 0 else [IGNORE_INDEX] * len(piece)
  ids, labels = np.array(ids, np.int32), np.array(labels, np.int32)
  return Chat(ids, labels, np.flatnonzero(ids == CONTEXT))


def pieces(chat, tiles, limits, complete=None):
  found = limited(chat, tiles, P, limits, WHERE)
  assert complete is None or found.complete == complete
  ids = chat.expand([n * P for n in tiles]).input_ids
  for piece in found.pieces:
    text = ids[piece.start : piece.stop].tolist()
    assert text.count(START) == text.count(END) == piece.end_image - piece.first_image
    assert text.count(CONTEXT) == P * sum(tiles[piece.first_image : piece.end_image])
  return [tuple(piece) for piece in found.pieces]


def test_what_fits_stays_whole():
  whole = chat(4, "i", -3)
  for limits in (Limits(13), Limits(13, 13, 1), Limits(100, 13, 1, "error"), Limits(13, policy="drop")):
    assert pieces(whole, [1], limits, complete=True) == [(0, 13, 0, 1)]


def test_truncation_stops_before_an_image():
  long = chat(2, "i", -5, "i", 1, -2)  # images lie at 2..8 and 13..19
  for length, stop in ((21, 21), (19, 19), (18, 13), (14, 13), (13, 13), (12, 12), (9, 9)):
    expected = [(0, stop, 0, 1 + (stop >= 19))]
    if stop <= 8:
      continue
    assert pieces(long, [1, 1], Limits(length), complete=False) == expected
  with pytest.raises(
    OverLengthError, match=r"22 tokens and 2 tiles exceed .*=8: 8 tokens are kept, without 1 of"
  ):
    pieces(long, [1, 1], Limits(8))
  with pytest.raises(
    OverLengthError, match="2 tokens are kept, without 2 of the images, and too few of them"
  ):
    pieces(long, [1, 1], Limits(7))
  with pytest.raises(UnsupervisedError, match="5 tokens are kept, and too few of them are supervised"):
    pieces(chat(10, -3), [], Limits(5))


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_policies_that_do_not_shorten(policy):
  with pytest.raises(
    OverLengthError, match=r"toy\.jsonl:3 .*: 14 tokens and 1 tiles exceed data\.max_seq_length=13"
  ):
    limited(chat(4, "i", -4), [1], P, Limits(13, policy=policy), WHERE)
  with pytest.raises(
    OverLengthError, match=r"data\.max_packed_tokens=20, data\.num_images_expected=1; raise"
  ):
    limited(chat("i", "i", -4), [1, 1], P, Limits(30, 20, 1, policy), WHERE)


def test_splitting_by_tokens_and_by_tiles():
  long = chat(2, -4, "i", -5, "i", -6)  # images at 6..12 and 17..23; 29 tokens
  assert pieces(long, [1, 1], Limits(100, 29, 2)) == [(0, 29, 0, 2)]
  assert pieces(long, [1, 1], Limits(100, 27, 2), True) == [(0, 27, 0, 2), (27, 29, 2, 2)]
  assert pieces(long, [1, 1], Limits(100, 20, 2), True) == [(0, 17, 0, 1), (17, 29, 1, 2)]
  assert pieces(long, [1, 1], Limits(100, 29, 1), True) == [(0, 17, 0, 1), (17, 29, 1, 2)]
  assert pieces(long, [1, 1], Limits(100, 12, 2), True) == [(0, 12, 0, 1), (12, 24, 1, 2), (24, 29, 2, 2)]
  # First cut to max_seq_length, then split.
  assert pieces(long, [1, 1], Limits(25, 20, 2), False) == [(0, 17, 0, 1), (17, 25, 1, 2)]


def test_a_piece_must_teach_something():
  # One supervised token in 256 is enough, one in 257 is not; the first token of a piece teaches nothing.
  assert pieces(chat(254, -3, -2), [], Limits(999, 256, 9)) == [(0, 256, 0, 0), (256, 259, 0, 0)]
  assert pieces(chat(256, -3), [], Limits(999, 257, 9), False) == [(257, 259, 0, 0)]
  assert pieces(chat(256, 1, -2), [], Limits(999, 257, 9), False) == [(257, 259, 0, 0)]
  assert pieces(chat(-3, 300, -3), [], Limits(999, 100, 9), False) == [(0, 100, 0, 0), (300, 306, 0, 0)]
  with pytest.raises(UnsupervisedError):
    pieces(chat(600, -1), [], Limits(999, 300, 9))


def test_an_image_larger_than_a_row_is_named():
  with pytest.raises(
    OverLengthError, match=r"image 2 alone has 3 tiles and 14 tokens, more than a row \(.*raise it"
  ):
    limited(chat(1, "i", -3, "i", -2), [1, 3], P, Limits(99, 99, 2), WHERE)
  with pytest.raises(OverLengthError, match="image 1 alone has 3 tiles and 14 tokens"):
    limited(chat("i", -3), [3], P, Limits(99, 13, 9), WHERE)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_against_a_token_by_token_definition(seed):
  rng = np.random.default_rng(seed)
  parts = [("i", int(rng.integers(-9, -1)), int(rng.integers(1, 9)))[k] for k in rng.integers(0, 3, 40)]
  layout = chat(*parts)
  tiles = rng.integers(1, 4, len(layout.contexts)).tolist()
  limits = Limits(int(rng.integers(60, 400)), int(rng.integers(20, 60)), int(rng.integers(3, 8)))
  ids = layout.expand([n * P for n in tiles]).input_ids.tolist()
  # Which image a token is part of; pieces grow token by token, an image at once.
  owner, image = [], -1
  for token in ids:
    image += token == START
    owner.append(image if token in (START, CONTEXT, END) else None)
  units, i = [], 0
  while i < len(ids):
    stop = i + 1
    while owner[i] is not None and stop < len(ids) and owner[stop] == owner[i]:
      stop += 1
    units.append((i, stop, tiles[owner[i]] if owner[i] is not None else 0))
    i = stop
  kept = []
  for unit in units:
    if unit[1] > limits.max_length:
      break
    kept.append(unit)
  cuts, begin, held = [0], 0, 0
  for start, stop, own in kept:
    if stop - begin > limits.row_tokens or held + own > limits.row_tiles:
      cuts.append(start)
      begin, held = start, 0
    held += own
  cuts.append(kept[-1][1])
  if len(ids) <= limits.tokens and sum(tiles) <= limits.row_tiles:
    cuts = [0, len(ids)]
  labels = layout.expand([n * P for n in tiles]).labels
  expected = [
    (a, b)
    for a, b in zip(cuts, cuts[1:], strict=False)
    if (taught := int((labels[a + 1 : b] != IGNORE_INDEX).sum()))
    and (len(cuts) == 2 or taught * 256 >= b - a)
  ]
  assert [piece[:2] for piece in pieces(layout, tiles, limits)] == expected


# --- Samples ------------------------------------------------------------------------------------------------


def dialogue(*texts):
  """Turns after a short system turn: the template's own is longer than these tests' rows."""
  return [{"from": "system", "value": "b"}, *turns(*texts)]


def picture(folder, name, width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(folder / name)
  return name


def maker(folder, tokenizer, limits, **changes):
  spec = DatasetSpec(name="toy", root=str(folder), annotation="toy.jsonl")
  data = arguments("unused.json", **changes)
  return SampleMaker(spec=spec, data=data, tokenizer=tokenizer, tokens_per_tile=P, limits=limits)


def test_images_shrink_until_they_fit(tokenizer, tmp_path):
  record = {"image": picture(tmp_path, "a.png", 64, 16), "conversations": dialogue("<image>what?", "red")}
  free = maker(tmp_path, tokenizer, Limits(4096)).make(record, WHERE)
  assert len(free.tiles) == 5 and not free.shrunk
  for length, tiles in ((0, 5), (-1, 4), (-4, 4), (-5, 3), (-8, 3), (-9, 1)):
    limits = Limits(len(free.input_ids) + length, policy="shrink_tiles")
    sample = maker(tmp_path, tokenizer, limits).make(record, WHERE)
    assert (len(sample.tiles), sample.shrunk, sample.truncated) == (tiles, tiles < 5, False)
    assert sample.input_ids.tolist().count(tokenizer.image_token_id) == tiles * P
    sizes = maker(tmp_path, tokenizer, limits).pieces(record, WHERE, 8)
    assert sizes == [(len(sample.input_ids), tiles)]
  # By the tiles of a row; and what does not fit at its smallest is cut.
  rows = Limits(4096, 4096, 3, "shrink_tiles")
  assert len(maker(tmp_path, tokenizer, rows).make(record, WHERE).tiles) == 3
  long = {**record, "conversations": dialogue("<image>what?", "red " * 100)}
  sample = maker(tmp_path, tokenizer, Limits(100, policy="shrink_tiles")).make(long, WHERE)
  assert (len(sample.tiles), len(sample.input_ids), sample.truncated) == (1, 100, True)


def test_videos_get_fewer_frames(tokenizer, tmp_path):
  for number in range(9):
    (tmp_path / "v").mkdir(exist_ok=True)
    picture(tmp_path / "v", f"{number}.png", 16, 16, number)
  record = {"video": "v", "conversations": dialogue("<video>what?", "red")}
  settings = {"min_num_frame": 8, "max_num_frame": 8}
  whole = maker(tmp_path, tokenizer, Limits(4096), **settings).make(record, WHERE)
  assert len(whole.tiles) == 8
  limits = Limits(len(whole.input_ids) - 1, policy="shrink_tiles")
  fewer = maker(tmp_path, tokenizer, limits, **settings).make(record, WHERE, np.random.default_rng(0))
  assert len(fewer.tiles) == 7 and fewer.shrunk and "Frame-7" in tokenizer.decode(fewer.input_ids)
  assert "Frame-8" not in tokenizer.decode(fewer.input_ids)
  rows = Limits(4096, 4096, 2, "shrink_tiles")
  assert len(maker(tmp_path, tokenizer, rows, **settings).make(record, WHERE).tiles) == 2


def long_mixture(folder):
  """Every second line exceeds the rows of the tests below, and so does the last."""
  names = [picture(folder, f"{i}.png", 40, 20, i) for i in range(6)]
  asked = "".join(f"<image> and {i}? " for i in range(6))
  answered = [t for i in range(6) for t in turns(f"<image> what is number {i}?", "red " * 20)]
  records = []
  for i in range(5):
    records.append({"conversations": dialogue(f"what is {i}?", "blue " * (5 + i))})
    system = {"from": "system", "value": "b"}
    records.append({"image": names, "conversations": [system, *answered[2 * i :], *answered[: 2 * i]]})
  records.append({"image": names, "conversations": dialogue(asked, "red")})
  write_jsonl(folder / "all.jsonl", records)
  (folder / "meta.json").write_text(
    json.dumps({"all": {"root": "", "annotation": "all.jsonl", "repeat_time": 2}})
  )
  return folder / "meta.json"


ROWS = {"use_packed_ds": True, "max_packed_tokens": 320, "num_images_expected": 4, "strict_mode": False}


@pytest.fixture(scope="module")
def long_meta(tmp_path_factory):
  return long_mixture(tmp_path_factory.mktemp("long"))


def test_split_samples_fill_rows_and_nothing_is_lost(long_meta, tokenizer):
  data = {**ROWS, "max_seq_length": 4096, "max_dynamic_patch": 1}
  loader = make_loader(long_meta, tokenizer, data=data, max_steps=-1, num_train_epochs=1)
  batches = list(loader)
  counts = loader.counters()["all"]
  loader.close()
  free = Mixture(
    arguments(long_meta, max_seq_length=4096, max_dynamic_patch=1), tokenizer, tokens_per_tile=P, seed=42
  )
  wholes = [free.decode(0, i) for i in range(10)]
  # Put together, the pieces of an epoch are the tokens and the supervised tokens of the whole samples, twice.
  tokens = np.concatenate([np.frombuffer(s, np.int32) for batch in batches for s in samples_of(batch)])
  expected = np.concatenate([sample.input_ids for sample in wholes for _ in range(2)])
  unique, per_id = np.unique(tokens, return_counts=True)
  seen = dict(zip(unique.tolist(), per_id.tolist(), strict=True))
  wanted = dict(zip(*(x.tolist() for x in np.unique(expected, return_counts=True)), strict=True))
  # Rows beyond the epoch's last fill up the last step, with samples of the next epoch.
  assert all(seen[token] >= count for token, count in wanted.items())
  assert counts["split"] >= 2 * 5 and counts["over_long"] == counts["unreadable"] == 0
  for batch in batches:
    assert (batch.segment_ids > 0).sum(-1).max() <= 320


def test_pieces_are_the_whole_sample_cut(long_meta, tokenizer):
  settings = {"max_seq_length": 4096, "max_dynamic_patch": 1}
  mixture = Mixture(arguments(long_meta, **ROWS | settings), tokenizer, tokens_per_tile=P, seed=42)
  mixture.index_sizes(long_meta.parent / "cache", workers=0, quiet=True)
  free = Mixture(arguments(long_meta, **settings), tokenizer, tokens_per_tile=P, seed=42)
  dataset = mixture.datasets[0]
  found = {}
  for sample in range(dataset.num_samples):
    line, piece = dataset.locate(sample)
    decoded = mixture.decode(0, sample)
    assert decoded.piece == piece
    assert mixture.size_of(np.array([sample])).tolist() == [[len(decoded.input_ids), len(decoded.tiles)]]
    found.setdefault(line, []).append(decoded)
  assert sum(len(parts) > 1 for parts in found.values()) == 5
  # The last line's only answer comes after its images: what stands before teaches nothing and is left out.
  (last,) = found.pop(10)
  whole = free.decode(0, 10)
  assert last.truncated and whole.input_ids.tolist()[-len(last.input_ids) :] == last.input_ids.tolist()
  assert 0 < len(last.tiles) < len(whole.tiles)
  np.testing.assert_array_equal(last.tiles, whole.tiles[-len(last.tiles) :])
  for line, parts in found.items():
    whole = free.decode(0, line)
    for name in ("input_ids", "labels", "tiles"):
      np.testing.assert_array_equal(
        np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)
      )
    assert not any(part.truncated for part in parts)
  # The second repeat, and the cache, tell the same.
  assert mixture.num_samples == 2 * dataset.num_samples
  again = Mixture(arguments(long_meta, **ROWS | settings), tokenizer, tokens_per_tile=P, seed=42)
  again.index_sizes(long_meta.parent / "cache", workers=0, quiet=True)
  every = np.arange(again.num_samples)
  np.testing.assert_array_equal(again.size_of(every), mixture.size_of(every))
  assert list(decode_all(again, packed=True, workers=0)) == []
  report = examine(again)[0]
  assert (report.lines, report.lost, report.shortened, report.split) == (11, 0, 1, 5)


@pytest.mark.parametrize("policy", ["error", "drop", "shrink_tiles", "truncate"])
def test_policies_in_the_loader(tokenizer, tmp_path, policy):
  records = [{"conversations": dialogue("hi", "hello")}] * 6
  records[2] = {
    "image": picture(tmp_path, "a.png", 64, 16),
    "conversations": dialogue("<image>what?", "red " * 20),
  }
  write_jsonl(tmp_path / "all.jsonl", records)
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps({"all": {"root": "", "annotation": "all.jsonl"}}))
  options = {"on_over_length": policy, "shuffle": False}
  loader = make_loader(meta, tokenizer, data={"max_seq_length": 55}, loader=options, max_steps=3)
  if policy == "error":
    next(loader)
    with pytest.raises(
      DataError, match=r"all\.jsonl:3 .* 5 tiles exceed data\.max_seq_length=55; raise it, lower"
    ):
      next(loader)
    loader.close()
    return
  batches = list(loader)
  loader.close()
  counts = loader.counters()["all"]
  events = {"drop": "over_long", "shrink_tiles": "shrunk", "truncate": "truncated"}
  told = {name: count for name, count in counts.items() if count}
  assert told == {"samples": 6, events[policy]: 1}
  lengths = (batches[1].segment_ids > 0).sum(-1).ravel().tolist()
  assert (lengths[0] == 0) == (policy == "drop")
  if policy == "truncate":
    assert lengths[0] == 55


def test_what_cannot_be_shortened_ends_the_run_unless_it_may_be_dropped(tokenizer, tmp_path):
  records = [{"conversations": dialogue("hi", "hello")}] * 4
  records[0] = {"image": picture(tmp_path, "a.png", 64, 16), "conversations": dialogue("<image>what?", "red")}
  write_jsonl(tmp_path / "all.jsonl", records)
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps({"all": {"root": "", "annotation": "all.jsonl"}}))
  data = {"max_seq_length": 30, "max_dynamic_patch": 4}
  loader = make_loader(meta, tokenizer, data=data, loader={"shuffle": False})
  with pytest.raises(DataError, match="tokens are kept, without 1 of the images"):
    next(loader)
  loader.close()
  options = {"shuffle": False, "on_bad_sample": "drop"}
  loader = make_loader(meta, tokenizer, data=data, loader=options | {"max_bad_fraction": 0.2})
  with pytest.raises(
    DataError, match=r"1 of 2 samples were lost, more than loader.max_bad_fraction=0.2 of 4"
  ):
    next(loader)
  loader.close()
  # What is dropped on purpose is counted, but is no fault.
  for packed, epochs in (({}, 1), (ROWS | {"max_seq_length": 30}, 2)):
    options = {"shuffle": False, "on_over_length": "drop", "max_bad_fraction": 0.0}
    loader = make_loader(meta, tokenizer, data=data | packed, loader=options, max_steps=1)
    next(loader)
    loader.close()
    assert loader.counters()["all"]["over_long"] == epochs
