"""How tensors are divided among files."""

import numpy as np

from internvl_jax.hf import saving


def test_no_file_exceeds_its_size_unless_one_tensor_does():
  items = [
    (name, np.zeros(size, np.int8)) for name, size in zip("abcdef", (40, 40, 40, 130, 60, 40), strict=True)
  ]
  found = [list(group) for group in saving._split_by_bytes(iter(items), 100)]
  assert found == [["a", "b"], ["c"], ["d"], ["e", "f"]]
  assert [list(group) for group in saving._split_by_bytes(iter(items), 1000)] == [list("abcdef")]


def test_an_older_models_files_are_gone(tmp_path):
  """Of several files or of one, with the index."""
  tensors = [(name, np.ones(100, np.float32)) for name in "abc"]
  for size, names in ((400, 3), (10_000, 1), (800, 2)):
    saving.save(tmp_path, iter(tensors), shard_bytes=size)
    assert len(list(tmp_path.glob("model*.safetensors"))) == names
    assert (tmp_path / "model.safetensors.index.json").exists() == (names > 1)
  assert not list(tmp_path.glob("*.tmp"))
