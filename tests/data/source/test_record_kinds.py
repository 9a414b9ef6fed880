"""Kinds of annotation files: the same records whatever they are written in, found by number, and told apart from others."""

import concurrent.futures
import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data.sample import line_media
from internvl_jax.data.source import array, media, patterns, tar
from internvl_jax.data.source.media import Content
from internvl_jax.data.source.meta import read_meta
from internvl_jax.data.source.records import first_records, open_records
from internvl_jax.data.where import DataError
from tests.support.data_kinds import members_of, records_of, write_kinds, write_tables, write_tar
from tests.support.data_toys import WHERE, write_dataset

COUNT = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp("kinds")
  write_dataset(found, COUNT)
  return found


def plain(record, root):
  """A record with the bytes of its image in place of what names it."""
  found = {key: value for key, value in record.items() if key != "image"}
  sources = [media.join(str(root), path, WHERE) for path in line_media.image_paths(record, WHERE)]
  found["images"] = [x.content if isinstance(x, Content) else open(x, "rb").read() for x in sources]  # noqa: SIM115
  return found


def check(entries, folder, cache):
  expected = [plain(record, folder) for record in records_of(folder)]
  for name, entry in entries.items():
    (folder / "meta.json").write_text(json.dumps({name: entry}))
    (spec,) = read_meta(folder / "meta.json", cache=cache)
    records = open_records(spec.annotation, name, key=spec.key, cache=cache)
    assert len(records) == COUNT, name
    for copy in (records, pickle.loads(pickle.dumps(records))):
      order = [*range(COUNT - 1, -1, -2), *range(0, COUNT, 2)]
      with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i, copy=copy, root=spec.root: plain(copy.read(i), root), order))
      assert found == [expected[i] for i in order], name
      copy.close()
    # All that is kept of a file tells it from another.
    again = open_records(spec.annotation, name, key=spec.key, cache=cache)
    digests = {records.digest_records(i, i + 1) for i in range(COUNT)}
    assert len(digests) == COUNT and records.digest_records(0, COUNT) == again.digest_records(0, COUNT), name
    assert 0 < records.checksum(0, 5) == again.checksum(0, 5) != records.checksum(1, 6), name
    assert (records.digest(), records.stamp(), records.state) == (
      again.digest(),
      again.stamp(),
      again.state,
    )
    assert next(iter(records.containing(b'"image')), None) is not None, name
    assert not list(records.containing(b'"video')), name
    records.check_unchanged()


def test_records_are_the_same_in_every_kind(folder, tmp_path):
  check(write_kinds(folder), folder, tmp_path)


def test_records_are_the_same_in_tables(folder, tmp_path):
  pytest.importorskip("datasets")
  check(write_tables(folder), folder, tmp_path)


def test_what_a_relative_root_is_meant_from_is_told_by_first_records(folder, tmp_path, monkeypatch):
  write_kinds(folder)
  monkeypatch.chdir(tmp_path)
  for name in ("array.json", "lines.jsonl.gz", "part-*.jsonl"):
    assert next(iter(first_records(str(folder / name), cache=tmp_path)))["image"] == "toy0.png"
    (folder / "meta.json").write_text(json.dumps({"a": {"root": "", "annotation": name}}))
    assert read_meta(folder / "meta.json", cache=tmp_path)[0].root == str(folder)
  assert next(iter(first_records(str(folder / "all.tar"))))["id"] == 0


# --- Arrays -------------------------------------------------------------------------------------------------


def test_arrays_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(array, "_CHUNK", 32)
  entries = [{"a": 'é\\"],' * i, "b": [i, {"c": None}]} for i in range(30)] + [[], 17, -1.5e3, "x", True]
  for indent in (None, 1):
    (tmp_path / "a.json").write_text(
      "\ufeff  " + json.dumps(entries, indent=indent, ensure_ascii=False) + "\n"
    )
    file = open_records(str(tmp_path / "a.json"), "toy")
    assert [file.read(i) for i in range(len(file))] == entries
    file.close()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('[\n{"a": 1},\n{"a" 2}\n]', r"a\.json:3: dataset 'toy': broken JSON at byte 17: Expecting ':'"),
    ('[\n{"a": 1}\n{"a": 2}]', r"a\.json:3: dataset 'toy': broken JSON at byte 11: expected '\]', got '{'"),
    ('[\n{"a": 1},\n{"a": "', r"broken JSON at byte 18: Unterminated string"),
    ('[{"a": 1}', r"expected '\]', got the end of the file"),
    ('[{"a": 1}]]', r"'\]' after the list's end"),
    ("[]", "is empty: 0 samples"),
  ],
)
def test_broken_arrays_are_named_by_line(tmp_path, text, message, monkeypatch):
  (tmp_path / "a.json").write_text(text)
  for chunk in (1 << 20, 4):
    monkeypatch.setattr(array, "_CHUNK", chunk)
    monkeypatch.setattr(array, "_CUT", min(chunk, 16))
    with pytest.raises(DataError, match=message):
      open_records(str(tmp_path / "a.json"), "toy")


def test_an_entry_with_a_name_twice_is_refused_when_it_is_read(tmp_path):
  (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 1, "a": 2}]')
  file = open_records(str(tmp_path / "a.json"), "toy")
  assert file.read(0) == {"a": 1}
  with pytest.raises(DataError, match=r"a\.json:2 \(dataset 'toy'\): key 'a' stands twice"):
    file.read(1)
  file.close()


# --- Packed and several files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_damaged_packed_file_is_named(tmp_path, kind):
  text = b'{"a": 1}\n' * 10_000
  if kind == "zstd":
    packed = pytest.importorskip("zstandard").compress(text)
  else:
    packed = gzip.compress(text)
  path = tmp_path / "a.jsonl"
  path.write_bytes(packed[: len(packed) // 2] + b"\0" * (len(packed) - len(packed) // 2))
  with pytest.raises(DataError, match=rf"a\.jsonl: dataset 'toy': it is packed by {kind} and damaged"):
    open_records(str(path), "toy", cache=tmp_path / "cache")
  assert not list((tmp_path / "cache/copies").glob("*.unpacked"))


def test_patterns(tmp_path):
  assert patterns.expand("a-{08..11}.{x,y}")[:3] == ["a-08.x", "a-08.y", "a-09.x"]
  assert len(patterns.expand("a-{08..11}.{x,y}")) == 8
  assert patterns.expand("plain.tar") == ["plain.tar"]
  (tmp_path / "b{1}*.jsonl").write_text("{}")
  assert patterns.expand(str(tmp_path / "b{1}*.jsonl")) == [str(tmp_path / "b{1}*.jsonl")]
  for pattern, message in (
    ("a-{9..3}.tar", r"\{9\.\.3\} is no range"),
    (str(tmp_path / "*.tar"), "no file fits the pattern"),
    ("a*/b.tar", "may stand in a file's name"),
    (str(tmp_path / "gone/*.tar"), "its folder cannot be read"),
  ):
    with pytest.raises(DataError, match=message):
      patterns.expand(pattern)


def test_many_shards_keep_few_files_open(tmp_path, monkeypatch):
  monkeypatch.setattr("internvl_jax.data.source.several._OPEN", 3)
  for i in range(9):
    (tmp_path / f"{i}.jsonl").write_text(f'{{"a": {2 * i}}}\n{{"a": {2 * i + 1}}}\n')
  records = open_records(str(tmp_path / "{0..8}.jsonl"), "toy")
  assert records.kind == "9 x jsonl"
  assert [records.read(i)["a"] for i in range(18)] == list(range(18))
  assert sum(part._file is not None for part in records.parts) == 3
  assert records.where(17).file == str(tmp_path / "8.jsonl") and records.where(17).line == 2
  (tmp_path / "4.jsonl").write_text("{}\n")
  with pytest.raises(DataError, match=r"4\.jsonl.*the file was changed"):
    records.check_unchanged()
  records.close()


# --- Tars ---------------------------------------------------------------------------------------------------


def open_tar(path, files, **options):
  write_tar(path, files, **options)
  return open_records(str(path), "toy")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format(tmp_path, form):
  long = "folder/" + "n" * 90 if form == tarfile.USTAR_FORMAT else "f" * 60 + "/é" + "n" * 180
  files = [
    (f"{long}{i}.{end}", f'{{"i": {i}}}'.encode() * (end == "json"))
    for i in range(3)
    for end in ("json", "png")
  ]
  records = open_tar(tmp_path / "a.tar", [("__notes__", b"x"), *files, ("._a.json", b"")], form=form)
  assert [records.read(i)["i"] for i in range(len(records))] == [0, 1, 2]
  assert records.read(2)["image"] == [Content(f"{tmp_path}/a.tar/{long}2.png", b"")]
  records.close()


@pytest.mark.parametrize(
  ("said", "expected"),
  [
    ({}, {"image": [b"A", b"B"], "video": b"V"}),
    ({"image": "b.png"}, {"image": b"B", "video": b"V"}),
    ({"images": ["x/0.b.png", "a.jpg"]}, {"images": [b"B", b"A"], "video": b"V"}),
    ({"image": ["coco/7.jpg", "coco/9.jpg"]}, {"image": [b"A", b"B"], "video": b"V"}),
    ({"video": "films/1.avi", "image": ""}, {"image": [b"A", b"B"], "video": b"V"}),
    ({"image": "other.png"}, "'image' names 1 files, and 2 are beside it in the tar, of other names"),
  ],
)
def test_media_beside_json_take_the_places_that_name_them(tmp_path, said, expected):
  files = [("0.json", json.dumps(said).encode()), ("0.a.jpg", b"A"), ("0.b.png", b"B"), ("0.mp4", b"V")]
  records = open_tar(tmp_path / "a.tar", files)
  if isinstance(expected, str):
    with pytest.raises(DataError, match=expected):
      records.read(0)
    return
  found = records.read(0)
  assert {
    key: [x.content for x in value] if isinstance(value, list) else value.content
    for key, value in found.items()
    if value
  } == expected


def test_tars_that_are_cut_or_changed_are_named(tmp_path, folder):
  path = tmp_path / "a.tar"
  write_tar(path, members_of(records_of(folder), folder))
  records = open_records(str(path), "toy")
  whole = path.read_bytes()
  path.write_bytes(b"x" * 700 + whole[700:])
  with pytest.raises(DataError, match=r"a\.tar:1 \(dataset 'toy'\): "):
    records.read(0)
  path.write_bytes(whole[:1000] + b"\1" * 4000)
  with pytest.raises(DataError, match=r"a\.tar: dataset 'toy': no header of a tar at byte"):
    open_records(str(path), "toy")
  path.write_bytes(whole[: records.span(10)[1] - 512])
  with pytest.raises(DataError, match=r"a\.tar: dataset 'toy': the tar ends early; restore it"):
    open_records(str(path), "toy")
  path.write_bytes(whole[: records.span(10)[1]])  # without the end's empty blocks
  assert len(open_records(str(path), "toy")) == 11
  records.close()


def test_sizes_in_headers_are_read_as_they_are_written():
  def size(field):
    return tar._size_of(b"\0" * 124 + field + b"\0" * 376, 0)

  for field, expected in (
    (b"00000000010\0", 8),
    (b"         10\0", 8),
    (b"10 \0".ljust(12, b"\0"), 8),
    (b"100000000000", 1 << 33),
    (b"\x80" + (1 << 40).to_bytes(11, "big"), 1 << 40),
    (b"\0" * 12, 0),
  ):
    assert size(field) == expected
  for field in (b"00000000090\0", b"x0000000000\0"):
    with pytest.raises(Exception, match="no header of a tar at byte 0"):
      size(field)


def test_a_tar_is_read_forward_from_what_cannot_go_back(tmp_path, folder):
  path = tmp_path / "a.tar"
  write_tar(path, members_of(records_of(folder), folder))
  records = open_records(str(path), "toy")

  class Pipe(io.BytesIO):
    def seek(self, *_):
      raise OSError("a pipe")

    def read(self, size=-1):
      return super().read(min(size, 100))  # as a socket does

  found = list(tar.records_in_order(Pipe(path.read_bytes()), str(path), "toy"))
  assert [make() for _, make in found] == [records.read(i) for i in range(len(records))]
  assert [place for place, _ in found] == [records.span(i)[0] for i in range(len(records))]
  records.close()


# --- Media --------------------------------------------------------------------------------------------------


def test_pictures_in_a_zip(tmp_path):
  image = io.BytesIO()
  Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(image, "PNG")
  with zipfile.ZipFile(tmp_path / "p.ZIP", "w") as archive:
    archive.writestr("a/1.png", image.getvalue())
  found = media.join(f"{tmp_path}/p.ZIP", "a/1.png", WHERE)
  assert found == Content(f"{tmp_path}/p.ZIP/a/1.png", image.getvalue())
  with pytest.raises(DataError, match=r"image not found: .*2\.png: the zip has no such file"):
    media.join(str(tmp_path), "p.ZIP/a/2.png", WHERE)
  with pytest.raises(DataError, match="members of a zip on another machine"):
    media.join("gs://bucket/p.zip", "a/1.png", WHERE)
  (tmp_path / "bad.zip").write_bytes(b"PK\3\4" + b"\0" * 40)
  with pytest.raises(DataError, match="cannot be read from the zip"):
    media.join(str(tmp_path), "bad.zip/a.png", WHERE)
  (tmp_path / "folder.zip").mkdir()
  assert media.join(str(tmp_path), "folder.zip/1.png", WHERE) == f"{tmp_path}/folder.zip/1.png"


def test_values_that_are_pictures(tmp_path):
  jpeg = b"\xff\xd8\xff\xe0" + bytes(range(200))
  text = media.base64.b64encode(jpeg).decode()
  for value in (jpeg, {"bytes": jpeg, "path": None}, {"bytes": text}, text, f"data:image/jpeg;base64,{text}"):
    assert media.media_of(value, "image 1", WHERE) == Content("image 1.jpg", jpeg)
  assert media.media_of({"bytes": jpeg, "path": "a/b.png"}, "image 1", WHERE).name == "a/b.png"
  for value, expected in (
    ({"path": "a.jpg"}, "a.jpg"),
    ({"url": "s3://b/a"}, "s3://b/a"),
    ("/9j/a.jpg", "/9j/a.jpg"),
  ):
    assert media.media_of(value, "image 1", WHERE) == expected
  assert media.media_of(b"\0\0\0\x18ftypmp42", "video 1", WHERE).name == "video 1.mp4"
  with pytest.raises(DataError, match="image 1 is broken base64"):
    media.media_of("data:image/png;base64,????", "image 1", WHERE)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
  import sys

  (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
  (tmp_path / "saved").mkdir()
  (tmp_path / "saved/state.json").write_text("{}")
  (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
  for name in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet", "datasets", "zstandard"):
    monkeypatch.setitem(sys.modules, name, None)
  for name, extra in (("a.parquet", "parquet"), ("saved", "datasets"), ("a.zst", "zstd")):
    with pytest.raises(DataError, match=rf"dataset 'toy': .* pip install 'internvl_jax\[{extra}\]'"):
      open_records(str(tmp_path / name), "toy", cache=tmp_path / "cache")


def test_a_damaged_table_is_named(tmp_path):
  pytest.importorskip("pyarrow")
  (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(range(256)))
  with pytest.raises(DataError, match=r"a\.parquet: dataset 'toy': it cannot be read as parquet: "):
    open_records(str(tmp_path / "a.parquet"), "toy", cache=tmp_path / "cache")
  with pytest.raises(DataError, match="datasets cannot open it"):
    open_records(str(tmp_path / "gone"), "toy", key="dataset", cache=tmp_path / "cache")
