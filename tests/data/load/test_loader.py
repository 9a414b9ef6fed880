"""The loader as a whole: same batches for any workers, exact resume, counters, bad samples."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.load import counters
from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.where import DataError
from tests.support.data_toys import arguments, resumed, turns, write_dataset, write_jsonl

PACKAGE = pathlib.Path(__file__).parents[3]


def make_loader(meta, tokenizer, *, state=None, shards=2, data=None, loader=None, **training):
  settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6} | training
  opened = TrainLoader(
    arguments(meta, **data or {}),
    TrainingArguments(**settings),
    LoaderConfig(**loader or {}),
    tokenizer,
    tokens_per_tile=4,
    shards=Shards(count=shards),
  )
  return resumed(opened, state)


def all_batches(loader):
  batches = list(loader)
  loader.close()
  return batches


def assert_equal(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    for array, wanted in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, wanted)


@pytest.fixture
def meta(tmp_path):
  write_dataset(tmp_path, 7, name="first", data_augment=True, repeat_time=2)
  return write_dataset(tmp_path, 4, name="second")


def test_resume_is_bit_identical_for_any_number_of_workers(meta, tokenizer):
  straight = make_loader(meta, tokenizer)
  expected = all_batches(straight)
  assert len(expected) == 6 and expected[0].input_ids.shape == (2, 2, 256)
  # Twice stopped, and gone on with another number of workers.
  batches, state = [], None
  for workers, steps in ((2, 1), (0, 2), (1, 3)):
    loader = make_loader(meta, tokenizer, dataloader_num_workers=workers, state=state)
    batches += [next(loader) for _ in range(steps)]
    state = json.loads(json.dumps(loader.get_state()))
    assert state["next_step"] == len(batches)
    loader.close()
  assert_equal(batches, expected)
  assert state == straight.get_state()


@pytest.mark.parametrize(
  ("data", "training"),
  [
    ({}, {}),
    ({"dynamic_image_size": False}, {}),
    ({}, {"group_by_length": True}),
    ({"use_packed_ds": True, "max_packed_tokens": 512, "strict_mode": False}, {}),
    ({"use_packed_ds": True, "max_packed_tokens": 512, "num_images_expected": 12}, {}),
  ],
)
def test_shapes_are_foreseen(tokenizer, tmp_path, data, training):
  write_dataset(tmp_path, 9, name="first", repeat_time=2)
  meta = write_dataset(tmp_path, 5, name="second")
  buckets = {"sequence_buckets": (32, 48, 64, 96, 128, 256, 512), "cache_dir": str(tmp_path / "cache")}
  loader = make_loader(meta, tokenizer, data=data, loader=buckets, **training)
  state = loader.get_state()
  for _ in range(4):
    sizes = loader.next_sizes()
    assert sizes == loader.next_sizes()
    batch = next(loader)
    assert batch.input_ids.shape == tuple(sizes[axis] for axis in "ARS")
    assert batch.tiles.shape == (*(sizes[axis] for axis in "ADTHW"), 3)
  loader.close()
  assert_equal(
    [next(resumed(make_loader(meta, tokenizer, data=data, loader=buckets, **training), state))],
    [next(make_loader(meta, tokenizer, data=data, loader=buckets, **training))],
  )


def test_unshuffled_order_and_batches_across_epochs(tokenizer, tmp_path):
  meta = write_dataset(tmp_path, 5)
  loader = make_loader(meta, tokenizer, loader={"shuffle": False}, max_steps=-1, num_train_epochs=2)
  assert (loader.num_samples, loader.global_batch, loader.steps_per_epoch, loader.total_steps) == (5, 4, 2, 3)
  assert loader.epoch_of(3) == 12 / 5
  rows = np.concatenate([batch.input_ids.reshape(4, -1) for batch in all_batches(loader)])
  assert len({row.tobytes() for row in rows[:5]}) == 5
  np.testing.assert_array_equal(rows[5:10], rows[:5])
  np.testing.assert_array_equal(rows[10:], rows[:2])


def test_every_sample_once_an_epoch_under_shuffling(tokenizer, tmp_path):
  meta = write_dataset(tmp_path, 12)
  batches = all_batches(make_loader(meta, tokenizer, max_steps=6))
  rows = [row.tobytes() for batch in batches for row in batch.input_ids.reshape(4, -1)]
  assert len(set(rows[:12])) == 12 and set(rows[12:]) == set(rows[:12]) and rows[12:] != rows[:12]


def test_seeds(meta, tokenizer):
  def ids_and_tiles(**seeds):
    batch = next(loader := make_loader(meta, tokenizer, **seeds))
    loader.close()
    return batch.input_ids.tobytes(), batch.tiles.tobytes()

  order_of_one, one = ids_and_tiles(seed=1)
  assert ids_and_tiles(seed=2)[0] != order_of_one
  # data_seed fixes the order; the augmentation still depends on the seed.
  ids, tiles = ids_and_tiles(seed=2, data_seed=1)
  assert ids == order_of_one and tiles != one


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_stops_the_run_in_one_line_when_its_turn_comes(tokenizer, tmp_path, workers):
  meta = write_dataset(tmp_path, 12)
  (tmp_path / "toy6.png").write_bytes(b"broken")
  loader = make_loader(meta, tokenizer, loader={"shuffle": False}, dataloader_num_workers=workers)
  next(loader)
  before = loader.get_state()
  for _ in range(1 if workers else 2):  # asking again does not skip it
    with pytest.raises(DataError) as caught:
      next(loader)
    message = str(caught.value)
    assert message.startswith(
      f"{tmp_path}/toy.jsonl:7 (dataset 'toy'): image {tmp_path}/toy6.png cannot be decoded"
    )
    assert "\n" not in message
  assert loader.get_state() == before
  loader.close()


def test_dropped_samples_are_masked_and_counted(tokenizer, tmp_path):
  write_dataset(tmp_path, 4, name="good")
  meta = write_dataset(tmp_path, 8, name="bad")
  (tmp_path / "bad1.png").unlink()
  settings = {"shuffle": False, "on_bad_sample": "drop", "max_bad_fraction": 0.1}
  loader = make_loader(meta, tokenizer, loader=settings, max_steps=3)
  batches = all_batches(loader)
  lengths = np.concatenate([batch.segment_ids.sum(-1).ravel() for batch in batches])
  assert np.flatnonzero(lengths == 0).tolist() == [5]
  none = dict.fromkeys(EVENTS, 0)
  assert loader.counters() == {"good": none | {"samples": 4}, "bad": none | {"samples": 8, "unreadable": 1}}
  # The counters of a resumed run go on from the checkpoint's.
  first = make_loader(meta, tokenizer, loader=settings, max_steps=3)
  next(first), next(first)
  again = make_loader(meta, tokenizer, loader=settings, max_steps=3, state=first.get_state())
  first.close()
  all_batches(again)
  assert again.counters() == loader.counters()


def test_too_many_bad_samples_abort_with_the_first_named(tokenizer, tmp_path):
  meta = write_dataset(tmp_path, 12)
  for i in (3, 6, 7):
    (tmp_path / f"toy{i}.png").unlink()
  settings = {"shuffle": False, "on_bad_sample": "drop", "max_bad_fraction": 0.1}
  loader = make_loader(meta, tokenizer, loader=settings)
  next(loader)
  with pytest.raises(DataError) as caught:
    next(loader)
  message = str(caught.value)
  assert "3 of 8 samples were lost, more than loader.max_bad_fraction=0.1 of 12" in message
  assert all(f"toy.jsonl:{line} " in message for line in (4, 7, 8)) and "\n" not in message
  loader.close()


def test_truncated_and_fully_masked_samples_are_counted_and_said(tokenizer, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(counters.logging, "warning", lambda text, *args: said.append(text % args))
  records = [
    {"conversations": turns("hi", "hello")},
    {"conversations": turns("hi", "hello " * 300)},
    {"conversations": turns("hi")},
    {"conversations": turns("hi " * 300, "hello")},
  ]
  write_jsonl(tmp_path / "text.jsonl", records)
  (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  loader = make_loader(tmp_path / "meta.json", tokenizer, data={"max_seq_length": 256}, max_steps=1)
  all_batches(loader)
  assert loader.counters() == {
    "text": dict.fromkeys(EVENTS, 0) | {"samples": 4, "truncated": 1, "fully_masked": 2}
  }
  (line,) = said
  assert line == "Samples without a supervised token on this host: text: 1 truncated, 2 fully masked of 4"


def test_too_many_samples_without_a_supervised_token_abort(tokenizer, tmp_path):
  records = [{"conversations": turns("hi", *(["hello"] if i % 4 == 0 else []))} for i in range(12)]
  write_jsonl(tmp_path / "text.jsonl", records)
  (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  loader = make_loader(tmp_path / "meta.json", tokenizer, loader={"shuffle": False})
  next(loader)
  next(loader)
  with pytest.raises(DataError, match=r"9 of 12 samples had no supervised token, more than .*=0\.5 of 12"):
    next(loader)
  loader.close()
  allowed = {"shuffle": False, "max_untaught_fraction": 0.75}
  all_batches(make_loader(tmp_path / "meta.json", tokenizer, loader=allowed, max_steps=3))


def test_first_batch_without_a_supervised_token(tokenizer, tmp_path):
  write_jsonl(tmp_path / "text.jsonl", [{"conversations": turns("hi")}] * 4)
  (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  loader = make_loader(tmp_path / "meta.json", tokenizer)
  with pytest.raises(
    DataError, match="no token is supervised in the first batch: 4 rows of samples of up to"
  ):
    next(loader)
  loader.close()


def test_a_first_batch_that_is_bad_does_not_end_a_run_that_drops(tokenizer, tmp_path):
  lines = [{"conversations": turns("hi", "hello")} for _ in range(44)]
  for first in ({"image": "gone.png", "conversations": turns("hi", "hello")}, {"conversations": turns("hi")}):
    write_jsonl(tmp_path / "text.jsonl", [first] * 4 + lines)
    (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
    settings = {"shuffle": False, "on_bad_sample": "drop", "max_bad_fraction": 0.2}
    loader = make_loader(tmp_path / "meta.json", tokenizer, loader=settings, max_steps=3)
    taught = [int((batch.targets != IGNORE_INDEX).sum()) for batch in all_batches(loader)]
    assert taught[0] == 0 and min(taught[1:]) > 0
    loader.close()


def test_first_batches_without_a_supervised_token_end_a_run_that_drops(tokenizer, tmp_path):
  write_jsonl(tmp_path / "text.jsonl", [{"conversations": turns("hi")}] * 4)
  (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  loader = make_loader(tmp_path / "meta.json", tokenizer, loader={"on_bad_sample": "drop"}, max_steps=20)
  for _ in range(9):
    next(loader)
  with pytest.raises(DataError, match="no token is supervised in the first 10 batches"):
    next(loader)
  loader.close()


def test_broken_line_is_named(tokenizer, tmp_path):
  meta = write_dataset(tmp_path, 4)
  path = tmp_path / "toy.jsonl"
  lines = path.read_text().splitlines()
  lines[2] = lines[2][:-5]
  path.write_text("\n".join(lines))
  loader = make_loader(meta, tokenizer)
  with pytest.raises(DataError, match=r"toy\.jsonl:3 \(dataset 'toy'\): broken JSON at column"):
    next(loader)
  loader.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": {"meta_path": None}}, "data.meta_path is not set"),
    ({"data": {"normalize_type": "siglib"}}, "did you mean 'siglip'"),
    ({"data": {"min_dynamic_patch": 9}}, "max_dynamic_patch=4 is below min_dynamic_patch=9"),
    ({"loader": {"sequence_buckets": (128,)}}, "largest, 128, is below data.max_seq_length, 512"),
    ({"loader": {"on_bad_sample": "skip"}}, "must be 'error' or 'drop', got 'skip'"),
    ({"loader": {"on_over_length": "cut"}}, "error, drop, shrink_tiles, truncate, got 'cut'"),
    ({"loader": {"prefetch": 0}}, "loader.prefetch must be 1 or more, got 0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more, got -1"),
    ({"seed": -1}, "training.seed must be 0 or more, got -1"),
    ({"max_steps": -1, "num_train_epochs": 0}, "nothing to train on"),
  ],
)
def test_settings_are_refused_with_their_values(meta, tokenizer, changes, message):
  with pytest.raises(DataError) as caught:
    make_loader(meta, tokenizer, **changes)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_state_of_other_data_is_refused(meta, tokenizer, tmp_path):
  loader = make_loader(meta, tokenizer)
  next(loader)
  state = loader.get_state()
  loader.close()
  with pytest.raises(DataError, match="global_batch was 4 when its state was saved and is 8 now"):
    make_loader(meta, tokenizer, state=state, shards=4)
  with pytest.raises(DataError, match=r"order_seed was 42 .* is 7 now"):
    make_loader(meta, tokenizer, state=state, data_seed=7)
  with pytest.raises(DataError, match="state lacks counters, plan; it has next_step"):
    make_loader(meta, tokenizer, state={"next_step": 1})
  write_dataset(tmp_path, 5, name="second")
  with pytest.raises(
    DataError, match=r"second.jsonl: dataset 'second': 4 lines were in use .*, and 5 are now"
  ):
    make_loader(meta, tokenizer, state=state)


def test_closed_loader(meta, tokenizer):
  loader = make_loader(meta, tokenizer)
  next(loader)
  loader.close()
  loader.close()
  assert loader.get_state()["next_step"] == 1
  with pytest.raises(RuntimeError, match="closed"):
    next(loader)


def test_workers_under_absl_app_run(meta):
  """A program started by `python -m` under `app.run`, whose module the workers import again."""
  program = meta.parent / "trainlike.py"
  program.write_text(
    textwrap.dedent("""
      import sys
      import transformers
      from absl import app, flags
      from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
      from internvl_jax.data.load.loader import TrainLoader
      from internvl_jax.data.sample.tokenize import ChatTokenizer

      TOKENIZER = flags.DEFINE_string("tokenizer", None, "folder", required=True)

      def main(argv):
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER.value)
        data = DataTrainingArguments(
          meta_path="meta.json", conv_style="internvl2_5", force_image_size=16, max_seq_length=256
        )
        training = TrainingArguments(per_device_train_batch_size=2, max_steps=3, dataloader_num_workers=1)
        tokenizer = ChatTokenizer(hf, data.conv_style)
        loader = TrainLoader(data, training, LoaderConfig(), tokenizer, tokens_per_tile=4)
        print("shapes", [batch.input_ids.shape for batch in loader])
        loader.close()

      if __name__ == "__main__":
        app.run(main)
    """)
  )
  tokenizer = PACKAGE / "tests" / "assets" / "tokenizer"
  result = subprocess.run(
    [sys.executable, "-m", "trainlike", f"--tokenizer={tokenizer}"],
    cwd=meta.parent,
    env=os.environ | {"PYTHONPATH": f"{PACKAGE}{os.pathsep}{meta.parent}"},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  assert "shapes [(1, 2, 256), (1, 2, 256), (1, 2, 256)]" in result.stdout


def test_the_samples_of_a_batch_are_told(meta, tokenizer):
  loader = make_loader(meta, tokenizer, loader={"shuffle": False}, max_steps=5)
  next(loader), next(loader)
  folder = meta.parent
  assert loader.batch_samples(0) == f"{folder}/first.jsonl:1,2,3,4"
  assert loader.batch_samples(1) == f"{folder}/first.jsonl:5,6,7,1"
  with pytest.raises(KeyError):
    loader.batch_samples(2)
  loader.close()
