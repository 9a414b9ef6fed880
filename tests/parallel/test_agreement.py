"""Processes of a run that have other settings, files or versions than the rest end it, in words that say what differs."""

import importlib.metadata
import json
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import consistency
from internvl_jax.config import FIELDS, PER_HOST, TrainConfig, shared_settings
from internvl_jax.hf.model import open_source
from internvl_jax.parallel.agreement import Said, difference
from internvl_jax.parallel.replicas import checksums
from internvl_jax.parallel.replicas import difference as replicas_difference
from tests.support.hosts import Job, make_world
from tests.support.toy import CURVE


def test_a_difference_is_told_with_values_and_hosts():
  same = {"training.learning_rate": 1e-3, "training.seed": 1}
  assert difference([Said("a", same), Said("b", dict(same))]) is None
  line = difference([Said("a", same), Said("b", same | {"training.learning_rate": 1e-5}), Said("c", same)])
  assert line.startswith(
    "the processes of this run have different settings or files: training.learning_rate is 0.001 on a (process 0), c "
    "(process 2), 1e-05 on b (process 1); start the same command"
  )
  line = difference([Said("a", {}), Said("b", same)])
  assert "training.seed is missing on a (process 0), 1 on b (process 1)" in line


def test_many_hosts_and_many_differences_are_one_short_line():
  everyone = [Said(f"h{i}", {f"f{k}": "x" * 500 for k in range(50)} | {"odd": i == 40}) for i in range(64)]
  line = difference(everyone)
  assert "odd is false on h0 (process 0), h1 (process 1), h2 (process 2), h3 (process 3) and 59 more" in line
  assert "true on h40 (process 40)" in line and len(line) < 400
  everyone = [Said(f"h{i}", {f"f{k}": f"{i}{'x' * 500}" for k in range(50)}) for i in range(64)]
  line = difference(everyone)
  assert (
    "\n" not in line and len(line) < 2000 and "and 47 more differ" in line and "and 61 more values" in line
  )


def test_every_field_is_compared_but_those_that_hosts_may_set():
  assert PER_HOST.keys() <= FIELDS.keys()
  before = shared_settings(TrainConfig())
  assert before.keys() == FIELDS.keys() - PER_HOST.keys()
  config = TrainConfig()
  config.loader.cache_dir, config.training.dataloader_num_workers = "/mine", 3
  assert shared_settings(config) == before
  config.training.seed, config.lora.targets = 7, ("q_proj",)
  changed = {path for path, value in shared_settings(config).items() if value != before[path]}
  assert changed == {"training.seed", "lora.targets"}
  config.data.meta_path = "https://me:secret@host/meta.json?token=abc"
  assert "secret" not in json.dumps(shared_settings(config)) and "abc" not in json.dumps(
    shared_settings(config)
  )


def test_versions_are_compared(monkeypatch):
  before = consistency.programs()
  assert before == consistency.programs() and before["the version of jax"] == importlib.metadata.version(
    "jax"
  )
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
  assert difference([Said("a", before), Said("b", consistency.programs())]).count("the version of") > 3


@pytest.fixture
def model(tmp_path):
  return shutil.copytree(CURVE / "init", tmp_path / "model", copy_function=shutil.copyfile)


def one_number(folder):
  tensors = load_file(folder / "model.safetensors")
  name = sorted(tensors)[5]
  tensors[name] = tensors[name].copy()
  tensors[name].flat[0] += np.float32(1)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_setting(folder):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float64"}))


@pytest.mark.parametrize(
  ("change", "name"),
  [(one_number, "the content of model/model.safetensors"), (one_setting, "the model's config.json")],
)
def test_weights_are_compared(model, change, name):
  before = consistency.weights(open_source(model))
  assert before == consistency.weights(open_source(model))
  change(model)
  line = difference([Said("a", before), Said("b", consistency.weights(open_source(model)))])
  assert name in line and "more differ" not in line


def test_of_large_files_parts_are_compared(tmp_path, monkeypatch):
  monkeypatch.setattr(consistency, "WHOLE_BYTES", 1000)
  monkeypatch.setattr(consistency, "SAMPLE_BYTES", 100)
  path = tmp_path / "a.safetensors"
  source = SimpleNamespace(raw={}, checkpoint=SimpleNamespace(where={"x": path}))
  content = bytearray((100).to_bytes(8, "little") + bytes(99_992))
  digests = set()
  for change in (None, 50, 99_999, 5 * (100_000 - 100) // 63):  # nothing, the header, the end, a sample
    changed = content[:]
    if change is not None:
      changed[change] = 1
    path.write_bytes(changed)
    digests.add(consistency.weights(source)[f"the content of {tmp_path.name}/a.safetensors"])
  assert len(digests) == 4


def replicated(change):
  """A parameter in two halves, each on two processes of two devices, of which one may hold another number."""
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  sharding = jax.NamedSharding(jax.sharding.Mesh(devices, ("data", "fsdp")), jax.P("fsdp"))
  whole = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
  shards = []
  for i, device in enumerate(devices.flat):
    half = whole[2 * (i % 2) :][:2].copy()
    half[1, 2, 1] += i == change
    shards.append(jax.device_put(half, device))
  return jax.make_array_from_single_device_arrays(whole.shape, sharding, shards)


@pytest.mark.parametrize("change", [None, 0, 3])
def test_what_several_processes_have_read_is_compared(change):
  first = jax.devices()[0].id
  alone = jax.device_put(np.ones(3, np.float32), jax.devices()[0])
  params = {"a": replicated(change), "b": replicated(None).astype(jax.numpy.bfloat16), "c": alone}
  said = [(f"h{i}", checksums(params, i, lambda device: (device.id - first) // 2)) for i in range(2)]
  # What one process alone holds is nobody else's.
  assert list(said[0][1]) == ["a[0:2, :, :]", "a[2:4, :, :]", "b[0:2, :, :]", "b[2:4, :, :]"]
  line = replicas_difference(said, "my/model")
  if change is None:
    assert line is None
  else:
    half = "a[0:2, :, :]" if change == 0 else "a[2:4, :, :]"
    assert line is not None and f"the checksum of {half} is " in line and "more differ" not in line
    assert "on h0 (process 0), " in line and " on h1 (process 1); give all hosts" in line


def ended(job):
  """The error of each process, once all have ended in time."""
  start = time.monotonic()
  codes = job.wait(120)
  logs = [job.log(i) for i in range(len(codes))]
  assert 0 not in codes and time.monotonic() - start < 60 and "Traceback" not in "".join(logs), logs
  return [[line for line in log.splitlines() if line.startswith("error:")] for log in logs]


def test_processes_with_other_settings_end_together(tmp_path):
  world = make_world(tmp_path / "world")
  job = Job(world, processes=2, only={1: ("training.learning_rate=1e-5", "training.seed=7")})
  errors = ended(job)
  assert errors[0] == errors[1] and len(errors[0]) == 1
  assert "training.learning_rate is 0.001 on " in errors[0][0] and ", 1e-05 on " in errors[0][0]
  assert "training.seed is 42 on " in errors[0][0] and "(process 1)" in errors[0][0]
  assert not job.out.exists()


def test_processes_that_see_other_files_end_together(tmp_path):
  """Under one path, as on disks of their own: an answer and a token are not the same."""
  worlds = [make_world(tmp_path / name) for name in ("one", "other")]
  lines = (worlds[1] / "data.jsonl").read_text()
  (worlds[1] / "data.jsonl").write_text(lines.replace('"circle', '"square', 1))
  tokenizer = worlds[1] / "model/tokenizer.json"
  content = json.loads(tokenizer.read_text())
  vocabulary = content["model"]["vocab"]
  first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  tokenizer.write_text(json.dumps(content))
  here = ("data.meta_path=meta.json", "model.model_name_or_path=model")
  job = Job(worlds[0], *here, processes=2, folders=tuple(worlds))
  errors = ended(job)
  assert errors[0] == errors[1] and len(errors[0]) == 1
  assert "the tokenizer is " in errors[0][0]
  assert "the content of data.jsonl (dataset 'shapes') is \"30 lines, digest " in errors[0][0]
  assert not job.out.exists()
