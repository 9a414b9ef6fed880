"""Checkpoints in a bucket are those of a folder: the same parameters, the same errors, and no byte that nobody needs."""

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import struct
import uuid
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import consistency
from internvl_jax.config import TrainConfig
from internvl_jax.config_checks import problems
from internvl_jax.errors import UserError
from internvl_jax.hf import files, hub, peft, ranges, saving, vocabulary, weights
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.arrangement import reading_sharding
from internvl_jax.hf.model import Changes, Source, base_name, open_parts, open_source, with_projector
from internvl_jax.hf.tables import Transform
from internvl_jax.models.lora import LoRASpec, adapter_paths
from internvl_jax.storage import remote, snapshots
from internvl_jax.storage.paths import BucketPath, put
from internvl_jax.storage.remote import FetchError
from tests.support.buckets import one_store
from tests.support.damage import edit_config, load
from tests.support.toy import CURVE

MODEL = CURVE / "init"

"""For what does not depend on which store it is."""

SINGLE = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A folder of caches of the test's own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "internvl_jax" / "models"


@pytest.fixture
def folder(tmp_path):
  """A copy of a good checkpoint, in two files."""
  copy = shutil.copytree(MODEL, tmp_path / "model")
  split(copy)
  return copy


@pytest.fixture(scope="module")
def shared_bucket(store):
  """A bucket for many tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(remote, "_systems", {})
    url = f"{store}://models-{uuid.uuid4().hex[:12]}"
    remote.ask(url, lambda system: system.mkdir(url))
    yield url


@pytest.fixture
def room(shared_bucket):
  """A folder of the test's own in that bucket."""
  return f"{shared_bucket}/{uuid.uuid4().hex[:12]}"


def split(folder: Path) -> None:
  """Makes two files of a checkpoint's one."""
  tensors = load_file(folder / SINGLE)
  saving.save(folder, tensors.items(), shard_bytes=sum(t.nbytes for t in tensors.values()) * 2 // 3)
  assert len(list(folder.glob("*.safetensors"))) == 2


def send(folder: Path, url: str) -> str:
  """Copies a folder to a bucket."""
  for path in folder.iterdir():
    put(path, BucketPath(url) / path.name)
  return url


def opened(url: str) -> weights.Checkpoint:
  """The tensors of a folder of a bucket."""
  return weights.open_checkpoint(hub.local_folder(url))


def read(source: Source) -> dict[str, jax.Array]:
  """All parameters of a source."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, place))


def same(ours: dict, theirs: dict) -> bool:
  return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_parameters_and_tokenizer_are_those_of_the_folder(bucket, folder, cache):
  url = send(folder, f"{bucket}/models/toy")
  assert same(load(url), load(MODEL))  # pyright: ignore[reportArgumentType]
  assert vocabulary.open_tokenizer(url).get_vocab() == vocabulary.open_tokenizer(MODEL).get_vocab()
  (here,) = cache.iterdir()
  assert sum(path.stat().st_size for path in here.glob("*.safetensors")) < 1000, "weights were copied"
  assert (here / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


@one_store
def test_layers_are_read_when_they_are_asked_for(room, folder):
  lazy = open_source(send(folder, f"{room}/m")).lazy(np.dtype(np.float32))  # pyright: ignore[reportArgumentType]
  assert same(lazy, load(MODEL))


@one_store
@pytest.mark.parametrize("name", ["mlp.safetensors", pytest.param("mlp.pth", marks=pytest.mark.torch)])
def test_a_projector(room, tmp_path, name):
  """A file of safetensors is read by ranges; a pickle, which has checksums within, is copied."""
  numbers = {
    key.removeprefix("mlp1."): value + 1
    for key, value in load_file(MODEL / SINGLE).items()
    if key.startswith("mlp1.")
  }
  if name.endswith(".pth"):
    torch = pytest.importorskip("torch")
    torch.save({key: torch.tensor(value) for key, value in numbers.items()}, tmp_path / name)
  else:
    save_file(numbers, tmp_path / name)
  put(tmp_path / name, BucketPath(room) / name)
  found = read(with_projector(open_source(MODEL), f"{room}/{name}"))
  np.testing.assert_array_equal(found["mlp1.linear_1.bias"], numbers["1.bias"])


@one_store
def test_a_whole_model_in_place_of_its_parts(room):
  url = send(MODEL, f"{room}/init")
  changes = Changes(image_size=28, downsample_ratio=0.5, ps_version="v2")
  with pytest.raises(UserError, match=f"^{url}: a whole InternVL checkpoint"):
    open_parts(vision_path=url, llm_path=url, mlp_path=None, changes=changes)


@one_store
def test_adapters_beside_their_base_model(room, tmp_path):
  send(MODEL, f"{room}/base")
  source = open_source(MODEL, Changes(text_lora=LoRASpec(rank=2, alpha=4.0)))
  shapes = {path: source.model.shapes[path].shape for path in adapter_paths(source.model.shapes)}
  adapters = {path: np.arange(np.prod(shape), dtype="f4").reshape(shape) for path, shape in shapes.items()}
  peft.save_adapter(tmp_path / "a", adapters, source.specs, source.layout, source.table, base="../base")
  assert same(load(send(tmp_path / "a", f"{room}/adapter")), load(MODEL) | adapters)  # pyright: ignore[reportArgumentType]


@one_store
@pytest.mark.parametrize("base", ["./../base", "{bucket}/base", "org/name", "s3://other/base"])
def test_the_base_model_that_an_adapter_names(room, base):
  send(MODEL, f"{room}/base")
  config = {"peft_type": "LORA", "base_model_name_or_path": base.format(bucket=room)}
  (BucketPath(room) / "adapter" / peft.CONFIG).write_text(json.dumps(config))
  if base.startswith("s3://other"):
    with pytest.raises(UserError, match="s3://other/base: nothing is there"):
      base_name(f"{room}/adapter")
    return
  assert base_name(f"{room}/adapter") == (base if base == "org/name" else f"{room}/base")


# --- What is fetched ----------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch):
  """The ranges that were fetched: URL, first byte and number of bytes."""
  found, read = [], BucketPath.read_range

  def counted(self, start, end):
    content = read(self, start, end)
    found.append((str(self), start, len(content)))
    return content

  monkeypatch.setattr(BucketPath, "read_range", counted)
  return found


@one_store
def test_each_host_fetches_what_its_devices_hold(room, folder, fetched):
  """Of two hosts with a part of each row, each fetches its half of every matrix and no byte beside."""
  source = open_source(send(folder, f"{room}/m"))
  assert source.checkpoint is not None
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("host",))
  for host in range(2):
    del fetched[:]
    held = 0
    for path, leaf in source.model.shapes.items():
      names = weights.names_of(path, leaf.shape, source.table)
      sharding, transform = _halved(mesh, names, leaf), names.row.transform
      # What is transformed otherwise than by turning it is read whole: of this model, the kernel of patches.
      held += 4 * np.prod(leaf.shape if transform.part is None else sharding.shard_shape(leaf.shape))
      first = reading_sharding(transform, names.lead, leaf.shape, sharding, far=True)
      index = first.devices_indices_map(leaf.shape)[jax.devices()[host]]
      weights.read_shard(source.checkpoint, names, leaf, index)
    assert (
      sum(count for *_, count in fetched)
      == held
      < 0.65 * 4 * sum(np.prod(leaf.shape) for leaf in source.model.shapes.values())
    )


@one_store
def test_devices_of_a_host_fetch_nothing_twice(room, folder, fetched):
  """Also where each of them holds a part of every row of the files."""
  source = open_source(send(folder, f"{room}/m"))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
  place = {path: jax.sharding.NamedSharding(mesh, jax.P()) for path in source.model.shapes}
  paths = {f"language_model.model.layers.0:3.mlp.{name}_proj.kernel" for name in ("gate", "down")}
  place |= {path: jax.sharding.NamedSharding(mesh, jax.P(None, "x")) for path in paths}
  del fetched[:]
  found = source.load(source.model.shapes, place, paths=paths)
  assert sum(count for *_, count in fetched) == sum(4 * found[path].size for path in paths)
  whole = load(MODEL)
  for path in paths:
    np.testing.assert_array_equal(found[path], whole[path])
    assert found[path].sharding == place[path]


def test_tensors_that_are_read_whole_are_divided_by_layers_or_experts():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
  whole = Transform(lambda tensors, shape: tensors[0], lambda value: [value])
  for shape, lead, spec, wanted in (
    ((12, 16, 8, 8), 2, jax.P(None, None, "x"), (12, 2, 8, 8)),
    ((12, 16, 8), 1, jax.P(None, "x"), (3, 16, 8)),
    ((12, 16, 8), 1, jax.P(), (12, 16, 8)),
    ((16, 12, 8), 1, jax.P("x"), (2, 12, 8)),
    ((9, 16, 8), 1, jax.P(None, "x"), (9, 2, 8)),
    ((16, 8), 0, jax.P("x"), (2, 8)),
  ):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    found = reading_sharding(whole, lead, shape, sharding, far=True)
    assert found.shard_shape(shape) == wanted
    assert reading_sharding(whole, lead, shape, sharding, far=False) is sharding


def _halved(mesh, names, leaf):
  """A parameter's matrices in two, across the rows of the file."""
  parts: list = [None] * len(leaf.shape)
  matrix = [i for i in range(names.lead, len(leaf.shape)) if leaf.shape[i] % 2 == 0]
  if len(matrix) > 1:
    parts[matrix[0]] = "host"
  return jax.sharding.NamedSharding(mesh, jax.P(*parts))


@one_store
def test_requests_are_few_and_of_what_is_asked_for(room, tmp_path, fetched, monkeypatch):
  monkeypatch.setattr(ranges, "PART_BYTES", 1000)
  monkeypatch.setattr(ranges, "FIRST_BYTES", 100)
  tensors = {
    "a": np.arange(1200, dtype="f4").reshape(3, 20, 20),
    "b": np.arange(6, dtype="u1"),
    "c": np.float64(7),
  }
  tensors = {name: np.asarray(value) for name, value in tensors.items()} | {"d": np.empty((0, 3), "f2")}
  save_file(tensors, tmp_path / "x.safetensors")
  put(tmp_path / "x.safetensors", BucketPath(room) / "x.safetensors")
  checkpoint = weights.open_checkpoint(hub.local_weights(f"{room}/x.safetensors"))
  assert len(fetched) == 2, "a header is read once, by two requests"
  weights.open_checkpoint(hub.local_weights(f"{room}/x.safetensors"))
  assert len(fetched) == 2, "a header was read again"
  for index, requests, numbers in (
    (None, 5, 1200),
    ((slice(1, 2),), 2, 400),
    ((slice(2, 3), slice(0, 5)), 1, 100),
    ((slice(1, 2), slice(4, 6), slice(3, 9)), 1, 26),
    ((slice(0, 0),), 0, 0),
  ):
    del fetched[:]
    part = checkpoint.read("a", index)
    np.testing.assert_array_equal(part, tensors["a"][index or ()])
    assert part.flags.c_contiguous
    assert (len(fetched), sum(count for *_, count in fetched)) == (requests, 4 * numbers)
  for name in "bcd":
    np.testing.assert_array_equal(checkpoint.read(name), tensors[name])


def test_what_is_ahead_is_in_order_and_within_bounds():
  running, most = [0], [0]

  def work(i):
    running[0] += 1
    most[0] = max(most[0], running[0])
    if i == 7:
      raise ValueError("7")
    running[0] -= 1
    return i

  assert list(ranges.ahead(work, range(7), 3)) == list(range(7)) and most[0] <= 3
  with pytest.raises(ValueError, match="7"):
    list(ranges.ahead(work, range(20), 3))


def test_hosts_compare_what_the_store_knows(bucket, fetched):
  url = send(MODEL, f"{bucket}/m")
  source = open_source(url)
  first = consistency.weights(source)
  del fetched[:]
  assert consistency.weights(dataclasses.replace(source, checkpoint=opened(url))) == first and not fetched
  assert "the content of m/model.safetensors" in first
  changed = (MODEL / SINGLE).read_bytes()
  (BucketPath(url) / SINGLE).write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
  other = consistency.weights(dataclasses.replace(source, checkpoint=opened(url)))
  assert [name for name in first if first[name] != other[name]] == ["the content of m/model.safetensors"]


# --- What changes, and what is at the same time -------------------------------------------------------------


def test_a_bucket_that_changes_is_seen(bucket, folder, cache):
  url = send(folder, f"{bucket}/m")
  before = hub.local_folder(url)
  assert hub.local_folder(url) == before
  edit_config(folder, template="phi3-chat")
  send(folder, url)
  assert (
    config_io.read_config(hub.local_folder(url))["template"] == "phi3-chat"
    and hub.local_folder(url) != before
  )


@one_store
def test_a_file_that_is_written_anew_while_it_is_read(room, folder):
  url = send(folder, room)
  source = open_source(url)
  name = next(folder.glob("*.safetensors")).name
  content = (folder / name).read_bytes()
  (BucketPath(url) / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(UserError, match=f"^{url}/{name}: was overwritten while it was read"):
    read(source)


@one_store
def test_several_at_once_and_one_that_fails(room, cache, monkeypatch):
  url, read = send(MODEL, f"{room}/m"), BucketPath.read_bytes

  def fails(self):
    raise FetchError("the cable was pulled")

  monkeypatch.setattr(BucketPath, "read_bytes", fails)
  with pytest.raises(UserError, match=rf"^{url}/\w+\.json: the cable was pulled"):
    hub.local_folder(url)
  assert not list(cache.iterdir())
  monkeypatch.setattr(BucketPath, "read_bytes", read)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    (found,) = set(pool.map(hub.local_folder, [url] * 4))
  assert list(cache.iterdir()) == [found] and (found / "config.json").is_file()


# --- What is refused ----------------------------------------------------------------------------------------


def cut(folder):
  os.truncate(folder / SINGLE, 5000)


def lengthen(folder):
  with (folder / SINGLE).open("ab") as file:
    file.write(bytes(7))


def replaced(content):
  return lambda folder: (folder / SINGLE).write_bytes(content)


def index(folder, name):
  (folder / files.INDEX).write_text(json.dumps({"weight_map": {"mlp1.0.weight": name}}))


DAMAGE = {
  "cut": cut,
  "longer": lengthen,
  "empty": replaced(b""),
  "short": replaced(b"1234"),
  "lfs": replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
  "huge header": replaced(struct.pack("<Q", files.HEADER_BYTES + 1) + bytes(files.HEADER_BYTES + 2)),
  "endless header": replaced(struct.pack("<Q", 2**60) + b"{}"),
  "no tensors": replaced(struct.pack("<Q", 2) + b"{}"),
  "no header": replaced(struct.pack("<Q", 10) + b'{"a":[[[[}' + bytes(9)),
  "no entry": replaced(struct.pack("<Q", 8) + b'{"a":3}' + b" "),
  "missing shard": lambda folder: index(folder, "model-00002-of-00002.safetensors"),
  "another index": lambda folder: (index(folder, "x.safetensors"), save_file({}, folder / "x.safetensors")),
  "adapter": lambda folder: save_file({"x": np.zeros(1, "f4")}, folder / files.ADAPTER),
  "pickles": lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
  "no weights": lambda folder: (folder / SINGLE).unlink(),
  "no config": lambda folder: (folder / "config.json").unlink(),
  "no json": lambda folder: (folder / "config.json").write_text("{"),
}


@one_store
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_as_of_a_folder(room, tmp_path, name):
  folder = shutil.copytree(MODEL, tmp_path / "m")
  DAMAGE[name](folder)
  url, lines = f"{room}/{name.replace(' ', '-')}", []
  for where in (str(folder), send(folder, url)):
    with pytest.raises(UserError) as error:
      load(where)  # pyright: ignore[reportArgumentType]
    lines.append(re.sub(r"(damaged or truncated safetensors file) \(.*\)", r"\1", str(error.value)))
  assert lines[1] == re.sub(r" \(by its time, .* is newer\)", "", lines[0]).replace(str(folder), url)
  assert len(lines[1].splitlines()) == 1


@one_store
def test_a_header_whose_tensors_do_not_fill_the_file(room):
  for entries in (
    {"a": ("F32", [2], [0, 4])},
    {"a": ("F32", [1], [4, 8])},
    {"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [0, 4])},
    {"a": ("F32", [-1], [0, 4])},
    {"a": ("F72", [1], [0, 4])},
    {"a": ("F32", [1], [0, 4, 4])},
  ):
    header = json.dumps(
      {
        name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
        for name, entry in entries.items()
      }
    ).encode()
    path = BucketPath(room) / SINGLE
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(
      UserError, match=rf"^{path}: damaged or truncated safetensors file \(.*\); download"
    ) as error:
      weights.open_checkpoint(hub.local_weights(str(path)))
    assert len(str(error.value).splitlines()) == 1


def test_what_is_not_there(bucket, folder):
  for url in (f"{bucket}/none", f"{bucket.partition(':')[0]}://no-such-bucket-anywhere/m"):
    with pytest.raises(UserError, match=rf"^{url}: nothing is there; ") as error:
      open_source(url)
    assert len(str(error.value).splitlines()) == 1
  send(folder, f"{bucket}/m")
  with pytest.raises(UserError, match="is a file; give the folder"):
    open_source(f"{bucket}/m/config.json")
  put(folder / "config.json", BucketPath(f"{bucket}/run/checkpoints/100/state.json"))
  with pytest.raises(
    UserError, match=f"{bucket}/run/checkpoints/100: a checkpoint to resume from, not a model"
  ):
    open_source(f"{bucket}/run/checkpoints/100")
  checkpoint = opened(f"{bucket}/m")
  for path in BucketPath(f"{bucket}/m").glob("*.safetensors"):
    path.unlink()
  with pytest.raises(UserError, match=rf"{bucket}/m/model-0000\d-of-00002.safetensors: is no longer there"):
    checkpoint.read("mlp1.1.bias")


@pytest.mark.parametrize("at", ["ls", "cat_file", "info"])
def test_what_a_store_denies_names_url_and_remedy(bucket, monkeypatch, at):
  url = send(MODEL, f"{bucket}/m")
  pointers = opened(url).pointers if at == "info" else None

  def denied(*args, **kwargs):
    raise PermissionError("Access Denied")

  monkeypatch.setattr(remote.file_system(url), at, denied)
  with pytest.raises(UserError) as error:
    # After the load it is asked whether the files are still those that were read.
    ranges.check_unchanged(pointers) if pointers else opened(url)
  assert re.match(rf"{url}[\w/.]*: permission denied \(.*\); check the credentials", str(error.value))
  assert len(str(error.value).splitlines()) == 1


@one_store
def test_a_cache_that_cannot_be_written(room, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(UserError, match=r"/file/internvl_jax: cannot hold .*; set XDG_CACHE_HOME"):
    hub.local_folder(send(MODEL, f"{room}/m"))


@pytest.mark.parametrize("name", ["http://host/m", "gcs://bucket/m", "hf://org/name", "gs://", "s3:///m"])
def test_other_urls_are_refused(name):
  words = "(no checkpoint is read from |names no bucket; write )"
  for opened in (hub.local_folder, hub.local_weights):
    with pytest.raises(UserError, match=words + r"\w+://"):
      opened(name)
  config = TrainConfig()
  config.model.model_name_or_path = config.model.mlp_path = name
  found = [line for line in problems(config, "doctor") if re.search(words, line)]
  assert [line.partition("=")[0] for line in found] == ["model.model_name_or_path", "model.mlp_path"]


def test_settings_that_must_be_folders():
  config = TrainConfig()
  config.model.model_name_or_path = config.model.mlp_path = "gs://bucket/m"
  config.data.meta_path = "s3://bucket/meta.json"
  assert not problems(config, "doctor")
  config.runtime.compilation_cache_dir = config.training.logging_dir = "gs://bucket/x"
  assert not problems(config, "doctor")
  config.loader.cache_dir = "gs://bucket/x"
  (line,) = problems(config, "doctor")
  assert line.startswith(
    "loader.cache_dir='gs://bucket/x': must be a folder of this machine: what it holds is mapped"
  )
  config.loader.cache_dir = None
  config.runtime.compilation_cache_dir = config.training.logging_dir = "http://host/x"
  found = problems(config, "doctor")
  assert [line.partition("=")[0] for line in found] == [
    "training.logging_dir",
    "runtime.compilation_cache_dir",
  ]


@one_store
def test_messages_name_what_the_user_named(room):
  url = send(MODEL, f"{room}/m")
  here = hub.local_folder(url)
  assert str(UserError(f"{here / 'config.json'}: x")) == f"{url}/config.json: x"
  assert str(snapshots.url_of(here)) == url and snapshots.url_of(MODEL) is None
