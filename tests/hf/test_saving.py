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
