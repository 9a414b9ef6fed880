"""Packed rows: the same samples and numbers as unpacked ones, each once, and exactly resumed."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import TokenBatch
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.schedule import packing
from internvl_jax.data.where import DataError
from internvl_jax.hf.model import open_source
from internvl_jax.models.internvl import Execution
from internvl_jax.tasks.sft.objective import SupervisedFineTuning
from tests.support.data_toys import arguments, resumed, turns, write_jsonl
from tests.support.toy import CURVE

P = 4


def write_mixture(folder, count=30):
  """Texts, one image, several images, and gifs, of many lengths."""
  rng = np.random.default_rng(0)

  def picture(name, frames=1):
    width, height = (int(n) for n in rng.integers(8, 60, 2))
    pictures = [
      Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)
    ]
    pictures[0].save(
      folder / name, save_all=frames > 1, **({"append_images": pictures[1:]} if frames > 1 else {})
    )
    return name

  records = []
  for i in range(count):
    answer = "red " * int(rng.integers(1, 30))
    kind = i % 4
    if kind == 0:
      record = {"conversations": turns(f"what is number {i}?", answer)}
    elif kind == 1:
      record = {"image": picture(f"{i}.png"), "conversations": turns(f"<image>\nwhat is number {i}?", answer)}
    elif kind == 2:
      names = [picture(f"{i}_{k}.png") for k in range(2)]
      record = {"image": names, "conversations": turns(f"<image> and <image> {i}", answer, "more <b>?", "no")}
    else:
      record = {"video": picture(f"{i}.gif", frames=9), "conversations": turns(f"who is {i}?", answer)}
    records.append({"id": i, **record})
  write_jsonl(folder / "all.jsonl", records)
  (folder / "meta.json").write_text(json.dumps({"all": {"root": "", "annotation": "all.jsonl"}}))
  return folder / "meta.json"


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("mixture"))


PACKED = {"use_packed_ds": True, "max_packed_tokens": 640, "num_images_expected": 24, "strict_mode": False}
FRAMES = {"min_num_frame": 2, "max_num_frame": 6}


def make_loader(meta, tokenizer, *, state=None, data=None, loader=None, side=16, **training):
  settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5} | training
  opened = TrainLoader(
    arguments(meta, **FRAMES | {"force_image_size": side} | (data or {})),
    TrainingArguments(**{"disable_tqdm": True} | settings),
    LoaderConfig(**{"cache_dir": str(meta.parent / "cache")} | (loader or {})),
    tokenizer,
    tokens_per_tile=P,
  )
  return resumed(opened, state)


def samples_of(batch):
  """The token ids of all segments of a batch, row by row."""
  found = []
  for ids, segments in zip(
    batch.input_ids.reshape(-1, batch.input_ids.shape[-1]),
    batch.segment_ids.reshape(-1, batch.segment_ids.shape[-1]),
    strict=True,
  ):
    found += [ids[segments == number].tobytes() for number in range(1, segments.max() + 1)]
  return found


def test_every_sample_stands_once_in_an_epoch_and_its_size_was_known(meta, tokenizer):
  loader = make_loader(meta, tokenizer, data=PACKED, max_steps=-1, num_train_epochs=1)
  assert loader.schedule.rows_per_epoch < 15 and loader.total_steps == -(-loader.schedule.rows_per_epoch // 2)
  wanted = Mixture(arguments(meta, **FRAMES), tokenizer, tokens_per_tile=P, seed=42)
  wanted.index_sizes(meta.parent / "cache", workers=0, quiet=True)
  decoded = [wanted.decode(0, i) for i in range(30)]
  sizes = wanted.size_of(np.arange(30))
  assert sizes.tolist() == [[len(s.input_ids), len(s.tiles)] for s in decoded]
  batches = list(loader)
  found = [sample for batch in batches for sample in samples_of(batch)]
  assert {sample.input_ids.tobytes() for sample in decoded} <= set(found)
  assert all(batch.segment_ids.max() > 1 for batch in batches[:-1])
  assert loader.counters()["all"]["samples"] == len(found)
  loader.close()


def test_resume_is_bit_identical_for_any_number_of_workers(meta, tokenizer):
  straight = make_loader(meta, tokenizer, data=PACKED)
  expected = list(straight)
  batches, state = [], None
  for workers, steps in ((2, 1), (0, 2), (1, 2)):
    loader = make_loader(meta, tokenizer, data=PACKED, dataloader_num_workers=workers, state=state)
    batches += [next(loader) for _ in range(steps)]
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
  assert len(json.dumps(state)) < 10_000
  for batch, other in zip(batches, expected, strict=True):
    for array, wanted in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, wanted)
  assert state == straight.get_state()
  with pytest.raises(DataError, match="cannot go on with the same batches: packing state of other settings"):
    make_loader(meta, tokenizer, data={**PACKED, "num_images_expected": 30}, state=state)


def test_budgets_hold_and_strict_mode_pads_tiles(meta, tokenizer):
  loader = make_loader(meta, tokenizer, data={**PACKED, "strict_mode": True}, per_device_train_batch_size=2)
  for batch in loader:
    assert batch.tiles.shape[:3] == (2, 1, 48)
    assert batch.input_ids.shape[-1] <= 640
  loader.close()


@pytest.fixture(scope="module")
def loss_and_gradients():
  """A batch's loss and gradients of a small model; compiled once for batches of one shape."""
  source = open_source(CURVE / "init")
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, place))
  objective = SupervisedFineTuning(
    model=source.model, how=Execution(), normalize_type="imagenet", fused_loss=True, all_gather=True
  )

  @jax.jit
  @jax.value_and_grad
  def compute(params, batch):
    micro, weights = jax.tree.map(lambda leaf: leaf[0], (batch, objective.weights(batch)))
    return objective.loss(params, micro, weights, jax.random.key(0), {})[0]

  def flat(batch):
    loss, gradients = compute(params, batch)
    return loss, np.concatenate([np.ravel(gradients[path]) for path in params])

  return flat


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_packed_equals_unpacked(meta, tokenizer, loss_and_gradients, reduction):
  """The same samples give the same loss and gradients, whether they share a row or not."""
  order = {"shuffle": False}
  packed = make_loader(
    meta,
    tokenizer,
    data=PACKED | {"loss_reduction": reduction},
    loader=order,
    side=56,
    gradient_accumulation_steps=1,
    per_device_train_batch_size=2,
  )
  batch = next(packed)
  samples = samples_of(batch)
  assert len(samples) > 4 and batch.segment_ids.max() > 2 and (batch.image_index[0].max(axis=-1) >= 0).any()
  alone = make_loader(
    meta,
    tokenizer,
    loader=order,
    side=56,
    gradient_accumulation_steps=1,
    per_device_train_batch_size=30,
  )
  rows = next(alone)
  chosen = np.array([row in samples for row in samples_of(rows)])
  assert chosen.sum() == len(samples)
  # Rows of others are left out, with their tiles in the pool. Rows of one sample take no reduction, so its weights are put there
  # by its definition.
  rows = TokenBatch(*(array[:, chosen] for array in rows[:-1]), tiles=rows.tiles)
  supervised = np.maximum((rows.loss_weight > 0).sum(-1, keepdims=True), 1)
  weights = rows.loss_weight * supervised ** {"token": 0.0, "sample": -1.0, "square": -0.5}[reduction]
  rows = rows._replace(loss_weight=weights.astype(np.float32))
  ours, a = loss_and_gradients(batch)
  theirs, b = loss_and_gradients(rows)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.9999
  np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-4)
  packed.close()
  alone.close()


def test_what_cannot_be_read_or_fits_no_row_is_counted(meta, tokenizer, tmp_path):
  meta = write_mixture(tmp_path, 12)
  (tmp_path / "5.png").unlink()
  options = {"on_bad_sample": "drop", "max_bad_fraction": 0.5}
  loader = make_loader(meta, tokenizer, data=PACKED, loader=options, max_steps=-1, num_train_epochs=2)
  list(loader)
  counts = loader.counters()["all"]
  assert (
    counts["unreadable"] in (1, 2) and counts["over_long"] == 0
  )  # once in each of two epochs, as far as passed
  loader.close()
  with pytest.raises(DataError, match=r"all\.jsonl:6 \(dataset 'all'\): image not found"):
    list(make_loader(meta, tokenizer, data=PACKED))
  small = {**PACKED, "num_images_expected": 2}
  loader = make_loader(meta, tokenizer, data=small, loader=options, max_steps=1)
  next(loader)
  assert loader.counters()["all"]["over_long"] > 0
  loader.close()
  with pytest.raises(DataError, match=r"no sample fits a row of data\.max_packed_tokens=8 tokens"):
    make_loader(meta, tokenizer, data={**PACKED, "max_packed_tokens": 8}, loader={"on_over_length": "drop"})


def test_a_size_that_the_line_states_wrongly_is_named(tokenizer, tmp_path):
  meta = write_mixture(tmp_path, 4)
  records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
  records[1] |= {"width": 16, "height": 16 * 4}
  Image.new("RGB", (64, 16)).resize((64, 32)).save(tmp_path / "1.png")
  write_jsonl(tmp_path / "all.jsonl", records)
  with pytest.raises(DataError, match=r"all\.jsonl:2 .* tokens and \d tiles, but .* were planned"):
    list(make_loader(meta, tokenizer, data=PACKED))


def test_the_rows_of_an_epoch_are_counted_once(meta, tokenizer, tmp_path, monkeypatch):
  options = {"cache_dir": str(tmp_path)}
  loader = make_loader(meta, tokenizer, data=PACKED, loader=options)
  loader.close()

  def again(*_, **__):
    raise AssertionError("counted again")

  monkeypatch.setattr(packing, "count_rows", again)
  same = make_loader(meta, tokenizer, data=PACKED, loader=options)
  assert same.schedule.rows_per_epoch == loader.schedule.rows_per_epoch > 1
  same.close()
  for changes in ({"data": {**PACKED, "max_packed_tokens": 500}}, {"data": PACKED, "data_seed": 1}):
    with pytest.raises(AssertionError, match="counted again"):
      make_loader(meta, tokenizer, loader=options, **changes)
