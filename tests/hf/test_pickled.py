"""Projectors as torch.save writes them are read without torch, and nothing that they say is run."""

import pickle
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.errors import UserError
from internvl_jax.hf.model import open_source, with_projector
from internvl_jax.hf.pickled import PickledTensors
from tests.support.toy import CURVE

torch = pytest.importorskip("torch")
INIT = CURVE / "init"


@pytest.fixture
def path(tmp_path):
  return tmp_path / "mlp.pth"


def test_every_form_of_a_tensor_is_read_as_torch_has_it(path):
  base = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "whole": base,
    "turned": base.T,
    "part": base[1:3, ::2],  # of the same storage
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 5),
    "parameter": torch.nn.Parameter(base + 1),
    "half": base.half(),
    "double": base.double(),
    "bfloat": base.bfloat16(),
  }
  torch.save(tensors, path)
  found = PickledTensors(path)
  assert found.keys() == list(tensors)
  for name, tensor in tensors.items():
    ours = found.get_tensor(name)
    assert list(ours.shape) == found.get_slice(name).get_shape() == list(tensor.shape)
    np.testing.assert_array_equal(ours.astype(np.float64), tensor.detach().double().numpy())
  assert {name: found.get_slice(name).get_dtype() for name in ("whole", "half", "double", "bfloat")} == {
    "whole": "F32",
    "half": "F16",
    "double": "F64",
    "bfloat": "BF16",
  }
  np.testing.assert_array_equal(found.get_slice("turned")[2:4, 1:], base.T[2:4, 1:].numpy())


@pytest.mark.parametrize("prefix", ["", "mlp1."])
def test_a_projector_is_taken_from_it(path, prefix):
  old = load_file(INIT / "model.safetensors")
  bare = {key.removeprefix("mlp1."): 2 * value for key, value in old.items() if key.startswith("mlp1.")}
  module = torch.nn.Module()
  state = module.state_dict() | {prefix + key: torch.from_numpy(value) for key, value in bare.items()}
  torch.save(state, path)
  source = with_projector(open_source(INIT), str(path))
  place = dict.fromkeys(source.model.shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  params = source.load(source.model.shapes, place, paths={"mlp1.linear_1.bias", "mlp1.linear_1.kernel"})
  np.testing.assert_array_equal(params["mlp1.linear_1.bias"], bare["1.bias"])
  np.testing.assert_array_equal(params["mlp1.linear_1.kernel"], bare["1.weight"].T)


class Bomb:
  """A pickle that leaves a trace when it is loaded."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


def rewritten(path, name, content):
  """The archive with one entry changed."""
  with zipfile.ZipFile(path) as archive:
    entries = {info.filename: archive.read(info) for info in archive.infolist()}
  with zipfile.ZipFile(path, "w") as archive:
    for key, value in entries.items():
      archive.writestr(key, content if key.endswith(name) else value)


def test_code_is_never_run(path, tmp_path):
  torch.save({"weight": torch.zeros(2), "bomb": Bomb(tmp_path / "trace")}, path)
  with pytest.raises(UserError, match=r"mlp\.pth: .*asks for (io|_io)\.open, which is code and is never run"):
    PickledTensors(path)
  torch.save({"weight": torch.zeros(2)}, path)
  rewritten(path, "data.pkl", pickle.dumps(Bomb(tmp_path / "trace")))
  with pytest.raises(UserError, match="is never run"):
    PickledTensors(path)
  assert not (tmp_path / "trace").exists()


def old_form(path):
  torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


def pointer(path):
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (old_form, "before PyTorch 1.6 they were none"),
    (cut, "download it again"),
    (pointer, "Git LFS"),
    (lambda path: rewritten(path, "data/0", b"short"), "has not the 2 numbers"),
    (lambda path: rewritten(path, "data.pkl", b"\x80\x02K"), "or damaged"),
    (lambda path: rewritten(path, "byteorder", b"big"), "big-endian"),
    (
      lambda path: torch.save({"model": {"weight": torch.zeros(2)}}, path),
      "other things than tensors by name",
    ),
    (lambda path: torch.save({"ids": torch.zeros(2, dtype=torch.int64)}, path), "torch.LongStorage"),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), "which is code and is never run"),
  ],
)
def test_what_is_none_is_refused_in_a_line(path, damage, words):
  torch.save({"weight": torch.zeros(2)}, path)
  damage(path)
  with pytest.raises(UserError) as error:
    PickledTensors(path)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_beyond_its_numbers_is_refused(path):
  torch.save({"weight": torch.zeros(2, 3)}, path)
  with zipfile.ZipFile(path) as archive:
    (text,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
  # The shape's 2 (an opcode K and the byte) becomes 200.
  shape = b"K\x02K\x03\x86"
  assert text.count(shape) == 1
  rewritten(path, "data.pkl", text.replace(shape, b"K\xc8K\x03\x86"))
  with pytest.raises(UserError, match=r"shape \(200, 3\) beyond its 6 numbers"):
    PickledTensors(path)


def test_a_flipped_bit_is_a_line_or_changes_no_number(path):
  torch.save({"weight": torch.ones(3)}, path)
  whole, random, told = path.read_bytes(), np.random.default_rng(0), 0
  for _ in range(60):
    damaged = bytearray(whole)
    damaged[random.integers(len(whole))] ^= 1 << int(random.integers(8))
    path.write_bytes(bytes(damaged))
    words = read_or_words(path)
    told += words is not None
    assert "\n" not in (words or "")
  assert told > 10


def read_or_words(path):
  """What is said of a file that is refused; None if it is read, and then its numbers are right."""
  try:
    found = PickledTensors(path)
    numbers = [found.get_tensor(key) for key in found.keys()]
  except UserError as error:
    return str(error)
  np.testing.assert_array_equal(numbers, [np.ones(3)])
  return None
