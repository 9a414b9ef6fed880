"""Every field of the reference's command line does what it says: a test a field, by its name."""

import dataclasses
import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, ModelArguments, TrainingArguments
from internvl_jax.batch import TokenBatch
from internvl_jax.config import TrainConfig
from internvl_jax.config_checks import idle_settings
from internvl_jax.data.load import loader as loaders
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.order import DrawnOrder
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.hf import export
from internvl_jax.hf.preprocessor import read_statistics
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.models.internvl import Execution, normalize_tiles
from internvl_jax.models.lora import adapter_paths
from internvl_jax.models.projector import pixel_shuffle
from internvl_jax.open_model import open_model
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import drop_path_rates, execution
from internvl_jax.setup.step import set_up as make_setup
from internvl_jax.trees import submodule_of
from tests.support.toy import ASSETS, CURVE, CURVE_INTERNLM2

INIT = CURVE / "init"
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_all_fields_are_here():
  fields = [
    field.name for leaf in (ModelArguments, DataTrainingArguments) for field in dataclasses.fields(leaf)
  ]
  assert len(fields) == 41
  tests = {name for name in dir(sys.modules[__name__]) if name.startswith("test_")}
  assert [name for name in fields if f"test_{name}" not in tests] == []


# --- ModelArguments -----------------------------------------------------------------------------------------


def run_of(**settings):
  """A configuration of the toy model; names are of `model` or `data`."""
  config = TrainConfig()
  config.model.model_name_or_path, config.data.force_image_size = str(INIT), 56
  config.data.conv_style, config.runtime.allow_other_template = "internvl2_5", True
  for name, value in settings.items():
    setattr(config.model if hasattr(config.model, name) else config.data, name, value)
  return config


@functools.cache
def source_of(**settings):
  return open_model(run_of(**settings))[0]


def trainable(**settings):
  split = {name: value for name, value in settings.items() if name in ("unfreeze_vit_layers", "use_llm_lora")}
  return trainable_paths(run_of(**settings).model, source_of(**split).model.shapes)


def set_up(**settings):
  config = run_of(**settings)
  return make_setup(config, source_of(), open_mesh(config, jax.devices()[:1]))


def value_of(source, path):
  return np.asarray(
    source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE), paths={path})[path]
  )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """The toy model's parts as checkpoints of their own, with every number doubled."""
  root = tmp_path_factory.mktemp("parts")
  config = json.loads((INIT / "config.json").read_text())
  tensors = load_file(INIT / "model.safetensors")
  for part, entry in (("vision_model", "vision_config"), ("language_model", "llm_config"), ("mlp1", None)):
    folder = root / part
    folder.mkdir()
    chosen = {
      name.removeprefix(f"{part}."): 2 * t for name, t in tensors.items() if name.startswith(f"{part}.")
    }
    save_file(chosen, folder / "model.safetensors")
    if entry:
      (folder / "config.json").write_text(json.dumps(config[entry]))
  for file in INIT.glob("*token*.json"):
    shutil.copyfile(file, root / "language_model" / file.name)
  return root


def built(parts):
  names = {"vision_path": "vision_model", "llm_path": "language_model"}
  return source_of(model_name_or_path=None, **{name: str(parts / part) for name, part in names.items()})


def assert_doubled(source, path):
  np.testing.assert_array_equal(value_of(source, path), 2 * value_of(source_of(), path))


def test_model_name_or_path():
  assert source_of().raw["llm_config"]["model_type"] == "qwen2"
  other = source_of(model_name_or_path=str(CURVE_INTERNLM2 / "init"))
  assert other.raw["llm_config"]["model_type"] == "internlm2"


def test_vision_path(parts):
  assert_doubled(built(parts), "vision_model.embeddings.class_embedding")


def test_llm_path(parts):
  assert_doubled(built(parts), "language_model.model.norm.scale")


def test_mlp_path(parts):
  assert_doubled(source_of(mlp_path=str(parts / "mlp1")), "mlp1.linear_1.bias")


@pytest.mark.parametrize("flag", [False, True])
def test_freeze_llm(flag):
  assert ("language_model" in {submodule_of(path) for path in trainable(freeze_llm=flag)}) is not flag


@pytest.mark.parametrize("flag", [False, True])
def test_freeze_backbone(flag):
  assert ("vision_model" in {submodule_of(path) for path in trainable(freeze_backbone=flag)}) is not flag


@pytest.mark.parametrize("flag", [False, True])
def test_freeze_mlp(flag):
  assert ("mlp1" in {submodule_of(path) for path in trainable(freeze_mlp=flag)}) is not flag


def test_unfreeze_vit_layers():
  thawed = {
    path
    for path in trainable(freeze_backbone=True, unfreeze_vit_layers=-1)
    if submodule_of(path) == "vision_model"
  }
  depth = source_of().config.vision.num_layers
  assert thawed and all(f".{depth - 1}:{depth}." in path for path in thawed)


def test_vision_select_layer():
  pixels, found = np.ones((1, 56, 56, 3), np.float32), []
  for select_layer in (-1, -2):
    source = source_of(vision_select_layer=select_layer)
    params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE))
    found.append(np.asarray(source.model.bind(params).vision_model(pixels, **Execution().scan_options)))
  assert found[0].shape == found[1].shape and not np.allclose(found[0], found[1])


def test_use_backbone_lora():
  assert {submodule_of(path) for path in adapter_paths(source_of(use_backbone_lora=4).model.shapes)} == {
    "vision_model"
  }
  assert source_of(use_backbone_lora=4).config.vision.lora.rank == 4


def test_use_llm_lora():
  assert {submodule_of(path) for path in adapter_paths(source_of(use_llm_lora=2).model.shapes)} == {
    "language_model"
  }
  assert {
    submodule_of(path) for path in trainable(use_llm_lora=2, freeze_backbone=True, freeze_mlp=True)
  } == {"language_model"}


def test_unfreeze_lm_head():
  thawed = {
    path
    for path in trainable(freeze_llm=True, unfreeze_lm_head=True)
    if submodule_of(path) == "language_model"
  }
  assert thawed == {"language_model.lm_head.kernel"}


def test_grad_checkpoint():
  model = source_of().config
  assert execution(run_of(grad_checkpoint=True), model).remat == "full"
  assert execution(run_of(grad_checkpoint=False), model).remat is None


@pytest.mark.parametrize(
  ("flags", "first"),
  [
    ({}, 1),
    ({"freeze_backbone": True}, None),
    ({"freeze_backbone": True, "unfreeze_vit_layers": -1}, -1),
    ({"freeze_backbone": True, "use_backbone_lora": 2}, 1),
  ],
)
def test_drop_path_rate(flags, first):
  """It rises over the layers; those that do not train run as in evaluation."""
  source = source_of(**flags)
  paths = trainable_paths(ModelArguments(**flags), source.model.shapes)
  rates = drop_path_rates(0.4, source, paths)
  if first is None:
    assert rates == ()
    return
  expected = np.linspace(0.0, 0.4, source.config.vision.num_layers)
  expected[:first] = 0.0
  assert rates == tuple(expected)


def test_ps_version():
  x = np.arange(16.0, dtype=np.float32).reshape(1, 16, 1)
  orders = []
  for version in ("v1", "v2"):
    assert source_of(ps_version=version).config.ps_version == version
    orders.append(np.asarray(pixel_shuffle(x, ratio=0.5, version=version))[0, :, 0].tolist())
  assert orders == [[0, 8, 2, 10], [0, 2, 8, 10]]


def test_use_fast_tokenizer():
  assert idle_settings(run_of(use_fast_tokenizer=False)) == []
  assert "the tokenizers library is always used" in idle_settings(run_of(use_fast_tokenizer=True))[0]


@pytest.mark.parametrize("flag", [False, True])
def test_use_liger(flag):
  """The numbers are the same with and without it, so no run builds the logits of all tokens."""
  assert idle_settings(run_of(use_liger=flag)) == []
  objective = set_up(use_liger=flag).objective
  hidden = jax.ShapeDtypeStruct((1, 4096, 64), np.float32)
  batch = TokenBatch(*[None] * len(TokenBatch._fields))._replace(
    targets=jax.ShapeDtypeStruct((1, 4096), np.int32), loss_weight=jax.ShapeDtypeStruct((1, 4096), np.float32)
  )

  def loss(params, hidden, batch):
    model = objective.model.bind(params)
    return objective._language_loss(model, hidden, batch, batch.loss_weight)

  program = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=1))(objective.model.shapes, hidden, batch))
  vocabulary = source_of().config.text.vocab_size
  assert f"[1024,{vocabulary}]" in program and f"4096,{vocabulary}]" not in program


# --- DataTrainingArguments ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer(ASSETS / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two datasets, of 16 and of 4 lines, whose even lines have a wide image; and one of a folder of 9 frames."""
  root = tmp_path_factory.mktemp("data")
  Image.new("RGB", (48, 16), (250, 10, 10)).save(root / "wide.png")
  (root / "clip").mkdir()
  for number in range(9):
    Image.new("RGB", (16, 16), (number, 0, 0)).save(root / "clip" / f"{number}.png")
  image = {"image": "wide.png", "conversations": _turns("<image>\nwhat?", "red red red")}
  lines = {
    "large": [image, {"conversations": _turns("what?", "blue")}] * 8,
    "small": [image, {"conversations": _turns("what?", "blue")}] * 2,
    "clips": [{"video": "clip", "conversations": _turns("<video>\nwhat?", "red")}] * 8,
  }
  entries = {}
  for name, records in lines.items():
    (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entries[name] = {"root": str(root), "annotation": str(root / f"{name}.jsonl")}
  (root / "clips.json").write_text(json.dumps({"clips": entries.pop("clips")}))
  (root / "meta.json").write_text(json.dumps(entries))
  return root


def _turns(question, answer):
  return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


_GRID = {"dynamic_image_size": True, "max_dynamic_patch": 4}
_PACKED = {"use_packed_ds": True, "max_packed_tokens": 1024, "num_images_expected": 8}


def data_of(folder, meta="meta.json", **settings):
  usual = {
    "meta_path": str(folder / meta),
    "conv_style": "internvl2_5",
    "force_image_size": 16,
    "max_seq_length": 512,
  }
  return DataTrainingArguments(**usual | settings)


@pytest.fixture
def loader_of(folder, tokenizer):
  """A function from data settings to a loader, which is closed at the end."""
  opened = []

  def make(**settings):
    data = data_of(folder, **settings)
    chat = ChatTokenizer(tokenizer, data.conv_style)
    training = TrainingArguments(per_device_train_batch_size=2, num_train_epochs=1, disable_tqdm=True)
    loading = LoaderConfig(shuffle=False, cache_dir=str(folder / "cache"))
    opened.append(loaders.TrainLoader(data, training, loading, chat, tokens_per_tile=4))
    return opened[-1]

  yield make
  for loader in opened:
    loader.close()


@pytest.fixture
def samples_of(folder, tokenizer):
  """A function from data settings to the first samples of a mixture, decoded."""

  def make(count=1, **settings):
    data = data_of(folder, **settings)
    chat = ChatTokenizer(tokenizer, data.conv_style)
    mixture = Mixture(data, chat, tokens_per_tile=4, seed=0, policy="truncate", cache=str(folder / "cache"))
    found = [mixture.decode(0, index) for index in range(count)]
    mixture.close()
    return found

  return make


def test_max_seq_length(samples_of, loader_of):
  (whole,), (cut,) = samples_of(), samples_of(max_seq_length=182)
  assert len(whole.input_ids) > len(cut.input_ids) == 182 and cut.truncated
  assert loader_of(max_seq_length=64).sequence_sizes[-1] == 64


def test_force_image_size(samples_of):
  assert samples_of(force_image_size=32)[0].tiles.shape[1:3] == (32, 32)
  assert source_of(force_image_size=28).config.vision.image_size == 28


def test_down_sample_ratio():
  # A tile has 16 patches, of which the projector takes 4 or 1 as one.
  sources = [source_of(down_sample_ratio=ratio) for ratio in (0.5, 1.0)]
  assert [source.config.tokens_per_tile for source in sources] == [4, 16]


def test_pad2square(samples_of):
  (stretched,), (padded,) = samples_of(), samples_of(pad2square=True)
  assert (stretched.tiles[0, 0, 0] == [250, 10, 10]).all()
  assert (padded.tiles[0, 0, 0] == [123, 116, 103]).all()  # ImageNet's mean


def test_conv_style(samples_of):
  ids = [samples_of(conv_style=style)[0].input_ids.tolist() for style in ("internvl2_5", "Hermes-2")]
  assert ids[0] != ids[1]


def test_meta_path(loader_of):
  assert (loader_of().num_samples, loader_of(meta="clips.json").num_samples) == (20, 8)


def test_use_data_resampling(loader_of):
  def seen(**settings):
    loader = loader_of(**settings)
    list(loader)
    return {name: counts["samples"] for name, counts in loader.counters().items()}

  assert seen() == {"large": 16, "small": 4}
  resampled = seen(use_data_resampling=True)  # In proportion to 4 and 2.
  assert resampled["small"] > 4 and resampled["large"] < 16 and sum(resampled.values()) == 20


def test_dynamic_image_size(samples_of):
  assert [len(samples_of(dynamic_image_size=flag)[0].tiles) for flag in (False, True)] == [1, 3]


def test_use_thumbnail(samples_of):
  assert [len(samples_of(use_thumbnail=flag, **_GRID)[0].tiles) for flag in (False, True)] == [3, 4]


def test_min_dynamic_patch(samples_of):
  assert len(samples_of(min_dynamic_patch=4, **_GRID)[0].tiles) == 4


def test_max_dynamic_patch(samples_of):
  assert len(samples_of(dynamic_image_size=True, max_dynamic_patch=2)[0].tiles) == 2


def frames(samples_of, fewest, most):
  return [len(s.tiles) for s in samples_of(8, meta="clips.json", min_num_frame=fewest, max_num_frame=most)]


def test_min_num_frame(samples_of):
  assert min(frames(samples_of, 1, 4)) < 4 and set(frames(samples_of, 4, 4)) == {4}


def test_max_num_frame(samples_of):
  assert set(frames(samples_of, 2, 2)) == {2} and max(frames(samples_of, 2, 6)) > 2


def test_normalize_type():
  grey = np.full((1, 1, 1, 3), 51, np.uint8)
  expected = {
    "imagenet": [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225],
    # The reference's last number lacks a digit of OpenAI's 0.27577711.
    "clip": [(0.2 - 0.48145466) / 0.26862954, (0.2 - 0.4578275) / 0.26130258, (0.2 - 0.40821073) / 0.2757711],
    "siglip": [-0.6] * 3,
  }
  for kind, values in expected.items():
    assert set_up(normalize_type=kind).objective.normalize_type == kind
    np.testing.assert_allclose(np.asarray(normalize_tiles(grey, kind)).ravel(), values, rtol=2e-6)


@pytest.mark.parametrize("blue", [0.2757711, 0.27577711])  # the reference's, and OpenAI's
def test_clips_numbers_are_exported_and_read(tmp_path, blue):
  assert export._clip_preprocessor(source_of().config, "clip")["image_std"] == [
    0.26862954,
    0.26130258,
    0.2757711,
  ]
  found = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, blue]}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
  assert read_statistics(tmp_path) == "clip"


def test_use_packed_ds(loader_of):
  assert next(loader_of()).segment_ids.max() == 1
  assert next(loader_of(**_PACKED)).segment_ids.max() > 1


def test_num_images_expected(loader_of):
  for tiles in (3, 8):
    batch = next(loader_of(**_PACKED | {"num_images_expected": tiles}))
    assert batch.tiles.shape[2] == 2 * tiles  # two rows
    assert max(len(np.unique(row[row >= 0])) // 4 for row in batch.image_index[0]) <= tiles


def test_max_packed_tokens(loader_of):
  short, long = (next(loader_of(**_PACKED | {"max_packed_tokens": size})) for size in (400, 1024))
  assert (short.segment_ids > 0).sum(-1).max() <= 400 < (long.segment_ids > 0).sum(-1).max()


def test_max_buffer_size(folder):
  settings = [pack_settings(data_of(folder, **_PACKED, max_buffer_size=rows)) for rows in (1, 20)]
  assert [each.look_ahead for each in settings] == [13, 256]
  # The best companion of the first sample is the 40th: one open row does not see it, twenty do.
  sizes = [[900, 0], *[[400, 0]] * 38, [124, 0], *[[400, 0]] * 300]
  assert [row for row in packing.pack(sizes, settings[0]) if 0 in row] == [[0]]
  assert [row for row in packing.pack(sizes, settings[1]) if 0 in row] == [[0, 39]]


def test_log_freq(loader_of, monkeypatch):
  told = []
  monkeypatch.setattr(loaders, "log_fill", lambda stats: told.append(stats.rows))
  loader = loader_of(**_PACKED, log_freq=2)
  next(loader)
  assert told == [2]


def test_strict_mode(loader_of):
  loose, strict = (
    next(loader_of(**_PACKED | {"num_images_expected": 40}, strict_mode=f)) for f in (False, True)
  )
  assert loose.tiles.shape[2] < strict.tiles.shape[2] == 80


def test_replacement(loader_of):
  assert isinstance(loader_of(**_PACKED, replacement=True).schedule.order, DrawnOrder)
  assert not isinstance(loader_of(**_PACKED).schedule.order, DrawnOrder)
  assert not isinstance(loader_of(replacement=True).schedule.order, DrawnOrder)


def test_allow_overflow(folder):
  sizes = [[600, 0], [600, 0], [600, 0]]
  rows = [
    list(packing.pack(sizes, pack_settings(data_of(folder, **_PACKED, allow_overflow=flag))))
    for flag in (False, True)
  ]
  assert [len(each) for each in rows] == [3, 2]


def test_loss_reduction(loader_of):
  def weights(**settings):
    batch = next(loader_of(**settings))
    return batch.loss_weight[0, 0], batch.segment_ids[0, 0]

  for reduction, power in (("token", 0.0), ("square", -0.5), ("sample", -1.0)):
    weight, segments = weights(**_PACKED, loss_reduction=reduction)
    for segment in range(1, segments.max() + 1):
      mine = weight[(segments == segment) & (weight > 0)]
      np.testing.assert_allclose(mine, len(mine) ** power, rtol=1e-6)
  # As in the reference, rows of one sample do not know it.
  weight, _ = weights(loss_reduction="sample")
  assert set(weight.tolist()) == {0.0, 1.0}


def test_loss_reduction_all_gather():
  # Two micro-batches of one and of three supervised tokens.
  loss_weight = np.array([[[1, 0, 0, 0]], [[1, 1, 1, 0]]], np.float32)
  batch = TokenBatch(*[None] * (len(TokenBatch._fields)))._replace(loss_weight=loss_weight)
  own, joint = (
    np.asarray(set_up(loss_reduction_all_gather=flag).objective.weights(batch)).sum((1, 2))
    for flag in (False, True)
  )
  np.testing.assert_allclose(own, [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(joint, [0.25, 0.75], rtol=1e-6)
