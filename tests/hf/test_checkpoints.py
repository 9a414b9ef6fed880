"""Checkpoints in Hugging Face's form survive the round trip; greedy decoding agrees with the full forward pass."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.arguments import MeshConfig
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import Question
from internvl_jax.hf import arrangement, saving, weights
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.export import ModelFiles, save_model
from internvl_jax.hf.model import Changes, open_source
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.models.internvl import Execution, normalize_tiles
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh
from tests.support.held_out import score_set
from tests.support.toy import CURVE

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load(folder, **overrides):
  source = open_source(folder, Changes(**overrides))
  return source, source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE))


@pytest.fixture(scope="module")
def opened():
  return load(CURVE / "init")


@pytest.mark.parametrize("shard_bytes", [saving.SHARD_BYTES, 200_000])
def test_load_save_load_is_bit_identical(tmp_path, opened, shard_bytes):
  source, params = opened
  tensors = saving.tensors(params, source.table, np.dtype("float32"))
  saving.save(tmp_path, tensors, shard_bytes=shard_bytes)
  files = sorted(tmp_path.glob("*.safetensors"))
  saved = {key: value for path in files for key, value in load_file(path).items()}
  original = load_file(CURVE / "init/model.safetensors")
  assert saved.keys() == original.keys()
  for key, value in original.items():
    np.testing.assert_array_equal(saved[key], value, err_msg=key)
  if shard_bytes < saving.SHARD_BYTES:
    assert len(files) > 3
    index = json.loads((tmp_path / weights.INDEX).read_text())
    assert index["weight_map"].keys() == original.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())
  shapes = source.model.shapes
  again = weights.load(weights.open_checkpoint(tmp_path), source.table, shapes, dict.fromkeys(shapes, PLACE))
  for path, value in params.items():
    np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_bfloat16_export(tmp_path, opened):
  source, params = opened
  save_model(
    tmp_path,
    source,
    params,
    ModelFiles(
      layout=layouts.INTERNVL,
      dtype=jnp.bfloat16,
      tokenizer=load_tokenizer(CURVE / "init"),
      normalize_type="imagenet",
      eos_token_id=2,
      settings={"template": "x"},
    ),
  )
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
  _, again = load(tmp_path)
  for path, value in params.items():
    np.testing.assert_array_equal(again[path], value.astype(jnp.bfloat16).astype(jnp.float32), err_msg=path)


def test_a_sharded_load_gives_each_device_its_part(opened):
  source, params = opened
  mesh = jax.make_mesh((8,), ("fsdp",))
  place = {}
  for path, leaf in source.model.shapes.items():
    axis = next((i for i, n in enumerate(leaf.shape) if n % 8 == 0), None)
    spec = [None] * len(leaf.shape)
    if axis is not None:
      spec[axis] = "fsdp"
    place[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  sharded = source.load(source.model.shapes, place)
  for path, value in params.items():
    np.testing.assert_array_equal(sharded[path], value, err_msg=path)


def test_a_sharded_load_reads_no_more_than_a_shard(opened, monkeypatch):
  """A device's part of a linear map is all that is read for it, so a shard is all that the host holds."""
  source, _ = opened
  path = "language_model.model.layers.0:3.mlp.gate_proj.kernel"
  mesh = jax.make_mesh((8,), ("fsdp",))
  spec = jax.sharding.PartitionSpec(None, "fsdp", None)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  leaf = source.model.shapes[path]
  read = []
  right = weights.Checkpoint.read

  def spy(self, name, index=None):
    part = right(self, name, index)
    read.append((name, part.shape))
    return part

  monkeypatch.setattr(weights.Checkpoint, "read", spy)
  whole = source.checkpoint.shapes["language_model.model.layers.0.mlp.gate_proj.weight"]
  names = weights.names_of(path, leaf.shape, source.table)
  value = weights._fill(source.checkpoint, names, leaf, sharding)
  assert len(read) == 8 * 3 and {shape for _, shape in read} == {(whole[0], whole[1] // 8)}
  assert {shard.data.shape for shard in value.addressable_shards} == {(3, whole[1] // 8, whole[0])}
  # What lies whole on all devices is read once.
  read.clear()
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  weights._fill(source.checkpoint, names, leaf, everywhere)
  assert len(read) == 3


def test_several_hosts_read_rows_that_lie_together(opened, monkeypatch):
  """As if the devices were several hosts': no device's part of a tensor is a part of its rows, and all is in place."""
  source, params = opened
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  place = rules.weight_shardings(source.model.axes, source.model.shapes, mesh)
  read = {}
  right = weights.Checkpoint.read

  def spy(self, name, index=None):
    value = right(self, name, index)
    read.setdefault(name, []).append(value.shape)
    return value

  monkeypatch.setattr(weights.Checkpoint, "read", spy)
  monkeypatch.setattr(arrangement, "_spans_hosts", lambda sharding: True)
  sharded = source.load(source.model.shapes, place)
  for path, value in params.items():
    assert sharded[path].sharding.is_equivalent_to(place[path], value.ndim), path
    np.testing.assert_array_equal(sharded[path], value, err_msg=path)
  name = "language_model.model.layers.0.mlp.gate_proj.weight"
  rows, columns = source.checkpoint.shapes[name]
  assert read[name] == [(rows // 8, columns)] * 8
  for name, shapes in read.items():
    if len(whole := source.checkpoint.shapes[name]) > 1:
      assert {shape[-1] for shape in shapes} == {whole[-1]}, name


def test_a_part_of_the_parameters_is_all_that_is_read(opened, monkeypatch):
  source, params = opened
  read = []
  right = weights.Checkpoint.read
  monkeypatch.setattr(
    weights.Checkpoint, "read", lambda self, name, index=None: read.append(name) or right(self, name, index)
  )
  wanted = {path for path in params if path.startswith("mlp1.")}
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, device), paths=wanted)
  assert found.keys() == wanted and {name.partition(".")[0] for name in read} == {"mlp1"}


def test_another_tile_size_resizes_positions(opened):
  _, params = opened
  source, resized = load(CURVE / "init", image_size=84)
  path = "vision_model.embeddings.position_embedding"
  assert params[path].shape == (1 + 16, 48) and resized[path].shape == (1 + 36, 48)
  np.testing.assert_array_equal(resized[path][0], params[path][0])
  assert source.config.tokens_per_tile == 9


def test_greedy_decoding_equals_repeated_full_passes(opened):
  """Prompts of unequal length, one without an image, in one batch with a filler row."""
  source, params = opened
  rng = np.random.default_rng(0)
  P, image_token = source.config.tokens_per_tile, 5

  def prompt(length, tiles):
    ids = rng.integers(20, 380, length).astype("i4")
    ids[2 : 2 + P * tiles] = image_token
    return Prompt(ids, rng.integers(0, 256, (tiles, 56, 56, 3)).astype("u1"))

  prompts = [prompt(9, 1), prompt(33, 2), prompt(5, 0)]
  decoder = GreedyDecoder(
    model=source.model,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=image_token,
    stop_ids=(2,),
    max_new_tokens=6,
    batch_size=4,
  )
  answers = decoder(params, prompts)

  @jax.jit
  def next_token(ids, index, tiles, length):
    model = source.model.bind(params)
    features = jnp.zeros((1, 0, 0))
    if len(tiles):
      encoded = model.extract_features(normalize_tiles(tiles, "imagenet"), Execution())
      features = encoded.reshape(1, -1, encoded.shape[-1])
    x = model.embed(ids, index, features, Execution())
    segments = (jnp.arange(ids.shape[1]) < length).astype(jnp.int32)[None]
    hidden, _ = model.decode(x, Execution(), positions=jnp.arange(ids.shape[1])[None], segment_ids=segments)
    return jnp.argmax(model.logits(hidden[0, length - 1]))

  for question, answer in zip(prompts, answers, strict=True):
    ids = list(question.input_ids)
    expected = []
    for _ in range(6):
      row = np.zeros((1, 48), "i4")
      row[0, : len(ids)] = ids
      is_image = row == image_token
      index = np.where(is_image, np.cumsum(is_image) - 1, -1)
      token = int(next_token(row, index, question.tiles, len(ids)))
      if token == 2:
        break
      expected.append(token)
      ids.append(token)
    assert answer.tolist() == expected


def test_scores_by_group():
  nothing = Prompt(np.zeros(0, "i4"), np.zeros((0, 1, 1, 3), "u1"))
  questions = [
    Question(nothing, answer, {"type": kind}) for answer, kind in [("a", "x"), ("b", "x"), ("c", "y")]
  ]
  scores = score_set(questions, ["a", " b\n", "d"], group_field="type")
  assert scores.metrics == {"accuracy": pytest.approx(2 / 3)} and scores.num_questions == 3
  assert scores.by_group == {
    "x": {"accuracy": 1.0, "num_questions": 2},
    "y": {"accuracy": 0.0, "num_questions": 1},
  }
  assert scores.predictions[2]["prediction"] == "d" and not scores.predictions[2]["correct"]
