"""Rotary embeddings by their formulas, and where those that depend on a row's length change over."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.rope import (
  DynamicRope,
  LinearRope,
  Llama3Rope,
  LongRope,
  Rope,
  YarnRope,
  rotate,
  rotations,
)

TRAINED = 8
LONG = LongRope(
  theta=100.0, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0), trained_length=TRAINED, stretch=4.0
)
DYNAMIC = DynamicRope(theta=100.0, factor=2.0, trained_length=TRAINED)
PLAIN = np.array([1.0, 0.1])
"""Radians a position of the two pairs of a head of width 4, with theta 100."""


def angles(rope, length, bound=None):
  """Radians between two positions, in a row of so many of them."""
  cos, sin = rotations(rope, jnp.arange(length)[None], 4, bound=bound or length)
  return np.arctan2(sin, cos)[0, 1]


@pytest.mark.parametrize("bound", [TRAINED, 2 * TRAINED])
def test_a_row_of_the_trained_length_is_not_a_longer_one(bound):
  """Of eight positions, of which the last is the seventh, also in a row that could hold more."""
  np.testing.assert_allclose(angles(LONG, TRAINED, bound), PLAIN / [1, 2], rtol=1e-5)
  np.testing.assert_allclose(angles(LONG, TRAINED + 1, bound + 1), PLAIN / [4, 8], rtol=1e-5)
  np.testing.assert_allclose(angles(DYNAMIC, TRAINED, bound), PLAIN, rtol=1e-5)
  grown = 100 * (2 * (TRAINED + 1) / TRAINED - 1) ** (4 / 2)
  np.testing.assert_allclose(angles(DYNAMIC, TRAINED + 1, bound + 1), [1, grown**-0.5], rtol=1e-5)


def test_rows_of_a_batch_do_not_depend_on_each_other():
  positions = jnp.array([[*range(TRAINED), 0], range(TRAINED + 1)])
  cos, sin = rotations(LONG, positions, 4, bound=TRAINED + 1)
  np.testing.assert_allclose(np.arctan2(sin, cos)[:, 1], [PLAIN / [1, 2], PLAIN / [4, 8]], rtol=1e-5)


def test_scales():
  cos, sin = rotations(LONG, jnp.arange(3)[None], 4, bound=3)
  np.testing.assert_allclose(np.hypot(cos, sin), math.sqrt(1 + math.log(4) / math.log(TRAINED)), rtol=1e-6)
  assert Rope().scale == LinearRope(factor=2.0).scale == DYNAMIC.scale == 1.0
  yarn = YarnRope(theta=100.0, factor=4.0, trained_length=32)
  assert yarn.scale == pytest.approx(0.1 * math.log(4) + 1)


def test_those_that_only_divide():
  np.testing.assert_allclose(LinearRope(theta=100.0, factor=4.0).frequencies(4, 1), PLAIN / 4)
  # 32 turns of the first pair in the trained length, and 3.2 of the second, halfway between 1 and 5.4.
  length = round(32 * 2 * math.pi)
  llama = Llama3Rope(
    theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=5.4, trained_length=length
  )
  blend = (length * 0.1 / (2 * math.pi) - 1) / 4.4
  np.testing.assert_allclose(llama.frequencies(4, 1), [1, 0.1 * (blend + (1 - blend) / 8)])
  # YaRN: pairs that turn more than beta_fast times stay, those that turn less than beta_slow times are divided.
  yarn = YarnRope(
    theta=100.0, factor=4.0, trained_length=length, beta_fast=10.0, beta_slow=4.0, truncate=False
  )
  np.testing.assert_allclose(yarn.frequencies(4, 1), [1, 0.1 / 4])


def test_rotate_turns_pairs_of_both_halves():
  """By a quarter: (a, b) becomes (-b, a)."""
  x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  quarter = jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))
  np.testing.assert_array_equal(rotate(x, *quarter).ravel(), [-3, -4, 1, 2])
