"""Lines to samples, samples to batches."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.data.load import batching
from internvl_jax.data.load.mixture import Mixture, limits_of
from internvl_jax.data.sample import compiled
from internvl_jax.data.sample.sample import Sample, SampleMaker
from internvl_jax.data.schedule import shapes
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError, UnsupervisedError
from tests.support.data_toys import WHERE, arguments, turns, write_dataset

P = 4  # tokens a tile
CONTEXT = 99  # id of an image token in hand-made samples


def make(record, tokenizer, tmp_path, rng=None, spec=None, **changes):
  spec = spec or DatasetSpec(name="toy", root=str(tmp_path), annotation="toy.jsonl")
  data = arguments("unused.json", **changes)
  maker = SampleMaker(
    spec=spec, data=data, tokenizer=tokenizer, tokens_per_tile=P, limits=limits_of(data, "truncate")
  )
  return maker.make(record, WHERE, rng)


@pytest.fixture
def picture(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  return pixels


def test_sample_with_an_image(tokenizer, tmp_path, picture):
  sample = make({"image": "a.png", "conversations": turns("what?", "red")}, tokenizer, tmp_path)
  assert sample.tiles.shape == (3, 16, 16, 3)  # two of 16 x 16 side by side, and the thumbnail
  np.testing.assert_array_equal(sample.tiles[:2], [picture[:, :16], picture[:, 16:]])
  assert (sample.input_ids == tokenizer.image_token_id).sum() == 3 * P
  same = make({"image": ["a.png"], "conversations": turns("<image>\nwhat?", "red")}, tokenizer, tmp_path)
  assert same.input_ids.tolist() == sample.input_ids.tolist()


def test_several_images_share_the_tile_limit(tokenizer, tmp_path, picture):
  conversations = turns("<image> or <image>?", "red")
  whole = make({"image": ["a.png", "a.png"], "conversations": conversations}, tokenizer, tmp_path)
  assert len(whole.tiles) == 2 * 3  # at most 4 // 2 tiles each
  single = make(
    {"image": ["a.png", "a.png"], "conversations": conversations}, tokenizer, tmp_path, max_dynamic_patch=3
  )
  assert len(single.tiles) == 2  # at most 3 // 2
  assert (single.input_ids == tokenizer.image_token_id).sum() == 2 * P


def test_the_dataset_overrides_the_tile_limit(tokenizer, tmp_path, picture):
  spec = DatasetSpec(name="toy", root=str(tmp_path), annotation="toy.jsonl", max_dynamic_patch=1)
  record = {"image": "a.png", "conversations": turns("what?", "red")}
  assert len(make(record, tokenizer, tmp_path, spec=spec).tiles) == 1
  assert len(make(record, tokenizer, tmp_path, dynamic_image_size=False).tiles) == 1


def test_text_only_sample_has_no_tile(tokenizer, tmp_path):
  for record in ({}, {"image": None}, {"image": ""}, {"image": []}, {"video": None}):
    sample = make({**record, "conversations": turns("hi", "hello")}, tokenizer, tmp_path)
    assert sample.tiles.shape == (0, 16, 16, 3) and not sample.fully_masked


def test_fully_masked(tokenizer, tmp_path):
  assert make({"conversations": turns("hi")}, tokenizer, tmp_path).fully_masked
  long = {"conversations": turns("hi " * 400, "hello")}
  with pytest.raises(UnsupervisedError, match="256 tokens are kept, and too few of them are supervised"):
    make(long, tokenizer, tmp_path, max_seq_length=256)


def test_augmentation_is_drawn_from_the_samples_own_seed(tokenizer, tmp_path):
  meta = write_dataset(tmp_path, 1, data_augment=True)

  def tiles(seed, epoch):
    mixture = Mixture(arguments(meta), tokenizer, tokens_per_tile=P, seed=seed)
    return mixture.decode(epoch, 0).tiles.tobytes()

  assert tiles(1, 0) == tiles(1, 0)
  assert len({tiles(1, 0), tiles(1, 1), tiles(2, 0)}) == 3


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ([1], "expected a JSON object, got list"),
    ("text", "expected a JSON object, got str"),
    ({"id": 3, "image": "a.png"}, "key 'conversations' is missing; the line has 'id', 'image'"),
    ({"image": 7, "conversations": []}, "'image' must be a path"),
    ({"image": "gone.png", "conversations": turns("a", "b")}, "gone.png; check the dataset's root"),
    (
      {"image": "a.png", "conversations": turns("<image><image>", "b")},
      "2 <image> in the human turns but 1 images",
    ),
    (
      {"image": "a.png", "conversations": [{"from": "gpt", "value": "a"}]},
      "0 <image> in the human turns but 1",
    ),
    ({"conversations": turns("<image>", "b")}, "1 <image> in the human turns but 0 images"),
    ({"image": "a.png", "conversations": "hello"}, "'conversations' must be a list"),
    ({"image": "a.png", "conversations": [{"from": "user", "value": "a"}]}, "turn 1 is from 'user'"),
    (
      {"image": ["a.png", "a.png"], "conversations": turns("<image>", "b")},
      "1 <image> in the human turns but 2 images",
    ),
    ({"image": ["a.png", 7], "conversations": turns("a", "b")}, "'image' must be a path or a list of paths"),
    ({"video": "gone.mp4", "conversations": turns("a", "b")}, "gone.mp4; check the dataset's root"),
  ],
)
def test_wrong_lines_are_named(tokenizer, tmp_path, picture, record, message):
  with pytest.raises(DataError) as caught:
    make(record, tokenizer, tmp_path)
  assert str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ") and message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_mixture_repeats_and_shares(tokenizer, tmp_path):
  write_dataset(tmp_path, 3, name="twice", repeat_time=2)
  meta = write_dataset(tmp_path, 10, name="share", repeat_time=0.25)
  mixture = Mixture(arguments(meta), tokenizer, tokens_per_tile=P, seed=0)
  assert mixture.sizes.tolist() == [6, 2] and mixture.num_samples == 8
  assert [(mixture.dataset_of(i), mixture.decode(0, i).where.line - 1) for i in range(8)] == [
    (0, 0),
    (0, 1),
    (0, 2),
  ] * 2 + [(1, 0), (1, 1)]
  assert [mixture.decode(0, i).where.line for i in range(8)] == [1, 2, 3, 1, 2, 3, 1, 2]
  twice, share, decoding = mixture.dataset_lines()
  assert twice.startswith("twice: 6 samples an epoch (75.0 %), 3 of 3 lines x 2, up to 4 tiles, root ")
  assert share.startswith("share: 2 samples an epoch (25.0 %), 2 of 10 lines x 1, ")
  assert decoding == compiled.note()
  mixture.close()
  entries = json.loads(meta.read_text())
  entries["share"]["repeat_time"] = 0.05
  meta.write_text(json.dumps(entries))
  with pytest.raises(DataError, match=r"'share': repeat_time=0\.05 of 10 lines is 0 samples"):
    Mixture(arguments(meta), tokenizer, tokens_per_tile=P, seed=0)


def test_numbers_of_frames_are_drawn_line_by_line(tokenizer, tmp_path):
  """From the seed, the dataset and the line, within the bounds."""
  write_dataset(tmp_path, 200, name="one")
  meta = write_dataset(tmp_path, 200, name="two")

  def frames(seed):
    data = arguments(meta, min_num_frame=3, max_num_frame=9)
    mixture = Mixture(data, tokenizer, tokens_per_tile=P, seed=seed)
    return [[dataset._frames(line) for line in range(200)] for dataset in mixture.datasets]

  first, second = frames(1)
  assert frames(1) == [first, second]
  assert set(first) == set(second) == set(range(3, 10))
  for other in (second, frames(2)[0]):
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 60  # 29 of 200 by chance.


def sample(length, tiles=0, *, value=0, dataset=0):
  """A sample of ids 1, 2, 3, ... that begins with its image tokens; its second half is supervised."""
  ids = np.arange(1, length + 1, dtype=np.int32) % CONTEXT
  ids[: tiles * P] = CONTEXT
  labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids).astype(np.int32)
  pixels = (
    np.zeros((tiles, 2, 2, 3), np.uint8)
    + np.arange(value, value + tiles, dtype=np.uint8)[:, None, None, None]
  )
  return Sample(
    input_ids=ids, labels=labels, tiles=pixels, truncated=False, where=WHERE, dataset=dataset, index=0
  )


def pack(*rows):
  return pack_several([[row] for row in rows])


def pack_several(rows):
  tiles = [place.tiles for row in rows for place in row if isinstance(place, Sample)]
  tiles = np.concatenate([np.zeros((0, 2, 2, 3), np.uint8), *tiles])
  return batching.pack_rows(rows, tiles=tiles, tokens_per_tile=P, image_token_id=CONTEXT)


def assemble(*micro_batches, shards=1, sequence_sizes=(16, 32), tile_sizes=(), **options):
  padding = batching.Padding(
    data_shards=shards,
    image_token_id=CONTEXT,
    sequence_sizes=sequence_sizes,
    tile_sizes=tile_sizes,
    **options,
  )
  return batching.assemble(micro_batches, padding)


def test_compressed_tiles_point_behind_the_usual_features_of_their_tile():
  """Rows of two shards; every segment has flags of its own, and one that shares a prompt has no image tokens."""
  few = 1
  flags = {"one": [[True, False], [False, True]], "two": [[True], [True]], "three": None}

  def make(name, tiles, *, shared=0):
    chosen = None if flags[name] is None else np.array(flags[name])
    shows = np.zeros((2, tiles), bool) if chosen is None else chosen
    lengths = [int(np.where(row, few, P).sum()) + 2 for row in shows[: 1 if shared else 2]] + [2] * bool(
      shared
    )
    ids = np.concatenate(
      [np.where(np.arange(n) < n - 2, CONTEXT, 1) for n in lengths[:1]]
      + [np.where(np.arange(n) < (0 if shared else n - 2), CONTEXT, 1) for n in lengths[1:]]
    ).astype(np.int32)
    pixels = np.zeros((tiles, 2, 2, 3), np.uint8)
    labels = np.where(ids == CONTEXT, IGNORE_INDEX, ids).astype(np.int32)
    return Sample(
      input_ids=ids,
      labels=labels,
      tiles=pixels,
      where=WHERE,
      lengths=tuple(lengths),
      shared=shared,
      compressed=chosen,
    )

  rows = [[make("three", 1), make("one", 2)], [make("two", 1, shared=2)]]
  tiles = np.zeros((4, 2, 2, 3), np.uint8)
  micro = batching.pack_rows(
    rows, tiles=tiles, tokens_per_tile=P, tokens_per_compressed_tile=few, image_token_id=CONTEXT
  )
  batch = assemble(micro, shards=2, features_per_tile=(P, few))
  usual, one = (
    [list(range(t * (P + few), t * (P + few) + P)) for t in range(3)],
    [t * (P + few) + P for t in range(3)],
  )
  first, second = (row[row != NO_IMAGE].tolist() for row in batch.image_index[0])
  assert first == usual[0] * 2 + [one[1], *usual[2]] + [*usual[1], one[2]]
  assert second == [one[0]]
  assert (batch.image_index[0] != NO_IMAGE).tolist() == (batch.input_ids[0] == CONTEXT).tolist()
  wrong = dataclasses.replace(rows[0][1], compressed=~rows[0][1].compressed[:, ::-1] | True)
  with pytest.raises(
    DataError, match="5 image tokens but 2 tiles of 4 tokens, of which 2 are compressed to 1, = 2; the"
  ):
    batching.pack_rows(
      [[wrong]], tiles=tiles, tokens_per_tile=P, tokens_per_compressed_tile=few, image_token_id=CONTEXT
    )


def test_batch_by_hand():
  batch = assemble(pack(sample(4), sample(6, 1, value=7)))
  assert batch.input_ids.shape == (1, 2, 16) and batch.tiles.shape == (1, 1, 1, 2, 2, 3)
  first, second = batch.input_ids[0]
  assert first.tolist() == [1, 2, 3, 4] + [0] * 12
  assert second.tolist() == [CONTEXT] * 4 + [5, 6] + [0] * 10
  ignored = IGNORE_INDEX
  assert batch.targets[0, 0].tolist() == [ignored, 3, 4] + [ignored] * 13
  assert batch.targets[0, 1].tolist() == [ignored, ignored, CONTEXT, 5, 6] + [ignored] * 11
  assert batch.loss_weight[0, 0].tolist() == [0, 1, 1] + [0] * 13
  assert batch.positions[0, 1].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 10
  assert batch.segment_ids[0].sum(-1).tolist() == [4, 6]
  assert batch.image_index[0, 1].tolist() == [0, 1, 2, 3] + [NO_IMAGE] * 12
  assert (batch.image_index[0, 0] == NO_IMAGE).all()
  assert (batch.tiles == 7).all()
  dtypes = [array.dtype for array in batch]
  assert dtypes == [np.int32, np.int32, np.float32, np.int32, np.int32, np.int32, np.uint8]


def test_rows_point_into_their_own_shards_pool():
  rows = [sample(20, 2, value=10), sample(9, 1, value=20), sample(5), sample(14, 3, value=30)]
  other = [sample(8, 1, value=40), sample(3), sample(12, 2, value=50), sample(4)]
  batch = assemble(pack(*rows), pack(*other), shards=2)
  assert batch.tiles.shape == (2, 2, 3, 2, 2, 3)
  assert batch.tiles[..., 0, 0, 0].tolist() == [[[10, 11, 20], [30, 31, 32]], [[40, 0, 0], [50, 51, 0]]]
  for a, micro_rows in enumerate((rows, other)):
    for r, row in enumerate(micro_rows):
      index = batch.image_index[a, r]
      features = batch.tiles[a, r // 2, :, 0, 0, 0].repeat(P)  # every feature named by its tile's value
      assert features[index[index != NO_IMAGE]].tolist() == row.tiles[:, 0, 0, 0].repeat(P).tolist()
      assert (index != NO_IMAGE).sum() == len(row.tiles) * P


def test_text_only_batch_has_an_empty_pool():
  batch = assemble(pack(sample(4), sample(5)), shards=2)
  assert batch.tiles.shape == (1, 2, 0, 2, 2, 3) and (batch.image_index == NO_IMAGE).all()


def test_dropped_sample_is_a_masked_row():
  micro = pack(sample(4), batching.Lost(1, "unreadable", "gone"), sample(6, 1, value=3))
  assert micro.errors == ("gone",) and micro.happened("unreadable").tolist() == [False, True, False]
  assert micro.datasets.tolist() == [0, 1, 0]
  batch = assemble(micro)
  for name in ("input_ids", "loss_weight", "positions", "segment_ids"):
    assert not getattr(batch, name)[0, 1].any()
  assert (batch.targets[0, 1] == IGNORE_INDEX).all() and (batch.image_index[0, 1] == NO_IMAGE).all()
  assert batch.input_ids[0, 2, :6].tolist() == [CONTEXT] * 4 + [5, 6]
  nothing = assemble(pack(batching.Lost(0, "unreadable", "a"), batching.Lost(0, "over_long", "b")))
  assert nothing.input_ids.shape == (1, 2, 16) and not nothing.segment_ids.any()


def test_packed_row_by_hand():
  """Three samples in a row and one dropped between them; the second row has one."""
  gone = batching.Lost(1, "unreadable", "gone")
  rows = [[sample(6, 1, value=7), gone, sample(3), sample(4)], [sample(5)]]
  batch = assemble(pack_several(rows))
  first = {name: getattr(batch, name)[0, 0, :14].tolist() for name in ("segment_ids", "positions", "targets")}
  assert first["segment_ids"] == [1] * 6 + [2] * 3 + [3] * 4 + [0]
  assert first["positions"] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 0]
  x = IGNORE_INDEX
  # No sample's last token is taught what the next one begins with.
  assert first["targets"] == [x, x, CONTEXT, 5, 6, x, 2, 3, x, x, 3, 4, x, x]
  assert batch.segment_ids[0, 1].tolist() == [1] * 5 + [0] * 11
  assert batch.image_index[0, 0, :5].tolist() == [0, 1, 2, 3, NO_IMAGE]


def test_a_first_token_is_no_target():
  """Of samples that are supervised from their first token on: no token of their own stands before it."""
  first, second = (dataclasses.replace(item, labels=item.input_ids) for item in (sample(3), sample(2)))
  batch = assemble(pack_several([[first, second]]))
  x = IGNORE_INDEX
  assert batch.targets[0, 0, :6].tolist() == [2, 3, x, 2, x, x]
  assert batch.loss_weight[0, 0, :6].tolist() == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("room", [1, 2])
def test_room_for_tiles_is_empty(room):
  """Where the memory of decoding goes on as the pool, what an earlier batch left behind the tiles is not seen."""
  item = sample(6, 1, value=7)
  memory = np.full((1 + room, 2, 2, 3), 9, np.uint8)
  memory[:1] = item.tiles
  micro = batching.pack_rows([[item]], tiles=memory, tokens_per_tile=P, image_token_id=CONTEXT)
  batch = assemble(micro, tile_sizes=(1 + room,))
  assert batch.tiles[0, 0, :, 0, 0, 0].tolist() == [7] + [0] * room


@pytest.mark.parametrize(("reduction", "power"), [("token", 0), ("square", -0.5), ("sample", -1)])
def test_weights_by_supervised_tokens_of_the_sample(reduction, power):
  batch = assemble(pack_several([[sample(6), sample(12)]]), loss_reduction=reduction, sequence_sizes=(32,))
  counts = {1: 3, 2: 6}  # the second half of these samples is supervised
  taught = batch.targets[0, 0] != IGNORE_INDEX
  for segment, count in counts.items():
    weights = batch.loss_weight[0, 0][taught & (batch.segment_ids[0, 0] == segment)]
    np.testing.assert_allclose(weights, [count**power] * count, rtol=1e-6)
  assert not batch.loss_weight[0, 0][~taught].any()


def test_image_tokens_that_are_not_the_tiles_are_named():
  wrong = sample(20, 2)
  wrong.input_ids[0] = 1
  with pytest.raises(DataError, match=r"^toy.jsonl:3 .*: 7 image tokens but 2 tiles of 4 tokens = 8"):
    pack(sample(4), wrong)


def test_sequence_buckets():
  assert shapes.sequence_buckets(8192) == (256, 512, 1024, 2048, 4096, 8192)
  assert shapes.sequence_buckets(300) == (300,)
  assert shapes.sequence_buckets(1000) == (500, 1000)
  assert shapes.sequence_buckets(500, (512, 128)) == (128, 512)
  with pytest.raises(DataError, match=r"largest, 256, is below data\.max_seq_length, 500"):
    shapes.sequence_buckets(500, (256,))
  with pytest.raises(DataError, match="sizes must be 1 or more, got 0"):
    shapes.sequence_buckets(500, (0, 512))
  assert assemble(pack(sample(16))).input_ids.shape[-1] == 16
  assert assemble(pack(sample(17))).input_ids.shape[-1] == 32


def test_tile_buckets():
  sizes = [shapes.tile_bucket(n) for n in range(14)]
  assert sizes == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
  assert [shapes.tile_bucket(n, (10, 5)) for n in (0, 1, 5, 6, 10, 11)] == [0, 5, 5, 10, 10, 12]
  assert assemble(pack(sample(20, 5))).tiles.shape[2] == 6
  assert assemble(pack(sample(20, 5)), tile_sizes=(8,)).tiles.shape[2] == 8
