"""A kind of annotation file is a file and a line: one of JSON and images side by side is added here."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.sample import images, video
from internvl_jax.data.source import records
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.media import Content
from internvl_jax.data.source.meta import read_meta
from internvl_jax.data.source.records import Kind, kind_of, open_records
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE, arguments, write_dataset

# The one file.
SHARDS = '''
import io
import itertools
import json
import tarfile

import numpy as np

from internvl_jax.data.source.media import Content
from internvl_jax.data.source.spans import RecordFile, Spans


class Shard(RecordFile):
  """Records that are neighbors in a tar: 000.json and, if they have one, 000.png."""

  def find(self):
    with tarfile.open(self.local) as tar:
      groups = [list(found) for _, found in itertools.groupby(tar, lambda file: file.name.partition(".")[0])]
    starts = [files[0].offset for files in groups]
    # Members are padded to blocks of 512 bytes.
    ends = [files[-1].offset_data + -(-files[-1].size // 512) * 512 for files in groups]
    return Spans(np.array(starts), np.array(ends))

  def read(self, index):
    record = {}
    with tarfile.open(fileobj=io.BytesIO(self.read_bytes(*self.span(index)))) as tar:
      for file in tar:
        content = tar.extractfile(file).read()
        if file.name.endswith(".json"):
          record |= json.loads(content)
        else:
          record["image"] = Content(f"{self.path}/{file.name}", content)
    return record
'''


@pytest.fixture
def shards(tmp_path, monkeypatch):
  """The module of the new kind, which is registered for `.shard`."""
  (tmp_path / "package").mkdir()
  (tmp_path / "package" / "internvl_jax_shards.py").write_text(SHARDS)
  monkeypatch.syspath_prepend(tmp_path / "package")
  import internvl_jax_shards

  # The one line.
  tar = Kind(open=internvl_jax_shards.Shard, first_records=lambda path: iter(()), suffixes=(".shard",))
  monkeypatch.setattr(records, "KINDS", (*records.KINDS, tar))
  yield internvl_jax_shards
  sys.modules.pop("internvl_jax_shards")


def as_shard(folder):
  """Writes the lines of toy.jsonl and their images as one tar."""
  with tarfile.open(folder / "toy.shard", "w") as tar:

    def add(name, content):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))

    for number, line in enumerate((folder / "toy.jsonl").read_text().splitlines()):
      record = json.loads(line)
      image = record.pop("image", None)
      add(f"{number:03}.json", json.dumps(record).encode())
      if image:
        add(f"{number:03}.png", (folder / image).read_bytes())


def batches_of(meta, tokenizer, cache, **data):
  loader = TrainLoader(
    arguments(meta, **data),
    TrainingArguments(per_device_train_batch_size=2, max_steps=3, disable_tqdm=True),
    LoaderConfig(cache_dir=str(cache)),
    tokenizer,
    tokens_per_tile=4,
  )
  state = loader.get_state()
  batches = list(loader)
  loader.close()
  return batches, state


@pytest.mark.parametrize("packed", [False, True])
def test_a_new_kind_makes_the_batches_that_lines_and_files_make(shards, tmp_path, tokenizer, packed):
  meta, cache = write_dataset(tmp_path, 10), tmp_path / "cache"
  data = {"use_packed_ds": packed, "max_packed_tokens": 600, "num_images_expected": 12, "strict_mode": False}
  expected, _ = batches_of(meta, tokenizer, cache, **data)
  as_shard(tmp_path)
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.shard"}}))
  found, state = batches_of(meta, tokenizer, cache, **data)
  assert len(found) == 3 and max(batch.tiles.max() for batch in found) > 0
  for batch, other in zip(found, expected, strict=True):
    for array, wanted in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, wanted)
  assert state["content"]["datasets"][0]["lines"] == 10


def test_errors_name_the_record_and_its_bytes(shards, tmp_path, tokenizer):
  meta = write_dataset(tmp_path, 4)
  (tmp_path / "toy1.png").write_bytes(b"%PDF-1.4")
  as_shard(tmp_path)
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.shard"}}))
  tar = tmp_path / "toy.shard"
  message = rf"{tar}:2 \(dataset 'toy'\): image {tar}/001.png cannot be decoded: it is a PDF; convert it"
  with pytest.raises(DataError, match=message):
    batches_of(meta, tokenizer, tmp_path / "cache")


def test_a_kind_is_chosen_by_suffix_or_by_key(shards, tmp_path, monkeypatch):
  assert kind_of("a.SHARD").open is shards.Shard
  assert (
    kind_of("a.shard.jsonl").open is kind_of("a").open is kind_of("https://x.org/a?b.shard").open is JsonlFile
  )
  of_key = Kind(open=shards.Shard, first_records=lambda path: iter(()), key="shards")
  monkeypatch.setattr(records, "KINDS", (records.KINDS[0], of_key))
  meta = write_dataset(tmp_path, 4)
  as_shard(tmp_path)
  meta.write_text(json.dumps({"toy": {"root": "", "shards": "toy.shard"}}))
  (spec,) = read_meta(meta)
  assert (spec.annotation, spec.key) == (str(tmp_path / "toy.shard"), "shards")
  assert len(open_records(spec.annotation, spec.name, key=spec.key)) == 4
  for entry, message in (
    ({"annotation": "toy.jsonl", "shards": "toy.shard"}, "both 'annotation' and 'shards' name its records"),
    ({"shard": "toy.shard"}, "unknown key 'shard'; did you mean 'shards'"),
    ({}, "key 'annotation' is missing; records are named by one of annotation, shards"),
    ({"shards": 3}, "'shards' must be a string, got 3"),
    ({"shards": "gone.tar"}, "annotation file not found; tried gone.tar"),
  ):
    meta.write_text(json.dumps({"toy": {"root": "", **entry}}))
    with pytest.raises(DataError, match=message):
      read_meta(meta)


def test_bytes_are_read_as_their_file_is(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), dtype=np.uint8)
  first, *others = map(Image.fromarray, pixels)
  first.save(tmp_path / "a.png")
  first.save(tmp_path / "v.gif", save_all=True, append_images=others)
  image, film = (Content(name, (tmp_path / name).read_bytes()) for name in ("a.png", "v.gif"))
  assert images.image_size(image, WHERE) == (40, 24)
  np.testing.assert_array_equal(np.asarray(images.open_image(image, WHERE)), pixels[0])
  options = {"min_num_frame": 3, "max_num_frame": 3, "rng": None}
  frames = video.read_frames(film, WHERE, **options)
  expected = video.read_frames(str(tmp_path / "v.gif"), WHERE, **options)
  assert len(frames) == 3 == video.planned_frames(film, WHERE, **options)
  for frame, wanted in zip(frames, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(frame), np.asarray(wanted))
  listed = video.read_frames((image, image), WHERE, **options)
  assert [frame.size for frame in listed] == [(40, 24)] * 2
  for empty, read in (("a.png", images.open_image), ("v.gif", lambda *x: video.read_frames(*x, **options))):
    with pytest.raises(DataError, match=rf"{empty} is empty \(0 bytes\)"):
      read(Content(empty, b""), WHERE)
