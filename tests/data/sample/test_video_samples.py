"""Samples with a video: which frames they have, in every epoch and process, and lines that are wrong about theirs."""

import concurrent.futures
import json
import multiprocessing
import pickle

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data.load.mixture import Mixture, limits_of
from internvl_jax.data.sample import images, video
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl
from tests.support.videos import FRAMES, numbers_of, write_folder, write_gif, write_video

P = 4


def make(record, tokenizer, folder, *, rng=(0, 0, 0), spec=None, frames=None, **changes):
  spec = spec or DatasetSpec(name="toy", root=str(folder), annotation="toy.jsonl")
  settings = {"min_num_frame": 3, "max_num_frame": 6} | changes
  data = arguments(folder / "meta.json", **settings)
  maker = SampleMaker(
    spec=spec, data=data, tokenizer=tokenizer, tokens_per_tile=P, limits=limits_of(data, "truncate")
  )
  generator = rng and np.random.default_rng(rng)
  return maker.make(record, WHERE, generator, frames=frames)


@pytest.mark.parametrize("question", ["<video>\nwhat?", "what?", "first <video>then"])
def test_sample(tokenizer, tmp_path, question):
  write_video(tmp_path / "a.mp4")
  record = {"video": "a.mp4", "conversations": turns(question, "red")}
  count = 5
  sample = make(record, tokenizer, tmp_path, frames=count)
  assert sample.tiles.shape == (count, 16, 16, 3) and sample.tiles.dtype == np.uint8
  assert (sample.input_ids == tokenizer.image_token_id).sum() == count * P
  rng = np.random.default_rng((0, 0, 0))
  path = str(tmp_path / "a.mp4")
  limits = {"min_num_frame": count, "max_num_frame": count}
  frames = video.read_frames(path, WHERE, **limits, rng=rng)
  resized = [np.asarray(frame.resize((16, 16), Image.Resampling.BICUBIC)) for frame in frames]
  np.testing.assert_array_equal(sample.tiles, np.stack(resized))
  assert video.planned_frames(path, WHERE, **limits, rng=np.random.default_rng((0, 0, 0))) == count
  lines = "\n".join(f"Frame-{number}: <image>" for number in range(1, count + 1))
  expected = {"<video>\nwhat?": f"{lines}\nwhat?", "what?": f"{lines}\nwhat?"}
  text = expected.get(question, f"first {lines}then")
  conversation = turns(text, "red")
  other = tokenizer.encode(conversation, [P] * count, WHERE)
  np.testing.assert_array_equal(sample.input_ids, other.input_ids)
  np.testing.assert_array_equal(sample.labels, other.labels)
  assert record["conversations"] == turns(question, "red")


def test_placeholder_goes_to_the_first_human_turn(tokenizer, tmp_path):
  write_video(tmp_path / "a.mp4")
  chat = [{"from": "gpt", "value": "hi <video>"}, *turns("what?", "red", "where?", "here")]
  sample = make({"video": "a.mp4", "conversations": chat}, tokenizer, tmp_path, max_num_frame=3)
  assert "hi <video>" in tokenizer.decode(sample.input_ids) and len(sample.tiles) == 3
  chat = turns("what?", "red", "<video>\nwhere?", "here")
  sample = make({"video": "a.mp4", "conversations": chat}, tokenizer, tmp_path, max_num_frame=3)
  assert tokenizer.decode(sample.input_ids).index("what?") < tokenizer.decode(sample.input_ids).index(
    "Frame-1"
  )


def test_clip_gif_and_folder_samples(tokenizer, tmp_path):
  write_gif(tmp_path / "a.gif", 4)
  write_folder(tmp_path / "b", ["f_1.jpg", "f_2.jpg"])
  write_video(tmp_path / "c.mp4")
  for line, tiles in (
    ({"video": "a.gif"}, 4),
    ({"video": "b/"}, 2),
    ({"video": "a.gif", "clip": [0, 0.2]}, 2),
    ({"video": "c.mp4", "clip": [0, 0.08], "image": None}, 6),
    ({"video": "", "image": None}, 0),
    ({"video": None, "clip": None}, 0),
  ):
    record = {**line, "conversations": turns("what?", "red")}
    assert len(make(record, tokenizer, tmp_path, min_num_frame=6).tiles) == tiles


def test_a_sample_is_a_function_of_seed_epoch_and_index(tokenizer, tmp_path):
  write_video(tmp_path / "a.mp4", range(200))
  write_jsonl(tmp_path / "toy.jsonl", [{"video": "a.mp4", "conversations": turns("what?", "red")}] * 2)

  def tiles(seed, epoch, index, **entry):
    entry = {"root": str(tmp_path), "annotation": "toy.jsonl", **entry}
    (tmp_path / "meta.json").write_text(json.dumps({"toy": entry}))
    data = arguments(tmp_path / "meta.json", min_num_frame=3, max_num_frame=6)
    mixture = Mixture(data, tokenizer, tokens_per_tile=P, seed=seed)
    return mixture.decode(epoch, index).tiles

  for augment in (False, True):
    drawn = [
      tiles(*key, data_augment=augment).tobytes() for key in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1))
    ]
    assert len(set(drawn)) == 4
    assert tiles(1, 0, 0, data_augment=augment).tobytes() == drawn[0]


def test_augmentation_of_frames(tokenizer, tmp_path):
  folder = write_folder(tmp_path / "a", [])
  rng = np.random.default_rng(0)
  for number in range(6):
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
  record = {"video": "a/", "conversations": turns("what?", "red")}
  plain, augmented = (
    make(record, tokenizer, tmp_path, spec=DatasetSpec(**toy, data_augment=augment))
    for toy in [{"name": "toy", "root": str(tmp_path), "annotation": "toy.jsonl"}]
    for augment in (False, True)
  )
  rng = np.random.default_rng((0, 0, 0))
  video.frame_indices(6, 6, rng)
  qualities = [int(rng.integers(75, 101)) for _ in plain.tiles]
  for before, after, quality in zip(plain.tiles, augmented.tiles, qualities, strict=True):
    encoded = images.jpeg_reencode(Image.fromarray(before), quality)
    np.testing.assert_array_equal(after, np.asarray(encoded))
    assert (before != after).any()


def test_without_a_generator_the_middle_frames_of_the_largest_number(tokenizer, tmp_path):
  write_video(tmp_path / "a.mp4")
  record = {"video": "a.mp4", "conversations": turns("what?", "red")}
  sample = make(record, tokenizer, tmp_path, rng=None)
  assert len(sample.tiles) == 6
  assert numbers_of(tmp_path / "a.mp4", 6) == video.frame_indices(FRAMES, 6, "middle")


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (
      {"video": ["a.mp4", "b.mp4"]},
      "'video' lists 2 files, ['a.mp4', 'b.mp4'], that are not all images; write a line for each video",
    ),
    ({"video": 7}, "'video' must be one path or those of its frames, got '7'"),
    ({"video": "a.mp4", "image": "a.png"}, "has both 'image' 'a.png' and 'video' 'a.mp4'; keep one"),
    ({"video": "gone.mp4"}, "gone.mp4; check the dataset's root"),
    (
      {"video": "a.mp4", "conversations": turns("<video><video>", "b")},
      "2 <video> and 0 <image> in the human turns",
    ),
    (
      {"video": "a.mp4", "conversations": turns("<image>", "b")},
      "0 <video> and 1 <image> in the human turns",
    ),
    ({"video": "a.mp4", "conversations": [{"from": "gpt", "value": "a"}]}, "no human turn"),
    ({"video": "a.mp4", "conversations": "hello"}, "'conversations' must be a list"),
    (
      {"video": "a.mp4", "max_seq_length": 16},
      "6 tiles exceed data.max_seq_length=16: 16 tokens are kept, without 6 of the images",
    ),
  ],
)
def test_wrong_lines_are_named(tokenizer, tmp_path, record, message):
  write_video(tmp_path / "a.mp4", range(8))
  record = {"conversations": turns("what?", "red"), **record}
  changes = {"max_seq_length": record.pop("max_seq_length")} if "max_seq_length" in record else {}
  with pytest.raises(DataError) as caught:
    make(record, tokenizer, tmp_path, min_num_frame=6, **changes)
  assert str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ") and message in str(caught.value)
  assert "\n" not in str(caught.value)


def _decode(mixture, index):
  return pickle.loads(mixture).decode(0, index).tiles.tobytes()


def test_the_same_in_threads_and_in_worker_processes(tokenizer, tmp_path):
  for number in range(4):
    write_video(tmp_path / f"{number}.mp4", range(number, FRAMES))
  lines = [{"video": f"{number}.mp4", "conversations": turns("what?", "red")} for number in range(4)]
  write_jsonl(tmp_path / "toy.jsonl", lines)
  (tmp_path / "meta.json").write_text(json.dumps({"toy": {"root": str(tmp_path), "annotation": "toy.jsonl"}}))
  data = arguments(tmp_path / "meta.json", min_num_frame=3, max_num_frame=6)
  mixture = Mixture(data, tokenizer, tokens_per_tile=P, seed=0)
  expected = [mixture.decode(0, index).tiles.tobytes() for index in range(4)]
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    found = list(threads.map(lambda index: mixture.decode(0, index).tiles.tobytes(), [*range(4)] * 4))
  assert found == expected * 4
  copy = pickle.dumps(mixture)
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as workers:
    assert list(workers.map(_decode, [copy] * 4, range(4))) == expected
