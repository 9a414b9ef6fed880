"""A checkpoint is intact or not chosen: whatever befalls its files, the run goes on from the one before it."""

import json
import random
import resource
import shutil
import signal
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internvl_jax import digests
from internvl_jax.arguments import TrainingArguments
from internvl_jax.checkpoint import folders, manager
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.errors import UserError
from internvl_jax.hf import saving
from internvl_jax.outputs import check_output_dir, explained, newest_checkpoint
from internvl_jax.state import TrainState
from tests.support.harness import on_one_device
from tests.support.hosts import Job, history, make_world

METADATA = "_CHECKPOINT_METADATA"


def state_of(step):
  noise = np.random.default_rng(0).random((64, 33), np.float32)
  params = {"a.kernel": jnp.asarray(noise), "b": jnp.ones(5)}
  state = TrainState.create(params, optax.scale_by_adam(), on_one_device(params))
  return jax.tree.map(lambda leaf: leaf * step if leaf.ndim else leaf + step, state)


def save(folder, *steps, keep=None):
  writer = Checkpointer(folder, keep=keep)
  if newest_checkpoint(str(folder)) is not None:
    writer.restore(state_of(0))
  for step in steps:
    writer.save(state_of(step), loader={"next_step": step}, trainer={"log_history": [{"step": step}] * step})
  writer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  save(folder, 1, 2)
  return folder


@pytest.fixture
def out(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "out")
  return tmp_path / "out"


def assert_restores(folder, step):
  """All of the step's numbers, and no other's."""
  reader = Checkpointer(folder, keep=None)
  state, loader, trainer = reader.restore(state_of(0))
  reader.close()
  jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
  assert loader == {"next_step": step} and trainer == {"log_history": [{"step": step}] * step}


def told(caplog):
  """Our lines in the log since the last call."""
  lines = [record.getMessage() for record in caplog.records if "internvl_jax" in record.pathname]
  caplog.clear()
  return lines


def flip(data, rng):
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return data


def cut(data, rng):
  return data[: rng.randrange(len(data))]


def empty(data, rng):
  del data, rng
  return b""


def vanish(data, rng):
  del data, rng


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_random_damage_is_seen_and_named(out, caplog, times):
  """Of every file in turn: its bits, its length, its contents, its existence."""
  rng = random.Random(times)
  newest = out / "checkpoints/2"
  files = sorted(path for path in newest.rglob("*") if path.is_file())
  assert {path.relative_to(newest).parts[0] for path in files} >= {"state", "loader", "trainer", METADATA}
  assert newest / digests.FILE in files
  for i in range(times):
    path, damage = files[i % len(files)], rng.choice([flip, flip, flip, cut, cut, empty, vanish])
    was = path.read_bytes()
    now = damage(bytearray(was), rng)
    if now is None:
      path.unlink()
    else:
      path.write_bytes(now)
    assert_restores(out, 1)
    (line,) = told(caplog)
    assert line.startswith(f"{newest}: damaged ({path.relative_to(newest)}: "), (path, damage, line)
    path.write_bytes(was)
  assert_restores(out, 2)
  assert not told(caplog)


@pytest.mark.slow
def test_whole_runs_go_on_from_the_intact_one(tmp_path):
  """Whatever is damaged, they end as the run that nothing happened to, to the bit."""
  world, rng = make_world(tmp_path), random.Random(0)
  saving = ("training.save_strategy=steps", "training.save_steps=8", "training.max_steps=20")
  straight = Job(world, *saving, out="straight")
  assert straight.wait() == [0], straight.log()
  shutil.rmtree(straight.out / "checkpoints/20")
  kept = sorted(path for path in (straight.out / "checkpoints/16").rglob("*") if path.is_file())
  for i, file in enumerate(rng.sample(kept, 12)):
    out = tmp_path / f"damaged{i}"
    shutil.copytree(straight.out, out)
    path = out / file.relative_to(straight.out)
    damaged = rng.choice([flip, cut, vanish])(bytearray(path.read_bytes()), rng)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    job = Job(world, *saving, out=out.name)
    assert job.wait() == [0] and "Traceback" not in job.log(), job.log()
    assert f"checkpoints/16: damaged ({path.relative_to(out / 'checkpoints/16')}: " in job.log()
    assert "Resuming from the checkpoint of step 8" in job.log()
    assert history(out) == history(straight.out)
    assert (out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()


def test_where_none_is_intact_a_line_says_so(out):
  for step in (1, 2):
    (out / f"checkpoints/{step}/loader/metadata").write_text("")
  reader = Checkpointer(out, keep=None)
  with pytest.raises(UserError, match=r"none of the checkpoints \(of steps 2, 1\) is intact") as error:
    reader.restore(state_of(0))
  assert len(str(error.value).splitlines()) == 1


def as_of_an_earlier_version(path):
  (path / digests.FILE).unlink()
  metadata = json.loads((path / METADATA).read_text())
  del metadata["custom_metadata"]
  (path / METADATA).write_text(json.dumps(metadata))


def test_one_of_an_earlier_version_is_taken_and_that_is_said(out, caplog):
  as_of_an_earlier_version(out / "checkpoints/2")
  assert_restores(out, 2)
  (line,) = told(caplog)
  assert line.startswith(f"{out}/checkpoints/2: is of an earlier version, which wrote no digests")


@pytest.mark.parametrize(
  "name", ["loader/metadata", "trainer/metadata", "state/_METADATA", "state/manifest.ocdbt"]
)
def test_what_libraries_say_of_it_is_a_line(out, caplog, name):
  as_of_an_earlier_version(out / "checkpoints/2")
  path = out / "checkpoints/2" / name
  path.write_bytes(path.read_bytes()[:9])
  assert_restores(out, 1)
  (_, line) = told(caplog)
  assert line.startswith(f"{out}/checkpoints/2: damaged (cannot be read: ") and len(line.splitlines()) == 1


def test_a_disk_that_fails_after_the_check_is_a_line(out, monkeypatch):
  def fail(*args, **kwargs):
    raise ValueError("DATA_LOSS: Error reading\n[source locations]")

  monkeypatch.setattr(manager.Manager, "restore", fail)
  reader = Checkpointer(out, keep=None)
  with pytest.raises(
    UserError, match=r"checkpoints/2: cannot be read: DATA_LOSS: Error reading \[source"
  ) as error:
    reader.restore(state_of(0))
  assert len(str(error.value).splitlines()) == 1


def test_damage_is_left_where_it_is_until_its_step_is_saved_again(tmp_path):
  save(tmp_path, 1, 4)
  bad = tmp_path / "checkpoints/4/trainer/metadata"
  bad.write_text("{")
  # Neither does it keep steps before it from being saved, nor does it count among those that are kept.
  save(tmp_path, 2, 3, keep=2)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "4"]
  assert bad.read_text() == "{"
  assert_restores(tmp_path, 3)
  save(tmp_path, 4, keep=2)
  assert_restores(tmp_path, 4)


@pytest.mark.parametrize(
  ("lost", "newest"), [([METADATA], 2), ([digests.FILE], 2), ([METADATA, digests.FILE], 1), (["*"], 1)]
)
def test_all_agree_on_the_newest_that_is_complete(out, lost, newest):
  """And it is intact, or named before an older one is taken."""
  for name in lost:
    for path in (out / "checkpoints/2").glob(name):
      path.unlink() if path.is_file() else shutil.rmtree(path)
  reader = Checkpointer(out, keep=None)
  assert reader.latest_step == newest_checkpoint(str(out)) == newest
  reader.close()
  assert_restores(out, 1)


def test_what_is_left_of_the_only_checkpoint_is_not_deleted(out):
  """A run that has neither a model nor a complete checkpoint may begin anew, but not over a damaged one."""
  shutil.rmtree(out / "checkpoints/1")
  (out / "train_config.json").write_text("{}")
  for name in (METADATA, digests.FILE):
    (out / "checkpoints/2" / name).unlink()
  with pytest.raises(UserError, match="holds no complete checkpoint"):
    check_output_dir(TrainingArguments(output_dir=str(out)))


# --- Digests ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "d").mkdir()
  for name in ("a", "b c", "d/e"):
    (tmp_path / name).write_bytes(name.encode() * 1000)
  (tmp_path / "nothing").touch()
  digests.write(tmp_path, digests.of_files(tmp_path, digests.files_in(tmp_path)))
  return tmp_path


def test_digests_are_crc32_and_size(folder):
  """The check value of the CRC's definition."""
  (folder / "check").write_bytes(b"123456789")
  assert digests.of_files(folder, ["check"], sync=True) == {"check": ("cbf43926", 9)}
  assert digests.read(folder).keys() == {"a", "b c", "d/e", "nothing"}
  assert digests.find_damage(folder) == ""  # Of what was there.


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096, 100_001])
def test_pieces_make_the_digest_of_the_whole(tmp_path, monkeypatch, size):
  """Also where the last one is short."""
  data = random.Random(size).randbytes(size)
  (tmp_path / "x").write_bytes(data)
  monkeypatch.setattr(digests, "_PIECE", 4096)
  monkeypatch.setattr(digests, "_BLOCK", 1024)
  assert digests.of_files(tmp_path, ["x"]) == {"x": (f"{zlib.crc32(data):08x}", size)}


def test_the_file_of_digests_vouches_for_itself(folder):
  path = folder / digests.FILE
  text = path.read_bytes()
  for i in range(len(text)):
    for damaged in (text[:i] + bytes([text[i] ^ 1 << i % 8]) + text[i + 1 :], text[:i]):
      path.write_bytes(damaged)
      assert digests.read(folder) is None
  assert digests.find_damage(folder) == "digests.txt: not what was written"


def test_each_looks_at_its_share_and_together_they_look_at_all(folder):
  for name in ("a", "b c", "d/e"):
    path = folder / name
    was = path.read_bytes()
    path.write_bytes(b"?" + was[1:])
    found = [digests.find_damage(folder, part=part, parts=3) for part in range(3)]
    assert sorted(found) == ["", "", f"{name}: not the bytes that were written"]
    path.write_bytes(was[:-1])
    found = {digests.find_damage(folder, part=part, parts=3) for part in range(3)}
    assert found == {f"{name}: {len(was) - 1:,} bytes instead of {len(was):,}"}
    path.write_bytes(was)


def test_digests_of_other_processes_are_taken_over(tmp_path):
  """What another host wrote is not read again: here its digest is another one than the file has."""
  state = tmp_path / "state"
  (state / "ocdbt.process_1").mkdir(parents=True)
  for name in ("ocdbt.process_1/x", "_METADATA"):
    (state / name).write_text(name)
  digests.write(state, {"ocdbt.process_1/x": ("0" * 8, 17)}, "digests-process_1.txt")
  folders._write_digests(tmp_path)
  found = digests.read(tmp_path)
  assert found["state/ocdbt.process_1/x"] == ("0" * 8, 17)
  assert found["state/_METADATA"] == digests.of_files(state, ["_METADATA"])["_METADATA"]
  assert len(found) == 2 and not list(state.glob("digests*"))


# --- Models -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
  """No file may grow beyond 64 KiB."""
  limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, small_disk):
  """And no file that takes room: neither the one under way, nor those before it."""
  small, large = np.ones(100, "f4"), np.ones(2**15, "f4")
  saving.save(tmp_path, [("a", small)])
  was = (tmp_path / "model.safetensors").read_bytes()
  with (
    pytest.raises(UserError, match=r"the model could not be written \(file too large; .* free\); make room"),
    explained(tmp_path, "the model", lambda: "make room"),
  ):
    saving.save(tmp_path, [("a", small), ("b", large)], shard_bytes=small.nbytes)
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
  assert (tmp_path / "model.safetensors").read_bytes() == was


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (Exception("No space left on device (os error 28)"), UserError),  # What tokenizers raise.
    (OSError(122, "Disk quota exceeded"), UserError),
    (UserError("no space left for words"), UserError),
    (KeyError("a bug of ours"), KeyError),
  ],
)
def test_what_a_full_disk_is_taken_for(tmp_path, error, expected):
  with pytest.raises(expected) as raised, explained(tmp_path, "the model", lambda: "make room"):
    raise error
  assert (raised.value is error) == (expected is KeyError or isinstance(error, UserError))
