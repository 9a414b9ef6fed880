"""Numbers of four bits are read as the OCP's Microscaling Formats v1.0 define them."""

import numpy as np

from internvl_jax.hf.tables import MXFP4

# Sign, two bits of exponent (bias 1), one of mantissa: table 3 of the format's description.
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES += [-value for value in VALUES]


def test_a_block_by_hand():
  """Of two rows of 32 numbers, the first one counts through all of them; the lower half of a byte comes first."""
  codes = np.stack([np.arange(32) % 16, (3 * np.arange(32) + 1) % 16]).astype(np.uint8)
  blocks = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(1, 2, 1, 16)
  scales = np.array([127, 130], np.uint8).reshape(1, 2, 1)  # 2^0 and 2^3
  found = MXFP4.load([blocks, scales], (1, 32, 2))
  expected = np.array(VALUES)[codes] * np.array([[1.0], [8.0]])
  np.testing.assert_array_equal(found[0].T, expected)
  assert MXFP4.shapes((1, 32, 2)) == [(1, 2, 1, 16), (1, 2, 1)]


def test_scales_of_both_ends():
  blocks = np.full((1, 1, 1, 16), 0x22, np.uint8)
  for scale, power in ((0, -127), (1, -126), (254, 127)):
    found = MXFP4.load([blocks, np.full((1, 1, 1), scale, np.uint8)], (1, 32, 1))
    np.testing.assert_array_equal(found, np.full((1, 32, 1), 2.0**power, np.float32))
