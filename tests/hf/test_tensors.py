"""Tensors are what they say: their types, the files they lie in, the kind of model, and numbers that are none."""

import json
import os
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax.errors import UserError
from internvl_jax.hf import dtypes, files, saving, weights
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.model import Changes, add_projector, open_parts, open_source
from tests.support.damage import edit, edit_config, load, refused
from tests.support.toy import CURVE

SINGLE = files.SINGLE
HEAD = "language_model.lm_head.weight"
PROJ = "vision_model.encoder.layers.1.attn.proj.weight"
FLAGS = {"image_size": 56, "downsample_ratio": 0.5, "ps_version": "v2"}


@pytest.fixture
def folder(tmp_path):
  """A copy of a good checkpoint, to be damaged."""
  return shutil.copytree(CURVE / "init", tmp_path / "model")


def write(path, tensors):
  """A safetensors file of (type, shape, bytes) by name: also of types that numpy lacks."""
  header, at = {}, 0
  for name, (kind, shape, data) in sorted(tensors.items(), key=lambda item: -len(item[1][2])):
    header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + len(data)]}
    at += len(data)
  raw = json.dumps(header).encode()
  raw += b" " * (-len(raw) % 8)
  data = b"".join(tensors[name][2] for name in header)
  path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def rewrite(path, change):
  """Changes the tensors of a file, each (type, shape, bytes)."""
  tensors = {name: ("F32", value.shape, value.tobytes()) for name, value in load_file(path).items()}
  change(tensors)
  write(path, tensors)


# --- Types --------------------------------------------------------------------------------------------------


def as_type(kind):
  def change(tensors):
    shape = tensors[PROJ][1]
    tensors[PROJ] = kind, shape, bytes(int(np.prod(shape)))

  return change


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_a_type_that_is_no_weight_is_named(folder, kind):
  rewrite(folder / SINGLE, as_type(kind))
  refused(folder, str(folder), PROJ, f"the type {kind}", "not quantized", "config.json does not say how")


def test_what_config_json_says_of_it_is_named(folder):
  rewrite(folder / SINGLE, as_type("F8_E4M3"))
  edit_config(folder, llm_config__quantization_config={"quant_method": "fp8"})
  refused(folder, PROJ, "F8_E4M3", "llm_config.quantization_config.quant_method='fp8'")
  # Without a look at the weights, the config alone.
  with pytest.raises(UserError, match="quant_method='fp8' is not supported; take the checkpoint that is not"):
    open_source(folder, with_weights=False)


@pytest.mark.parametrize(
  "names",
  [
    ("qweight", "qzeros", "scales", "g_idx"),  # GPTQ, AWQ
    ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    ("weight_scale_inv",),  # float8 in blocks
    ("weight_packed", "weight_scale", "weight_shape"),  # compressed-tensors
    ("SCB",),  # bitsandbytes of 8 bits
  ],
  ids=lambda names: names[0],
)
def test_what_lies_beside_packed_weights_tells_of_them(folder, names):
  """Also where each tensor is of a type that weights have."""
  module = PROJ.removesuffix(".weight")

  def change(tensors):
    tensors |= {f"{module}.{name}": ("F32", (1,), bytes(4)) for name in names}

  rewrite(folder / SINGLE, change)
  line = refused(folder, f"{module}.", "quantized weights")
  assert (f"and {len(names) - 1} more" in line) == (len(names) > 1)


def test_parts_projectors_and_adapters_are_looked_at_alike(folder, tmp_path):
  tensors = load_file(folder / SINGLE)
  config = json.loads((folder / "config.json").read_text())
  for part, entry in (("vision_model", "vision_config"), ("language_model", "llm_config")):
    (tmp_path / part).mkdir()
    own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(part)}
    save_file(own, tmp_path / part / SINGLE)
    (tmp_path / part / "config.json").write_text(json.dumps(config[entry] | {"model_type": "qwen2"}))
  (tmp_path / "vision_model/config.json").write_text(
    json.dumps(config["vision_config"] | {"model_type": "intern_vit_6b"})
  )
  write(tmp_path / "mlp.safetensors", {"1.weight": ("I8", (2, 2), bytes(4))})
  vision, llm = str(tmp_path / "vision_model"), str(tmp_path / "language_model")
  with pytest.raises(UserError, match=r"the tensor 1\.weight has the type I8"):
    open_parts(
      vision_path=vision, llm_path=llm, mlp_path=str(tmp_path / "mlp.safetensors"), changes=Changes(**FLAGS)
    )
  with pytest.raises(UserError, match=r"the tensor 1\.weight has the type I8"):
    add_projector(weights.open_checkpoint(folder), layouts.INTERNVL, str(tmp_path / "mlp.safetensors"))
  rewrite(
    tmp_path / "language_model" / SINGLE, lambda found: found.update({"lm_head.weight": ("U8", (1,), b"0")})
  )
  with pytest.raises(
    UserError, match=r"language_model/model\.safetensors: the tensor lm_head\.weight has the type U8"
  ):
    open_parts(vision_path=vision, llm_path=llm, mlp_path=None, changes=Changes(**FLAGS))
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text(
    json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
  )
  write(adapter / files.ADAPTER, {"base_model.model.x.lora_A.weight": ("F8_E4M3", (1,), b"0")})
  refused(adapter, "x.lora_A.weight has the type F8_E4M3")


# --- Files --------------------------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder, value=None, *, index=True, names=SHARDS):
  """Writes the model once more as shards; `value` in place of all of its numbers."""
  tensors = load_file(folder / SINGLE)
  keys = sorted(tensors)
  parts = {name: keys[i :: len(names)] for i, name in enumerate(names)}
  for name, part in parts.items():
    save_file(
      {k: tensors[k] if value is None else np.full_like(tensors[k], value) for k in part}, folder / name
    )
  where = {key: name for name, part in parts.items() for key in part}
  if index:
    (folder / files.INDEX).write_text(json.dumps({"weight_map": where}))
  return where


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("newer", [SINGLE, SHARDS[0]])
def test_a_single_file_beside_shards_is_two_models(folder, index, newer):
  shard(folder, 0.01, index=index)
  for name in (SINGLE, *SHARDS, files.INDEX):
    if (folder / name).exists():
      os.utime(folder / name, (1e9, 1e9 + (name == newer)))
  line = refused(folder, SINGLE, SHARDS[0], "two models", f"{newer} is newer")
  assert index == (files.INDEX in line)


def test_shards_that_the_index_does_not_name_are_another_model(folder):
  names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  shard(folder, 0.01, index=False, names=names)
  shard(folder)
  (folder / SINGLE).unlink()
  refused(folder, "two models", *names, SHARDS[0])
  (folder / files.INDEX).unlink()
  refused(folder, "files of 2 models")
  (folder / names[0]).unlink()
  for name in SHARDS:
    (folder / name).unlink()
  refused(folder, "has 2 of 3 files", f"missing: {names[0]}", "download it")


def test_an_index_that_names_a_tensor_its_file_lacks(folder):
  where = shard(folder)
  (folder / SINGLE).unlink()
  load(folder)  # Well so far.
  (folder / files.INDEX).write_text(json.dumps({"weight_map": where | {"mlp1.9.weight": SHARDS[0]}}))
  refused(folder, "mlp1.9.weight", SHARDS[0], "lacks it")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html></html>", "a web page"),
    (b"PK\x03\x04" + bytes(40), "a ZIP archive"),
    (b"GGUF" + bytes(40), "a GGUF file"),
    (b"\x1f\x8b" + bytes(40), "gzip"),
    (struct.pack("<Q", 2**60) + b"{}", "damaged"),
    (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    (struct.pack("<Q", 10) + b'{"a":[[[[}' + bytes(9), "damaged"),
    (
      struct.pack("<Q", files.HEADER_BYTES + 1) + bytes(files.HEADER_BYTES + 2),
      "a header of 33,554,433 bytes",
    ),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_weights_is_called_what_it_is(folder, content, words):
  (folder / SINGLE).write_bytes(content)
  refused(folder, f"{SINGLE}: ", words)


def test_more_tensors_than_any_model_has(folder, monkeypatch):
  monkeypatch.setattr(weights, "MOST_TENSORS", 20)
  refused(folder, "tensors, more than any InternVL has")


def test_a_model_and_an_adapter_in_one_folder(folder):
  save_file({"x": np.zeros(1, "f4")}, folder / files.ADAPTER)
  refused(folder, SINGLE, files.ADAPTER, "a folder of its own")


def test_all_that_does_not_fit_has_an_end(folder):
  edit(folder, lambda tensors: tensors.update({f"x{i}": np.zeros(1, "f4") for i in range(500)}))
  with pytest.raises(UserError, match="left over: x0") as error:
    load(folder)
  lines = str(error.value).splitlines()
  assert len(lines) == weights.TOLD + 2 and lines[-1] == f"and {500 - weights.TOLD} more"


def test_pickles_beside_safetensors_are_said_to_be_left(folder, caplog):
  (folder / "pytorch_model.bin").write_bytes(b"x")
  (folder / "training_args.bin").write_bytes(b"x")
  with caplog.at_level("INFO"):
    load(folder)
  assert f"read {SINGLE}; not read: pytorch_model.bin" in caplog.text


@pytest.mark.torch
def test_the_advice_for_pickles_names_all_and_converts_them(folder, monkeypatch, capsys):
  torch = pytest.importorskip("torch")
  tensors = {key: torch.tensor(value) for key, value in load_file(folder / SINGLE).items()}
  expected = load(folder)
  (folder / SINGLE).unlink()
  names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
  for i, name in enumerate(names):
    torch.save({key: tensors[key] for key in sorted(tensors)[i::2]}, folder / name)
  torch.save({}, folder / "optimizer.pt")
  line = refused(folder, *names, "are never read")
  assert "optimizer.pt" not in line
  program, arguments = line.split('python -c "')[1].split('" ')
  monkeypatch.chdir(folder)
  monkeypatch.setattr("sys.argv", ["-c", *(name.strip("'") for name in arguments.split(" "))])
  exec(program, {})
  for path, value in load(folder).items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)


# --- Kinds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "key", ["mlp2.0.weight", "gating.mlp1.0.weight", "pooling_before_gating.query_token"]
)
def test_tensors_of_a_flash_need_a_config_that_says_so(folder, key):
  edit(folder, lambda tensors: tensors.update({key: np.zeros(3, "f4")}))
  refused(folder, key, "of an InternVL3.5-Flash, but config.json does not describe one (flash_mode")


def test_a_config_that_says_it_is_no_flash(folder):
  edit_config(folder, flash_mode=False)
  load(folder)


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_number_that_is_not_finite_is_seen(dtype):
  largest = ml_dtypes.finfo(dtype).max
  array = np.full((3, 70_000), -largest, dtype)
  array[1, :4] = [0, largest, ml_dtypes.finfo(dtype).smallest_subnormal, -0.0]
  assert dtypes.all_finite(array) and dtypes.all_finite(np.empty((0, 3), dtype))
  for value in (np.nan, np.inf, -np.inf):
    for place in ((0, 0), (1, 7), (2, 69_999)):
      wrong = array.copy()
      wrong[place] = value
      assert not dtypes.all_finite(wrong) and dtypes.count_not_finite(wrong) == 1


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
  "key",
  [
    "mlp1.3.weight",
    PROJ,
    "language_model.model.embed_tokens.weight",
    "vision_model.embeddings.patch_embedding.bias",
  ],
)
def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(folder, key, value):
  def change(tensors):
    tensors[key].flat[7] = tensors[key].flat[9] = value

  edit(folder, change)
  refused(folder, f"{SINGLE}: the tensor {key} holds 2 of ", "NaN or infinite", "an earlier checkpoint")
  source = open_source(folder)
  lazy = source.lazy(np.dtype(ml_dtypes.bfloat16))  # As `convert` reads.
  with pytest.raises(UserError, match=key):
    [np.asarray(parameter) for parameter in lazy.values()]


def test_of_the_tensors_that_make_one_parameter_the_bad_one_is_named(folder):
  source = open_source(folder)
  hf = saving.tensors(
    {path: np.asarray(value) for path, value in load(folder).items()},
    layouts.HF.table(layouts.family_of(source.raw), source.config),
    np.dtype("f4"),
  )
  tensors = {key: value.copy() for key, value in hf}
  config = layouts.written_config(source.raw, source.config, layouts.HF, dtype="float32", image_token_id=5)
  (folder / "config.json").write_text(json.dumps(config))
  key = "vision_tower.encoder.layer.2.attention.k_proj.weight"
  tensors[key].flat[0] = np.nan
  save_file(tensors, folder / SINGLE)
  refused(folder, f"the tensor {key} holds 1 of ")


def test_numbers_that_overflow_the_type_they_are_read_in(folder):
  edit(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].astype("f8") + 1e300}))
  refused(folder, HEAD, "too large for float32")


def test_each_device_looks_at_what_it_reads(folder):
  """Of a parameter that is spread, a bad number is seen by the host that reads its part, and by no other."""
  edit(folder, lambda tensors: tensors["mlp1.3.weight"].__setitem__((0, 0), np.nan))
  source = open_source(folder)
  assert source.checkpoint is not None
  path = "mlp1.linear_2.kernel"
  leaf = source.model.shapes[path]
  names = weights.names_of(path, leaf.shape, source.table)
  half = leaf.shape[0] // 2
  weights.read_shard(source.checkpoint, names, leaf, (slice(half, None), slice(None)))
  with pytest.raises(UserError, match=r"mlp1\.3\.weight"):
    weights.read_shard(source.checkpoint, names, leaf, (slice(0, half), slice(None)))
  mesh = jax.make_mesh((8,), ("fsdp",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  with pytest.raises(UserError, match=r"mlp1\.3\.weight"):
    source.load(source.model.shapes, dict.fromkeys(source.model.shapes, place), paths={path})


def test_a_tensor_that_is_read_as_one_is_not_copied(folder, monkeypatch):
  """A table of embeddings is gigabytes of the host's memory, which a copy would take twice."""
  source = open_source(folder)
  assert source.checkpoint is not None
  path, kept = "language_model.model.embed_tokens.embedding", []
  leaf = source.model.shapes[path]
  read = weights.Checkpoint.read

  def keeps(self, name, index=None):
    kept.append(read(self, name, index))
    return kept[-1]

  monkeypatch.setattr(weights.Checkpoint, "read", keeps)
  names = weights.names_of(path, leaf.shape, source.table)
  whole = (slice(None),) * len(leaf.shape)
  for dtype, shares in ((np.float32, True), (ml_dtypes.bfloat16, False)):
    asked = jax.ShapeDtypeStruct(leaf.shape, dtype)
    found = weights.read_shard(source.checkpoint, names, asked, whole)
    assert found.shape == leaf.shape and found.dtype == dtype and found.flags.c_contiguous
    assert np.shares_memory(found, kept[-1]) == shares
    np.testing.assert_array_equal(found, kept[-1].astype(dtype))


def test_a_long_tensor_is_read_in_blocks(folder, monkeypatch):
  """Blocks of five rows, of which the last has fewer; also of a part, and of columns."""
  checkpoint = weights.open_checkpoint(folder)
  rows, columns = checkpoint.shapes[HEAD]
  indices = [
    (slice(0, rows - 1), slice(None)),
    (slice(3, 14), slice(None)),
    (slice(None), slice(1, columns)),
    (slice(7, 8), slice(2, 5)),
  ]
  expected = [checkpoint.read(HEAD, index) for index in indices]
  monkeypatch.setattr(weights, "BLOCK_BYTES", 5 * 4 * columns)
  for index, whole in zip(indices, expected, strict=True):
    found = checkpoint.read(HEAD, index)
    np.testing.assert_array_equal(found, whole)
    assert found.dtype == whole.dtype and found.size
