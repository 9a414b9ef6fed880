"""NF4 and int8 by bitsandbytes' recorded numbers (`scripts/record_bitsandbytes.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.weight_formats import FORMATS, NF4_VALUES, dynamic_map, format_of
from tests.support.toy import ASSETS

NF4, INT8 = FORMATS["nf4"], FORMATS["int8"]


@pytest.fixture(scope="module")
def recorded():
  return dict(np.load(ASSETS / "bitsandbytes.npz"))


def kernel(recorded, i):
  """A recorded weight [F, D] as ours [D, F]."""
  return jnp.asarray(recorded[f"weight_{i}"].T, jnp.bfloat16)


def in_their_order(codes, shape):
  """Our codes, whose blocks are halves in the two parts of a byte, as theirs: neighbors in one byte, a row after another."""
  halves = np.asarray(codes).reshape(-1, 32, shape[0])
  rows = np.concatenate([halves >> 4, halves & 15], axis=1).reshape(shape[1], shape[0]).T.reshape(-1)
  return rows[::2] << 4 | rows[1::2]


def assert_same_but_for_ties(ours, theirs, to_border):
  """Codes are equal, but where a number is as near to one value as to the next.

  Ours is the nearest. bitsandbytes' program for CPUs, which made the recording, takes the other one of four scales that are
  4e-6 from the border, and of weights at half a step, as it divides otherwise.
  """
  ours, theirs = np.int32(ours), np.int32(theirs)
  differ = ours != theirs
  assert np.abs(ours - theirs).max() <= 1 and np.abs(to_border[differ]).max(initial=0) < 1e-5
  assert differ.mean() <= 0.0125


def test_values_are_theirs(recorded):
  np.testing.assert_array_equal(np.float32(NF4_VALUES), recorded["nf4_values"])
  np.testing.assert_allclose(dynamic_map(), recorded["dynamic_map"], rtol=2e-7)


@pytest.mark.parametrize("i", [0, 1])
def test_nf4_is_theirs(recorded, i):
  parts = jax.jit(NF4.quantize)(kernel(recorded, i))
  shape = recorded[f"weight_{i}"].shape
  np.testing.assert_array_equal(in_their_order(parts["codes"], shape), recorded[f"codes_{i}"])
  scales = recorded[f"weight_{i}"].reshape(-1, 64)
  scales = np.abs(scales).max(axis=1) - recorded[f"scale_offset_{i}"]
  scaled = scales / np.repeat(recorded[f"scale_scales_{i}"], 256)[: len(scales)]
  borders = (dynamic_map()[1:] + dynamic_map()[:-1]) / 2
  to_border = np.abs(scaled[:, None] - borders).min(axis=1)
  assert_same_but_for_ties(parts["scales"].T.reshape(-1), recorded[f"scales_{i}"], to_border)
  np.testing.assert_allclose(parts["scale_scales"], recorded[f"scale_scales_{i}"], rtol=3e-7)
  np.testing.assert_allclose(parts["scale_offset"][0], recorded[f"scale_offset_{i}"], rtol=3e-7)
  theirs = recorded[f"restored_{i}"].T
  # By their codes of scales; a scale is a sum of a code's value and the mean, of which both are rounded.
  parts["scales"] = jnp.asarray(recorded[f"scales_{i}"].reshape(shape[0], -1).T)
  largest = recorded[f"scale_offset_{i}"] + recorded[f"scale_scales_{i}"].max()
  np.testing.assert_allclose(jax.jit(NF4.restore)(parts), theirs, rtol=0, atol=3e-7 * largest)
  assert NF4.shape(parts["codes"].shape) == theirs.shape


@pytest.mark.parametrize("i", [0, 1])
def test_int8_is_theirs(recorded, i):
  weight = recorded[f"weight_{i}"].astype("f2")  # As `Linear8bitLt` does it.
  parts = jax.jit(INT8.quantize)(weight.T)
  steps = weight.astype("f8") * 127 / np.abs(weight.astype("f8")).max(axis=1, keepdims=True)
  assert_same_but_for_ties(parts["codes"].T, recorded[f"int8_{i}"], np.abs(steps % 1 - 0.5))
  parts["codes"] = jnp.asarray(recorded[f"int8_{i}"].T)
  np.testing.assert_array_equal(parts["scales"][0], recorded[f"int8_scales_{i}"])
  np.testing.assert_allclose(jax.jit(INT8.restore)(parts), recorded[f"int8_restored_{i}"].T, rtol=3e-7)


def test_every_code_of_a_scale_has_its_value():
  parts = {
    "scales": jnp.arange(256, dtype=jnp.uint8)[None],
    "scale_scales": jnp.ones(1),
    "scale_offset": jnp.zeros(1),
  }
  np.testing.assert_allclose(jax.jit(NF4.expand)(parts)[0], dynamic_map(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_layers_and_experts_are_those_of_one(name):
  kernels = jax.random.normal(jax.random.key(0), (2, 3, 128, 24))
  form = FORMATS[name]
  quantize, restore = jax.jit(form.quantize), jax.jit(form.restore)
  together = quantize(kernels)
  for i in np.ndindex(2, 3):
    alone = quantize(kernels[i])
    for part, value in alone.items():
      np.testing.assert_allclose(together[part][i], value, rtol=1e-6, err_msg=part)
    np.testing.assert_allclose(restore(together)[i], restore(alone), rtol=0, atol=1e-6)
  assert format_of(together["codes"]) is form


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
  there_and_back = jax.jit(lambda kernel: FORMATS[name].restore(FORMATS[name].quantize(kernel)))
  assert not there_and_back(jnp.zeros((64, 4))).any()


def test_bits_of_a_weight():
  """4 for a code, 8 / 64 for its scale's, 32 / (64 * 256) for that one's own: 4.127, as the paper has it."""
  parts = jax.eval_shape(NF4.quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
  bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in parts.values()) / 4096**2
  assert bits == pytest.approx(4.127, abs=1e-3)
