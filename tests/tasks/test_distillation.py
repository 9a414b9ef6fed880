"""A teacher's log-probabilities: on disk, in batches, its pass when it is killed, and teachers that do not suit."""

import contextlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.config import TrainConfig
from internvl_jax.config_paths import path_problems
from internvl_jax.errors import UserError
from internvl_jax.losses.distillation import TopK
from internvl_jax.parallel import mesh as meshes
from internvl_jax.storage.paths import BucketPath, path_of
from internvl_jax.tasks.distillation import teacher as teachers
from internvl_jax.tasks.distillation.cache import SAMPLE, Progress, TeacherLogProbs, token_dtype
from internvl_jax.tasks.distillation.data import DistillationData, SampleTokens, TeacherData
from internvl_jax.tasks.distillation.settings import SETTINGS
from internvl_jax.tasks.distillation.teacher import Pass, check_tokens
from internvl_jax.tasks.precomputed import KeyedFolder
from internvl_jax.watchdog import Watchdog
from tests.support import pairs
from tests.support.buckets import bucket, one_store, store  # noqa: F401

K = 3


def known_in(folder, top_k=K, cache=None):
  kept = KeyedFolder(folder=folder, setting="distillation.cache_dir", model="teacher")
  return TeacherLogProbs(kept, top_k, cache)


# --- On disk ------------------------------------------------------------------------------------------------


def tokens_of(*ids):
  out = np.zeros(len(ids), token_dtype(K))
  out["ids"] = np.array(ids)[:, None] + np.arange(K)
  return out


@pytest.fixture
def written(tmp_path):
  return write_all(known_in(tmp_path / "logps"))


def write_all(known):
  """What two hosts write of five samples, one of them without targets, and one that nobody could read."""
  known.begin({"samples": 5})
  known.write(0, 0, [SampleTokens(1, 2, 11), SampleTokens(0, 0, 10)], [tokens_of(10, 20)])
  known.write(0, 1, [SampleTokens(4, 1, 14)], [tokens_of(30)])
  known.write(8, 0, [SampleTokens(2, 2, 12)], [tokens_of(40), tokens_of(50)])
  known.write(8, 1, [], [])
  known.finish(Progress(steps=16, firsts=[0, 8], feeders=2, loader={}), 5)
  return known


def test_samples_are_found_where_hosts_wrote_them(written):
  check_found(written)
  with pytest.raises(UserError, match="knows nothing of sample 3 of the mixture: it could not be read"):
    written([SampleTokens(3, 1, 13)])
  with pytest.raises(
    UserError, match=r"sample 1 of the mixture had 2 supervised tokens .* and has 2 others now"
  ):
    written([SampleTokens(1, 2, 12)])


@one_store
def test_parts_of_a_bucket_are_copied_once(bucket, tmp_path, monkeypatch):  # noqa: F811
  folder = path_of(bucket) / "logps"
  check_found(write_all(known_in(folder, cache=str(tmp_path))))
  copies = sorted((tmp_path / "teacher").iterdir())
  # The index, what each of four parts is of, and the three that were looked up.
  assert len(copies) == 1 + 4 + 3
  monkeypatch.setattr(BucketPath, "read_bytes", pytest.fail)
  again = known_in(folder, cache=str(tmp_path))
  monkeypatch.setattr(again, "_names", [])
  assert again._load("samples.npy", SAMPLE).shape == (5,)


def check_found(written):
  assert written.is_complete({"samples": 5})
  written.open(5)
  found = written(
    [SampleTokens(2, 2, 12), SampleTokens(0, 0, 10), SampleTokens(4, 1, 14), SampleTokens(1, 2, 11)]
  )
  np.testing.assert_array_equal(found, tokens_of(40, 50, 30, 10, 20))


def test_what_is_damaged_is_a_line(written):
  with pytest.raises(UserError, match=r"samples.npy: has 5 samples, expected 6; delete the folder"):
    written.open(6)
  other = known_in(written.folder, top_k=4)
  other.open(5)
  with pytest.raises(UserError, match=r"part-00000000-0000.npy: has other numbers than these; delete"):
    other([SampleTokens(1, 2, 11)])
  (written.folder / "part-00000000-0001.npy").write_bytes(b"\x93NUMPY")
  written.open(5)
  with pytest.raises(UserError, match=r"part-00000000-0001.npy: damaged or missing .*; delete the folder"):
    written([SampleTokens(4, 1, 14)])
  with pytest.raises(UserError, match="of another teacher: samples is 5 there and 7 here"):
    written.is_complete({"samples": 7})
  (written.folder / "parts.json").write_text("{")
  with pytest.raises(UserError, match=r"parts.json: damaged"):
    written.open(5)


def test_a_disk_without_room_is_seen_after_the_first_part(written):
  with pytest.raises(UserError, match=r"are still to come, and .* GiB are free; name another folder"):
    written.check_room(2**40, 2**20)


# --- The pass -----------------------------------------------------------------------------------------------


class Stub:
  """A teacher whose probabilities are known from a token's id; it is killed after so many batches."""

  name, top_k = "stub", K

  def __init__(self, batches=1 << 30):
    self.mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    self.watchdog = Watchdog("here", 600)
    self.left = batches

  def load(self):
    return {}

  def program(self, params, rows):
    del params
    self.left -= 1
    if self.left < 0:
      raise KeyboardInterrupt
    ids = rows.input_ids[..., None] + jnp.arange(K)
    return TopK(ids, -ids.astype(jnp.float32), -rows.positions.astype(jnp.float32))


def reader(meta, tokenizer, task, **settings):
  """A loader of conversations about the pairs' pictures, one row a step."""
  settings = {"gradient_accumulation_steps": 1, "max_steps": 1 << 20} | settings
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pairs, "DATA", task)
    return pairs.make_loader(meta, tokenizer, preference=False, loader={"shuffle": False}, **settings)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
  """Ten lines of many lengths."""
  folder = tmp_path_factory.mktemp("conversations")
  lines = []
  for i in range(10):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red " * (1 + 3 * i % 7)}]
    lines.append(json.dumps({"id": i, "conversations": turns}) + "\n")
  (folder / "lines.jsonl").write_text("".join(lines))
  (folder / "meta.json").write_text(json.dumps({"lines": {"root": "", "annotation": "lines.jsonl"}}))
  return folder / "meta.json"


def asked(folder, meta, tokenizer, **stub) -> TeacherLogProbs:
  known = known_in(folder)
  Pass(teacher=Stub(**stub), known=known, make_loader=lambda: reader(meta, tokenizer, TeacherData())).run(
    {"samples": 10}
  )
  known.open(10)
  return known


def test_a_pass_that_is_killed_goes_on_and_batches_have_what_it_says(
  tmp_path, conversations, tokenizer, monkeypatch
):
  monkeypatch.setattr(teachers, "PART_STEPS", 2)
  whole = asked(tmp_path / "whole", conversations, tokenizer)
  with pytest.raises(KeyboardInterrupt):
    asked(tmp_path / "killed", conversations, tokenizer, batches=5)
  assert json.loads((tmp_path / "killed" / "progress.json").read_text())["steps"] == 4
  # Of ten batches, four were written.
  asked(tmp_path / "killed", conversations, tokenizer, batches=6)
  names = sorted(path.name for path in whole.folder.iterdir())
  assert len(names) == 2 * 5 + 3 and names == sorted(path.name for path in (tmp_path / "killed").iterdir())
  for name in names:
    assert (tmp_path / "killed" / name).read_bytes() == (whole.folder / name).read_bytes(), name

  # Two rows of several samples each.
  task = DistillationData(top_k=K, known=whole)
  packed = {"use_packed_ds": True, "max_packed_tokens": 1600, "num_images_expected": 1, "strict_mode": False}
  with contextlib.closing(
    reader(conversations, tokenizer, task, data=packed, per_device_train_batch_size=2)
  ) as loader:
    batch = next(loader)
  rows = batch.rows
  real = rows.targets != IGNORE_INDEX
  assert rows.segment_ids.max() > 2 and real.sum() > 10
  np.testing.assert_array_equal(batch.ids[real], rows.input_ids[real][:, None] + np.arange(K))
  np.testing.assert_array_equal(batch.logps[real], -batch.ids[real].astype(np.float16))
  np.testing.assert_array_equal(batch.tail[real], -rows.positions[real].astype(np.float32))
  assert not batch.ids[~real].any()


# --- Teachers that do not suit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("theirs", "said"),
  [
    ({"a": 0, "c": 1, "b": 2}, "token 1 is 'c', but of the model that trains, token 1 is 'b'"),
    ({"a": 0}, "there is no token 1, but of the model that trains, token 1 is 'b'"),
    ({"a": 0, "b": 1, "c": 2, "d": 3}, "token 3 is 'd', but of the model that trains, there is no token 3"),
  ],
)
def test_another_tokenizer_is_refused_by_the_first_token_that_differs(tmp_path, monkeypatch, theirs, said):
  monkeypatch.setattr(teachers, "base_folder", lambda name: tmp_path)
  tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 2})
  context = SimpleNamespace(tokenizer=tokenizer, source=SimpleNamespace(folder=tmp_path))
  assert check_tokens("T", tokenizer, context) == 3
  with pytest.raises(UserError, match=f"distillation.teacher='T': {said}; name a teacher"):
    check_tokens("T", SimpleNamespace(get_vocab=lambda: theirs), context)


def test_another_size_of_tiles_is_refused():
  def source(tokens, side):
    return SimpleNamespace(
      config=SimpleNamespace(tokens_per_tile=tokens, vision=SimpleNamespace(image_size=side))
    )

  context = SimpleNamespace(source=source(256, 448))
  teachers._check_tiles("T", source(256, 448), context)
  with pytest.raises(UserError, match="has 64 image tokens a tile, and the model that trains has 256"):
    teachers._check_tiles("T", source(64, 224), context)
  with pytest.raises(UserError, match="has 224 pixels a tile's side"):
    teachers._check_tiles("T", source(256, 224), context)


def test_settings_that_contradict_themselves_or_name_nothing():
  config = TrainConfig()
  config.distillation.teacher = "./nowhere"
  found = [line for line in path_problems(config, "train") if "distillation" in line]
  assert found == [
    "distillation.teacher='./nowhere': no such folder; give a checkpoint's folder or its hub id, org/name"
  ]
  # Planning needs no teacher.
  assert not [line for line in path_problems(config, "plan") if "distillation" in line]
  assert list(SETTINGS.problems(config)) == []
  config.preference.loss_type = "sigmoid"
  (line,) = SETTINGS.problems(config)
  assert "distillation.teacher='./nowhere' beside preference.loss_type='sigmoid'" in line
