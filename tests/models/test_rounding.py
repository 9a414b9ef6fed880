"""Eight-bit integers are the nearest ones."""

import jax.numpy as jnp
import numpy as np

from internvl_jax.models.quantized import rounded


def test_to_the_nearest_integer():
  values = jnp.array([127.0, 0.4, 0.6, -0.6, -1.4, 2.5])
  found, scale = rounded(values, jnp.dtype(jnp.int8), [0])
  np.testing.assert_allclose(scale, [1.0])
  assert found.tolist() == [127, 0, 1, -1, -1, 2]
