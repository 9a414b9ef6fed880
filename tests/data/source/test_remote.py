"""Data that lie on web servers and object stores: the same samples, and what is said when they cannot be had."""

import concurrent.futures
import io
import json
import os
import pickle
import re
import sys
import tempfile

import numpy as np
import pytest
from fsspec.registry import _registry
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample import images, video
from internvl_jax.data.source import files
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.meta import read_meta
from internvl_jax.data.where import DataError
from internvl_jax.storage import remote
from internvl_jax.storage.paths import BucketPath, put
from tests.support.data_toys import WHERE, arguments, turns, write_dataset, write_jsonl
from tests.support.videos import write_folder, write_gif, write_video
from tests.support.web_toys import object_store, web_server

P = 4


@pytest.fixture
def data(tmp_path):
  """A folder of images and videos with a meta file in which everything is relative to it."""
  folder = tmp_path / "data"
  folder.mkdir()
  write_dataset(folder, 4, name="stills", data_augment=True)
  films = folder / "films"
  films.mkdir()
  write_video(films / "a.mp4")
  write_folder(films / "frames #1", [f"shot_{number}.png" for number in range(8, 13)])
  write_gif(films / "b.gif", 7)
  names = ("a.mp4", "frames #1/", "frames #1", "./b.gif", "x/../films/a.mp4")
  write_jsonl(
    folder / "films.jsonl", [{"video": n, "conversations": turns("what?", "red")} for n in names[:4]]
  )
  write_jsonl(folder / "more.jsonl", [{"video": names[4], "conversations": turns("what?", "red")}])
  meta = json.loads((folder / "meta.json").read_text())
  meta["films"] = {"root": "films", "annotation": "films.jsonl"}
  meta["more"] = {"root": "", "annotation": "more.jsonl"}
  (folder / "meta.json").write_text(json.dumps(meta))
  (folder / "x").mkdir()
  return folder


@pytest.fixture
def web(tmp_path, data, monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
  monkeypatch.setattr(remote, "_systems", {})
  with web_server(data) as server:
    yield server


@pytest.fixture
def no_copies(tmp_path, monkeypatch):
  """The folder of temporary files, which must be empty at the end."""
  folder = tmp_path / "temporary"
  folder.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(folder))
  yield folder
  assert not list(folder.iterdir())


def loader_of(root, tokenizer, **training):
  return TrainLoader(
    arguments(f"{root}/meta.json", min_num_frame=2, max_num_frame=4),
    TrainingArguments(**{"per_device_train_batch_size": 3, "max_steps": 4} | training),
    LoaderConfig(),
    tokenizer,
    tokens_per_tile=P,
  )


# --- The same samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "gs", "s3", "file"])
def test_a_remote_mixture_gives_the_samples_of_the_local_one(
  tokenizer, tmp_path, data, web, no_copies, monkeypatch, kind
):
  root = {"http": web.url, "file": f"file://{data}"}.get(kind) or object_store(monkeypatch, kind, data)
  check_samples(tokenizer, tmp_path, data, root)


def test_a_mixture_in_a_bucket_gives_the_samples_of_the_local_one(
  tokenizer, tmp_path, data, bucket, no_copies
):
  for path in data.rglob("*"):
    if path.is_file():
      put(path, BucketPath(bucket) / path.relative_to(data).as_posix())
  check_samples(tokenizer, tmp_path, data, bucket)


def check_samples(tokenizer, tmp_path, data, root):
  """Compares all samples of `data` with those of its copy at the URL `root`."""
  mixtures = []
  for place in (str(data), root):
    settings = arguments(f"{place}/meta.json", min_num_frame=2, max_num_frame=6)
    mixture = Mixture(settings, tokenizer, tokens_per_tile=P, seed=0, cache=tmp_path / "cache")
    mixture.index_sizes(tmp_path / "cache", workers=0, quiet=True)
    mixtures.append(mixture)
  local, far = mixtures
  assert far.num_samples == local.num_samples == 9
  assert (
    far.datasets[1].spec.root == f"{root}/films" and far.datasets[2].spec.annotation == f"{root}/more.jsonl"
  )
  for index in range(9):
    one, other = local.decode(0, index), far.decode(0, index)
    for name in ("input_ids", "labels", "tiles"):
      np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
    assert other.where.line == one.where.line
    assert other.where.file == one.where.file.replace(str(data), root)
  for one, other in zip(local.datasets, far.datasets, strict=True):
    np.testing.assert_array_equal(other.records, one.records)
    assert (other.records["tokens"] > 0).all()


def test_a_worker_process_fetches_too(tokenizer, data, web):
  expected = list(loader_of(data, tokenizer))
  # This process has connections already, which stay its own.
  assert images.open_image(f"{web.url}/stills0.png", WHERE).mode == "RGB"
  loader = loader_of(web.url, tokenizer, dataloader_num_workers=1)
  for batch, other in zip(loader, expected, strict=True):
    for array, wanted in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, wanted)
  loader.close()


def test_many_threads_at_once(data, web):
  urls = [f"{web.url}/stills{i}.png" for i in (0, 1, 3)] * 20
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda url: np.asarray(images.open_image(url, WHERE)).tobytes(), urls))
  expected = [np.asarray(Image.open(data / f"stills{i}.png")).tobytes() for i in (0, 1, 3)]
  assert found == expected * 20


def test_local_and_remote_parts_of_one_mixture(tokenizer, tmp_path, data, web, monkeypatch):
  monkeypatch.chdir(tmp_path)
  entries = {
    "far_lines": {"root": "", "annotation": f"{web.url}/films.jsonl"},
    "far_images": {"root": web.url, "annotation": "data/stills.jsonl"},
  }
  record = {"image": f"{web.url}/stills0.png", "conversations": turns("<image>\nwhat?", "red")}
  write_jsonl(tmp_path / "urls.jsonl", [record])
  entries["urls"] = {"root": "data", "annotation": "urls.jsonl"}
  (data / "films" / "meta.json").write_text(json.dumps(entries))
  specs = read_meta(data / "films" / "meta.json")
  # Of the working directory and the meta file's folder, the second holds the first video.
  assert [spec.root for spec in specs] == [str(data / "films"), web.url, "data"]
  settings = arguments(data / "films" / "meta.json", min_num_frame=2, max_num_frame=4)
  mixture = Mixture(settings, tokenizer, tokens_per_tile=P, seed=0)
  assert [len(mixture.decode(0, i).tiles) > 0 for i in (0, 4, 8)] == [True] * 3


# --- Paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("root", "path", "joined"),
  [
    ("images", "a.jpg", "images/a.jpg"),
    ("", "a.jpg", "a.jpg"),
    ("images", "b/../a.jpg", "images/b/../a.jpg"),  # where b is a link, only the system knows what it means
    ("images", "/c/a.jpg", "/c/a.jpg"),
    ("gs://bucket", "/c/a.jpg", "/c/a.jpg"),
    ("images", "gs://bucket/a.jpg", "gs://bucket/a.jpg"),
    ("gs://bucket/images/", "b/./../a.jpg", "gs://bucket/images/a.jpg"),
    ("gs://bucket/images", "b//a 100%.jpg", "gs://bucket/images/b//a 100%.jpg"),
    ("s3://bucket", "frames/", "s3://bucket/frames/"),
    ("https://host/images", "what? #1 100%.jpg", "https://host/images/what%3F %231 100%25.jpg"),
    ("https://host/images?key=1", "a.jpg", "https://host/images/a.jpg"),
    ("file:///images", "a.jpg", "file:///images/a.jpg"),
  ],
)
def test_paths_are_joined(root, path, joined):
  assert files.join(root, path, WHERE) == joined


@pytest.mark.parametrize("root", ["", "images", "/images", "gs://bucket/images", "https://host"])
@pytest.mark.parametrize("path", ["../a.jpg", "b/../../a.jpg", "..", "./../images/a.jpg"])
def test_a_path_that_leaves_its_root_is_refused(root, path):
  with pytest.raises(DataError) as caught:
    files.join(root, path, WHERE)
  assert str(caught.value).startswith(f"toy.jsonl:3 (dataset 'toy'): path {path!r} leaves the dataset's root")
  assert repr(root) in str(caught.value)


def test_names_in_urls():
  assert files.name("https://host/a%20b/c%231.JPG?key=/x.png#y") == "c#1.JPG"
  assert files.suffix("https://host/c.mp4?key=x.png") == ".mp4" and files.suffix("gs://b/a?.x/c") == ""
  assert files.parent("https://host/d/meta.json?key=a/b") == "https://host/d"
  assert files.parent("gs://b/meta.json") == "gs://b" and files.parent("meta.json") == ""
  assert files.resolve_path("gs://b/d", "../../../a.jsonl") == "gs://b/a.jsonl"
  assert (
    files.resolve_path("gs://b/d/", "") == "gs://b/d" and files.resolve_path("", "gs://b/d") == "gs://b/d"
  )


# --- What is fetched ----------------------------------------------------------------------------------------


def header_kinds():
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8))
  return noise, {
    "a.jpg": ({"quality": 95}, 1),
    "a.png": ({}, 1),
    "a.bmp": ({}, 1),
    "a.gif": ({}, 1),
    "a.tif": ({"compression": "tiff_lzw"}, 2),  # its header stands behind the pixels
    "profile.jpg": ({"icc_profile": b"x" * 100_000}, 2),
  }


def test_only_the_header_of_an_image_is_fetched_for_its_size(data, web):
  noise, kinds = header_kinds()
  for name, (options, blocks) in kinds.items():
    noise.save(data / name, **options)
    size = (data / name).stat().st_size
    assert size > 4 * files.BLOCK_BYTES
    web.served, web.log = 0, []
    assert images.image_size(f"{web.url}/{name}", WHERE) == (600, 500)
    assert web.served <= blocks * files.BLOCK_BYTES, name
    assert web.requests(f"/{name}").count(("GET", 206)) == blocks, name
  for name in ("a.webp", "small.png"):  # Pillow reads all of the one; all of the other is in a block
    (noise if name == "a.webp" else noise.resize((60, 50))).save(data / name)
    web.served = 0
    width, _ = images.image_size(f"{web.url}/{name}", WHERE)
    assert width in (60, 600) and web.served == (data / name).stat().st_size


def test_a_server_without_ranges_sends_the_whole_and_all_goes_well(data, web):
  web.ranges = False
  noise, kinds = header_kinds()
  for name, (options, _) in kinds.items():
    noise.save(data / name, **options)
    assert images.image_size(f"{web.url}/{name}", WHERE) == (600, 500)
    assert [method for method, _ in web.requests(f"/{name}")] == ["GET"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("extra", [-1, 0, 1, files.BLOCK_BYTES, 200_000, None])
def test_a_part_of_a_file_is_read_like_a_file(data, web, ranges, extra):
  web.ranges = ranges
  content = b"" if extra is None else np.random.default_rng(0).bytes(files.BLOCK_BYTES + extra)
  (data / "part").write_bytes(content)
  file, wanted = files.open_file(f"{web.url}/part"), io.BytesIO(content)
  for seek, read in ((0, 16), (0, 70_000), (60_000, 10_000), (100, 5), (1 << 20, 3), (files.BLOCK_BYTES, -1)):
    assert file.seek(seek) == wanted.seek(seek) and file.read(read) == wanted.read(read)
  if content:
    assert file.seek(-5, io.SEEK_END) == wanted.seek(-5, io.SEEK_END) and file.read() == wanted.read()


def test_nothing_of_a_video_is_fetched_to_plan_it(data, web, no_copies):
  def planned(path, **clip):
    return video.planned_frames(path, WHERE, min_num_frame=9, max_num_frame=9, rng=None, **clip)

  web.served = 0
  assert planned(f"{web.url}/films/a.mp4") == 9 and planned(f"{web.url}/films/a.mp4", clip=[0, 1]) == 9
  assert web.served == 0 and {method for method, _ in web.requests("/films/a.mp4")} == {"HEAD"}
  assert planned(f"{web.url}/films/frames %231/") == 5
  assert (
    planned(f"{web.url}/films/b.gif?key=1") == 7 and planned(f"{web.url}/films/b.gif", clip=[0, 0.2]) == 2
  )


def test_ffmpeg_never_opens_the_network(data, web, no_copies):
  (data / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:10,\n{web.url}/films/a.mp4\n#EXT-X-ENDLIST\n")
  with pytest.raises(DataError, match=f"video {web.url}/list.m3u8 "):
    video.read_frames(f"{web.url}/list.m3u8", WHERE, min_num_frame=2, max_num_frame=2, rng=None)
  assert not web.requests("/films/a.mp4")


# --- Annotation files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("versions", [True, False])
def test_an_annotation_file_is_copied_once_and_again_when_it_has_changed(tmp_path, data, web, versions):
  web.versions = versions
  url, path, cache = f"{web.url}/a.jsonl", data / "a.jsonl", tmp_path / "cache"

  def first_line():
    file = JsonlFile(url, "toy", cache=cache)
    copy = pickle.loads(pickle.dumps(file))
    assert copy.read(0) == file.read(0) and copy.where(0)[:3] == file.where(0)[:3] == ("toy", url, 1)
    return file.read(0), file

  write_jsonl(path, [{"a": 1}, {"a": 2}])
  assert first_line()[0] == {"a": 1}
  kept = first_line()[1]
  assert first_line()[1].state == kept.state
  assert web.requests("/a.jsonl").count(("GET", 200)) == (1 if versions else 3)
  write_jsonl(path, [{"a": 3}, {"a": 2}])  # as long as before
  os.utime(path, ns=(1, 1))
  assert first_line()[0] == {"a": 3}
  assert kept.read(0) == {"a": 1}  # a run that has started goes on with what it has
  kept.check_unchanged()
  names = [entry.name for entry in (cache / "copies").iterdir() if entry.name != "lock"]
  assert len(names) == 2 and all(name.startswith("a-") and name.endswith(".jsonl") for name in names)


def test_sizes_of_a_remote_annotation_file_are_kept(tokenizer, tmp_path, data, web, monkeypatch):
  def measured(expected):
    settings = arguments(f"{web.url}/meta.json")
    mixture = Mixture(settings, tokenizer, tokens_per_tile=P, seed=0, cache=tmp_path / "cache")
    web.log.clear()
    mixture.index_sizes(tmp_path / "cache", workers=0, quiet=True)
    assert all((dataset.records["tokens"] > 0).all() for dataset in mixture.datasets)
    assert any(path.endswith("png") for _, path, _ in web.log) == expected

  measured(True)
  measured(False)
  monkeypatch.chdir(tmp_path)  # A URL is the same from everywhere.
  measured(False)
  lines = (data / "stills.jsonl").read_text()
  (data / "stills.jsonl").write_text(lines.replace("number 0", "number 7"))
  measured(True)


def test_the_default_cache(tmp_path, data, web):
  JsonlFile(f"{web.url}/films.jsonl", "toy")
  assert len(list((tmp_path / "cache" / "internvl_jax" / "copies").glob("films-*.jsonl"))) == 1


def test_broken_remote_annotation_files_are_named(data, web):
  (data / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
  url = f"{web.url}/a.jsonl"
  with pytest.raises(DataError, match=rf"^{url}:2 \(dataset 'toy'\): broken JSON"):
    JsonlFile(url, "toy").read(1)
  (data / "a.jsonl").write_text("")
  with pytest.raises(DataError, match=rf"^{url}: dataset 'toy' is empty: 0 samples"):
    JsonlFile(url, "toy")
  gone = f"{web.url}/gone.jsonl"
  with pytest.raises(DataError, match=rf"^{gone}: dataset 'toy': .* cannot be read: .*No such file"):
    JsonlFile(gone, "toy")
  with pytest.raises(DataError, match=rf"^{gone}: the meta file cannot be read: .*check data.meta_path"):
    read_meta(gone)


# --- What fails ---------------------------------------------------------------------------------------------


def message_of(function, *args, **options):
  with pytest.raises(DataError) as caught:
    function(*args, **options)
  message = str(caught.value)
  assert message.startswith("toy.jsonl:3 (dataset 'toy'): ") and "\n" not in message
  return message


def test_damaged_images_are_named_as_local_ones_are(data, web):
  content = (data / "stills0.png").read_bytes()
  (data / "cut.png").write_bytes(content[: len(content) // 2])
  (data / "empty.png").write_bytes(b"")
  (data / "text.png").write_text("not an image")
  for name in ("cut.png", "empty.png", "text.png", "gone.png"):
    for function in (images.open_image, images.image_size):
      if name == "cut.png" and function is images.image_size:
        continue  # its header is whole
      expected = message_of(function, str(data / name), WHERE).replace(str(data), web.url)
      assert message_of(function, f"{web.url}/{name}", WHERE) == expected
  assert web.requests("/gone.png") == [("GET", 404)] * 2  # Said at once.


def test_damaged_videos_are_named_as_local_ones_are(data, web, no_copies):
  content = (data / "films" / "a.mp4").read_bytes()
  (data / "cut.mp4").write_bytes(content[: len(content) // 2])
  (data / "empty.mp4").write_bytes(b"")
  (data / "text.mp4").write_text("a line of text\n" * 100)
  (data / "cut.gif").write_bytes((data / "films" / "b.gif").read_bytes()[:9])
  (data / "nothing").mkdir()
  limits = {"min_num_frame": 3, "max_num_frame": 3, "rng": None}
  for name in ("cut.mp4", "empty.mp4", "text.mp4", "cut.gif", "nothing", "gone.mp4", "gone/"):
    expected = message_of(video.read_frames, f"{data}/{name}", WHERE, **limits).replace(str(data), web.url)
    assert message_of(video.read_frames, f"{web.url}/{name}", WHERE, **limits) == expected
  clip = {**limits, "clip": [7, 8]}
  assert f"not inside video {web.url}/films/a.mp4, which lasts 2.56 s" in message_of(
    video.read_frames, f"{web.url}/films/a.mp4", WHERE, **clip
  )


def test_a_video_that_is_given_up_half_way_leaves_no_copy(data, web, no_copies):
  frames = video.iter_frames(
    f"{web.url}/films/a.mp4", WHERE, min_num_frame=3, max_num_frame=3, rng=None, clip=None
  )
  next(frames)
  assert len(list(no_copies.iterdir())) == 1
  frames.close()


@pytest.mark.parametrize("faults", [[503, 503], [500], [429], ["cut", "cut"], ["reset", 503], ["silence"]])
def test_what_passes_is_tried_again(data, web, no_copies, monkeypatch, faults):
  if "silence" in faults:
    monkeypatch.setattr(remote, "_TIMEOUT", 0.2)
  url, expected = f"{web.url}/stills0.png", np.asarray(Image.open(data / "stills0.png"))
  web.faults["/stills0.png"] = list(faults)
  np.testing.assert_array_equal(np.asarray(images.open_image(url, WHERE)), expected)
  web.faults["/stills0.png"] = list(faults)
  assert images.image_size(url, WHERE) == (expected.shape[1], expected.shape[0])
  web.faults["/films/a.mp4"] = [*faults, *faults]
  limits = {"min_num_frame": 2, "max_num_frame": 2, "rng": None}
  assert len(video.read_frames(f"{web.url}/films/a.mp4", WHERE, **limits)) == 2
  web.faults |= {"/meta.json": list(faults), "/films.jsonl": [*faults, *faults]}
  assert read_meta(f"{web.url}/meta.json")
  assert len(JsonlFile(f"{web.url}/films.jsonl", "films")) == 4
  assert not any(web.faults.values())


def test_what_does_not_pass_is_told_with_its_line(data, web, monkeypatch):
  monkeypatch.setattr(remote, "_TRIES", 3)
  web.faults["/stills0.png"] = [503] * 100
  for function in (images.open_image, images.image_size):
    web.log.clear()
    message = message_of(function, f"{web.url}/stills0.png", WHERE)
    assert f"image {web.url}/stills0.png cannot be fetched: 503 Service Unavailable, 3 tries in " in message
    assert web.requests("/stills0.png") == [("GET", 503)] * 3
  web.faults["/films/a.mp4"] = [503] * 100
  limits = {"min_num_frame": 2, "max_num_frame": 2, "rng": None}
  message = message_of(video.planned_frames, f"{web.url}/films/a.mp4", WHERE, **limits)
  assert f"video {web.url}/films/a.mp4 cannot be fetched: 503 Service Unavailable, 3 tries" in message
  web.faults["/films.jsonl"] = [503] * 100
  with pytest.raises(
    DataError, match=rf"^{web.url}/films.jsonl: dataset 'toy': .* 503 Service Unavailable, 3"
  ):
    JsonlFile(f"{web.url}/films.jsonl", "toy")


def test_a_server_that_never_answers_does_not_hold_anyone(data, web, monkeypatch):
  monkeypatch.setattr(remote, "_TIMEOUT", 0.2)
  monkeypatch.setattr(remote, "_TRIES", 2)
  web.faults["/stills0.png"] = ["silence"] * 2
  message = message_of(images.open_image, f"{web.url}/stills0.png", WHERE)
  assert re.search(
    r"no answer in time \(\w+: Timeout on reading.*\), 2 tries in \d s; try again later", message
  )


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read_is_told_at_once(data, web, status):
  web.faults |= {"/stills0.png": [status] * 9, "/films/a.mp4": [status] * 9}
  message = message_of(images.open_image, f"{web.url}/stills0.png", WHERE)
  assert f"cannot be fetched: permission denied ({status} " in message and "check the credentials" in message
  assert web.requests("/stills0.png") == [("GET", status)]
  limits = {"min_num_frame": 2, "max_num_frame": 2, "rng": None}
  message = message_of(video.planned_frames, f"{web.url}/films/a.mp4", WHERE, **limits)
  assert f"cannot be fetched: permission denied ({status} " in message
  # Some links may be got and not asked about; that is tried too.
  assert web.requests("/films/a.mp4") == [("HEAD", status), ("GET", status)]


@pytest.mark.parametrize(
  ("scheme", "module"), [("gs", "gcsfs"), ("s3", "s3fs"), ("http", "aiohttp"), ("https", "aiohttp")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, scheme, module):
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
  monkeypatch.delitem(_registry, scheme, raising=False)
  message = message_of(images.open_image, f"{scheme}://host/a.png", WHERE)
  assert f"{scheme}:// needs a package that is not installed" in message
  assert message.endswith(f": pip install {module}")
  # A dataset whose images cannot be read is not found out line by line.
  meta = write_dataset(tmp_path, 1, root=f"{scheme}://host")
  with pytest.raises(
    DataError, match=f"nothing can be read from root '{scheme}://host': .*pip install {module}"
  ):
    read_meta(meta)


def test_a_copy_without_room(data, web, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "data" / "meta.json"))
  limits = {"min_num_frame": 2, "max_num_frame": 2, "rng": None}
  message = message_of(video.read_frames, f"{web.url}/films/a.mp4", WHERE, **limits)
  assert "cannot hold a copy" in message and "TMPDIR" in message


def test_an_escape_is_told_with_its_line(tokenizer, data, web):
  record = {"image": "../stills0.png", "conversations": turns("<image>\nwhat?", "red")}
  write_jsonl(data / "films.jsonl", [record, {**record, "width": 40, "height": 24}])
  mixture = Mixture(arguments(f"{web.url}/meta.json"), tokenizer, tokens_per_tile=P, seed=0)
  for index in (4, 5):
    with pytest.raises(DataError, match=rf"films.jsonl:{index - 3} .*path '../stills0.png' leaves .*/films'"):
      mixture.decode(0, index)
