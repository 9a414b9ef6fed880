"""Whole runs of preference optimization: three ways to hold the reference, resume, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax.errors import UserError
from internvl_jax.tasks.preference.reference import ReferenceLogProbs
from tests.support.toy import CURVE, run_training

QUESTIONS = ("What colour is it?", "What is this?", "Describe the image.", "Is it large?")
ANSWERS = ("red", "a small green square", "yes", "nothing at all", "blue and white", "no")
MPO = ("preference.loss_type=sigmoid,bco_pair", "preference.sigmoid_loss_weight=0.8")
MPO += (
  "preference.bco_pair_loss_weight=0.2",
  "preference.rpo_alpha=1.0",
  "training.gradient_accumulation_steps=1",
)
MPO += ("training.per_device_train_batch_size=4", "training.max_steps=4", "training.learning_rate=2e-3")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """A mixture of pairs about the curve's images, some of them of text alone."""
  folder = tmp_path_factory.mktemp("pairs")
  recorded = json.loads((CURVE / "data/meta.json").read_text())
  (spec,) = recorded.values()
  lines = [json.loads(line) for line in (CURVE / "data" / spec["annotation"]).read_text().splitlines()]
  images = [line["image"] for line in lines if isinstance(line.get("image"), str)]
  rng = np.random.default_rng(0)
  with (folder / "pairs.jsonl").open("w") as file:
    for i in range(24):
      chosen, rejected = rng.choice(ANSWERS, 2, replace=False)
      line = {"question": QUESTIONS[i % 4], "chosen": str(chosen), "rejected": str(rejected)}
      file.write(json.dumps({"image": images[i % len(images)], **line} if i % 5 else line) + "\n")
  meta = {
    "pairs": {"root": str(CURVE / "data" / spec["root"]), "annotation": "pairs.jsonl", "repeat_time": 1}
  }
  (folder / "meta.json").write_text(json.dumps(meta))
  return folder / "meta.json"


def run(folder, pairs, name, *overrides, ok=True, **options):
  done = run_training(folder, folder / name, *MPO, f"data.meta_path={pairs}", *overrides, **options)
  assert (done.returncode == 0) == ok, done.stderr[-4000:]
  return done


def history(folder, name):
  return json.loads((folder / name / "trainer_state.json").read_text())["log_history"]


TERMS = (
  "loss",
  "grad_norm",
  "losses/sigmoid",
  "losses/bco_pair",
  "nll_loss",
  "logps/chosen",
  "logps/rejected",
)
TERMS += ("rewards/chosen", "rewards/rejected", "rewards/margins")


def assert_same_history(found, expected):
  assert len(found) == len(expected)
  for ours, theirs in zip(found, expected, strict=True):
    for name in TERMS:
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


SAVES = ("training.save_steps=2", "training.save_strategy=steps")
CACHE = "preference.precompute_reference=True"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pairs):
  """Two whole runs, with their checkpoints: (folder, what the one says whose reference is in memory, the cached)."""
  folder = tmp_path_factory.mktemp("finished")
  memory = run(folder, pairs, "memory", *SAVES, f"preference.eval_meta_path={pairs}")
  return folder, memory.stderr, run(folder, pairs, "cached", *SAVES, CACHE).stderr


def test_a_run_and_its_cache(finished):
  folder, memory, cached = finished
  found = history(folder, "memory")
  assert "Policy and reference agree: DPO's loss on the first batch is 0.693147" in memory
  np.testing.assert_allclose(found[0]["losses/sigmoid"], np.log(2), atol=1e-6)
  np.testing.assert_allclose(found[0]["rewards/margins"], 0, atol=1e-5)
  assert found[-1]["loss"] < found[0]["loss"] and abs(found[-1]["rewards/margins"]) > 1e-3
  scores = json.loads((folder / "memory" / "preference_results.json").read_text())
  assert scores["eval_pairs"] == 24 and scores["eval_rewards/margins"] > 0
  assert (folder / "memory" / "model.safetensors").is_file()

  assert "Reference log-probabilities of 24 pairs: written to" in cached
  assert_same_history(history(folder, "cached"), found)


def test_a_stopped_run_goes_on_with_its_running_mean(tmp_path, finished, pairs):
  folder, _, _ = finished
  shutil.copytree(folder / "cached", tmp_path / "half")
  shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
  done = run(tmp_path, pairs, "half", *SAVES, CACHE)
  assert "Resuming from the checkpoint of step 2" in done.stderr
  assert "Reference log-probabilities: those in" in done.stderr
  for ours, theirs in zip(history(tmp_path, "half"), history(folder, "cached"), strict=True):
    assert {name: ours[name] for name in TERMS} == {name: theirs[name] for name in TERMS}


def test_a_stale_cache_is_refused(tmp_path, finished):
  key = json.loads((finished[0] / "cached" / "reference_logps" / "key.json").read_text())
  assert set(key) == {"checkpoint", "model", "data", "dtype", "samples"}
  stale = ReferenceLogProbs(cache(tmp_path / "logps", key={**key, "checkpoint": "0123", "data": "4567"}))
  said = r"of another reference: checkpoint is 0123 there and .*\(checkpoint, data differ\)"
  with pytest.raises(UserError, match=said):
    stale.open_or_make(key, pytest.fail)


def cache(folder, samples=24, key=None):
  """A folder of log-probabilities, whose file and key may be anything."""
  folder.mkdir(exist_ok=True)
  key = {"checkpoint": "0", "samples": 24} if key is None else key
  (folder / "key.json").write_text(key if isinstance(key, str) else json.dumps(key))
  np.save(folder / "logps.npy", np.zeros((samples, 2), np.float32))
  return folder


def test_a_damaged_cache_is_a_line(tmp_path):
  key = {"checkpoint": "0", "samples": 24}
  opened = ReferenceLogProbs(cache(tmp_path / "good"))
  opened.open_or_make(key, pytest.fail)
  assert opened(np.array([3, 5])).shape == (2, 2)
  with pytest.raises(UserError, match=r"key.json: damaged .*; delete the folder"):
    ReferenceLogProbs(cache(tmp_path / "key", key="{")).open_or_make(key, pytest.fail)
  with pytest.raises(UserError, match=r"logps.npy: has the shape \(3, 2\), expected \(24, 2\); delete"):
    ReferenceLogProbs(cache(tmp_path / "short", samples=3)).open_or_make(key, pytest.fail)
  cut = cache(tmp_path / "cut") / "logps.npy"
  cut.write_bytes(cut.read_bytes()[:150])
  with pytest.raises(UserError, match=r"logps.npy: damaged or missing .*; delete the folder"):
    ReferenceLogProbs(cut.parent).open_or_make(key, pytest.fail)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="is a file; name a folder"):
    ReferenceLogProbs(tmp_path / "file").open_or_make(key, pytest.fail)


def test_a_run_goes_on_with_the_reference_that_it_began_with(tmp_path, finished, pairs):
  shutil.copytree(finished[0] / "memory", tmp_path / "out")
  shutil.rmtree(tmp_path / "out" / "checkpoints" / "4")
  other = tmp_path / "other"
  shutil.copytree(CURVE / "init", other)
  weights = load_file(other / "model.safetensors")
  save_file(
    {name: 1.05 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"}
  )
  done = run(tmp_path, pairs, "out", *SAVES, f"model.model_name_or_path={other}", ok=False)
  assert (
    "reference.json: this run's reference policy had the checksum" in done.stderr.strip().splitlines()[-1]
  )
  # What was there says what it said.
  assert json.loads((tmp_path / "out" / "train_config.json").read_text())["model"][
    "model_name_or_path"
  ] != str(other)


@pytest.mark.slow
def test_a_checkpoint_becomes_a_model_by_a_run_without_steps(tmp_path, finished, pairs):
  shutil.copytree(finished[0] / "memory", tmp_path / "out")
  shutil.copytree(tmp_path / "out" / "checkpoints" / "2", tmp_path / "elsewhere" / "checkpoints" / "2")
  done = run(tmp_path, pairs, "elsewhere", *SAVES, "training.max_steps=2")
  assert "Resuming from the checkpoint of step 2" in done.stderr
  halfway, final = (load_file(tmp_path / name / "model.safetensors") for name in ("elsewhere", "out"))
  start = load_file(CURVE / "init/model.safetensors")
  name = "language_model.model.layers.0.mlp.gate_proj.weight"
  assert 0 < np.abs(halfway[name] - start[name]).max() < np.abs(final[name] - start[name]).max()
  # And not the other way round.
  done = run(tmp_path, pairs, "out", *SAVES, "training.max_steps=2", ok=False)
  assert "is of step 4, but the run is to end after step 2 (training.max_steps=2" in done.stderr


def test_a_cache_of_other_numbers_is_seen_at_the_start(tmp_path, finished, pairs):
  folder = tmp_path / "reference_logps"
  shutil.copytree(finished[0] / "cached" / "reference_logps", folder)
  np.save(folder / "logps.npy", np.load(folder / "logps.npy") - 0.5)
  done = run(tmp_path, pairs, "again", CACHE, f"preference.reference_cache_dir={folder}", ok=False)
  assert "the policy is not the reference before the first step" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_adapters_switched_off_and_a_second_set_of_weights(tmp_path, pairs):
  lora = (
    "model.use_llm_lora=4",
    "model.freeze_llm=True",
    "model.freeze_mlp=True",
    "model.freeze_backbone=True",
  )
  lora += ("lora.dropout=0.0", "training.learning_rate=2e-2")
  run(tmp_path, pairs, "off", *lora)
  run(tmp_path, pairs, "cached", *lora, CACHE)
  assert_same_history(history(tmp_path, "cached"), history(tmp_path, "off"))
  assert abs(history(tmp_path, "off")[-1]["rewards/margins"]) > 1e-3


@pytest.mark.slow
def test_on_a_mesh(tmp_path, pairs):
  """Pairs, their reference in memory, over tokens and heads of four devices."""
  run(tmp_path, pairs, "one")
  run(tmp_path, pairs, "four", "mesh.sequence=2", "mesh.tensor=2", devices=4)
  assert_same_history(history(tmp_path, "four"), history(tmp_path, "one"))


@pytest.mark.slow
def test_packed_rows_and_their_cache(tmp_path, pairs):
  """Several pairs a row, scored in other rows than they are trained in."""
  packed = ("data.use_packed_ds=True", "data.max_packed_tokens=1024", "data.num_images_expected=24")
  packed += ("training.per_device_train_batch_size=1",)
  run(tmp_path, pairs, "memory", *packed)
  run(tmp_path, pairs, "cached", *packed, CACHE)
  assert_same_history(history(tmp_path, "cached"), history(tmp_path, "memory"))
