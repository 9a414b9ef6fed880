"""Both ways to differentiate activations have the same numbers; on CPUs, nothing but the inputs is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.activations import AUTOMATIC, FROM_INPUTS

NAMES = {"gelu": 1, "swiglu": 2}


def inputs_of(name):
  """From the middle to where the functions are flat; what is multiplied differs from place to place."""
  x = np.linspace(-9, 9, 181)
  return [jnp.asarray(value, jnp.float32) for value in (x, np.cos(3 * x))[: NAMES[name]]]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name):
  inputs = inputs_of(name)
  cotangent = jnp.arange(1.0, 182) / 50
  found, expected = (jax.vjp(getattr(way, name), *inputs) for way in (FROM_INPUTS, AUTOMATIC))
  np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6)
  for ours, theirs in zip(found[1](cotangent), expected[1](cotangent), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name):
  inputs = [x.astype(jnp.bfloat16) for x in inputs_of(name)]
  function = getattr(FROM_INPUTS, name)
  exact = function(*(x.astype(jnp.float32) for x in inputs))
  found = function(*inputs)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_only_inputs_are_kept(name):
  _, pull = jax.vjp(getattr(FROM_INPUTS, name), *inputs_of(name))
  assert len(jax.tree.leaves(pull)) == NAMES[name]
