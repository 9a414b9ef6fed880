"""Divergences from a teacher's distributions against their definition in float64: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.losses import divergence, vocab_parallel
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh

ROWS, TOKENS, WIDTH, VOCAB = 2, 8, 8, 150


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Several chunks of the vocabulary, the last one padded."""
  monkeypatch.setattr(vocab_parallel, "CHUNK_LOGITS", 2 * ROWS * TOKENS * 60)
  monkeypatch.setattr(vocab_parallel, "_LANES", 1)


def arrays():
  rng = np.random.default_rng(0)
  hidden, teacher = rng.normal(size=(2, ROWS, TOKENS, WIDTH))
  kernel = rng.normal(size=(WIDTH, VOCAB))
  teacher[0, 0] = hidden[0, 0]
  return hidden, kernel, teacher, kernel + 0.1 * rng.normal(size=kernel.shape) * (np.arange(VOCAB) > 20)


def by_definition(hidden, kernel, teacher, teacher_kernel):
  """Divergences, and their gradients by our logits."""
  ours, theirs = (
    np.exp(x @ k) / np.exp(x @ k).sum(-1, keepdims=True)
    for x, k in ((hidden, kernel), (teacher, teacher_kernel))
  )
  return (theirs * np.log(theirs / ours)).sum(-1), ours - theirs


def plain(hidden, kernel, teacher, teacher_kernel):
  return divergence.token_divergences(hidden @ kernel, teacher @ teacher_kernel)


@pytest.mark.parametrize(
  ("function", "sizes"),
  [
    (plain, {}),
    (divergence.linear_token_divergences, {}),
    (divergence.linear_token_divergences, {"fsdp": 2, "sequence": 2, "tensor": 2}),
  ],
  ids=["plain", "chunked", "eight devices"],
)
def test_values_and_gradients(function, sizes):
  """Of a weighted sum, on one device and on several; the teacher gets no gradient from the fused ones."""
  inputs = arrays()
  found, d_logits = by_definition(*inputs)
  weights = np.random.default_rng(1).uniform(0.5, 2, (ROWS, TOKENS))

  def run(*inputs):
    with rules.scope(mesh if sizes else None):
      values = function(*inputs)
    return jnp.sum(values * jnp.asarray(weights, jnp.float32)), values

  mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[: 8 if sizes else 1])
  inputs = [jax.device_put(x.astype("f4"), rules.replicated(mesh)) for x in inputs]
  (_, values), (d_hidden, d_kernel, d_teacher) = jax.jit(
    jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  )(*inputs)
  np.testing.assert_allclose(values, found, rtol=0, atol=2e-5)
  d_logits = d_logits * weights[..., None]
  np.testing.assert_allclose(d_hidden, d_logits @ arrays()[1].T, rtol=0, atol=1e-4)
  np.testing.assert_allclose(d_kernel, np.einsum("rse,rsv->ev", arrays()[0], d_logits), rtol=0, atol=1e-4)
  if function is not plain:
    assert not np.any(d_teacher)


def test_a_teacher_of_the_same_numbers_is_no_distance_away():
  hidden, kernel, *_ = (jnp.asarray(x, jnp.float32) for x in arrays())
  assert not np.any(divergence.linear_token_divergences(hidden, kernel, hidden, kernel))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_small_divergences_keep_their_digits(size):
  """By which the tiles that change least are told apart."""
  hidden, kernel, *_ = (x.astype("f4") for x in arrays())
  teacher = hidden + np.float32(size) * np.random.default_rng(1).normal(size=hidden.shape).astype("f4")
  found = divergence.linear_token_divergences(hidden, kernel, teacher, kernel)
  wanted, _ = by_definition(*(x.astype("f8") for x in (hidden, kernel, teacher, kernel)))
  # Logits are rounded themselves, to 1e-6 of differences of 1e-4.
  np.testing.assert_allclose(found, wanted, rtol=3e-2 if size == 1e-4 else 1e-3)


def test_a_kernel_that_does_not_train_costs_no_gradient():
  """And as the teacher's it stays one array."""
  hidden, kernel, teacher, _ = (jnp.asarray(x, jnp.float32) for x in arrays())

  def run(hidden):
    return jnp.sum(divergence.linear_token_divergences(hidden, kernel, teacher, kernel))

  text = str(jax.make_jaxpr(jax.grad(run))(hidden))
  assert f"f32[{WIDTH},{VOCAB}]" in text and text.count("dot_general") == 5
