"""Cross-entropies against their definition in float64: values, gradients, ignored targets and incoming gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.losses import lm, vocab_parallel

ROWS, TOKENS, WIDTH, VOCAB = 2, 7, 8, 150


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Several chunks of tokens, the last not full, and several of the vocabulary."""
  monkeypatch.setattr(lm, "CHUNK", 5)
  monkeypatch.setattr(vocab_parallel, "CHUNK_LOGITS", ROWS * TOKENS * 100)


def arrays():
  rng = np.random.default_rng(0)
  hidden, kernel = rng.normal(size=(ROWS, TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
  targets = rng.integers(0, VOCAB, (ROWS, TOKENS))
  targets[0, 0], targets[0, 1], targets[1, -1] = VOCAB - 1, IGNORE_INDEX, 0
  return hidden, kernel, targets, rng.uniform(0.5, 2, (ROWS, TOKENS))


def by_definition(hidden, kernel, targets):
  """Losses of tokens, and the gradients of their weighted sum: softmax less one at the target."""
  logits = hidden @ kernel
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  real = targets != IGNORE_INDEX
  picked = np.take_along_axis(probs, np.maximum(targets, 0)[..., None], -1)[..., 0]
  d_logits = (probs - np.eye(VOCAB)[np.maximum(targets, 0)]) * real[..., None]
  return np.where(real, -np.log(picked), 0), d_logits


def weighted(name, hidden, kernel, targets, weights):
  if name == "plain":
    return lm.cross_entropy(hidden @ kernel, targets, weights)
  if name == "chunks of tokens":
    return lm.chunked_linear_cross_entropy(hidden, kernel, targets, weights)
  return jnp.sum(vocab_parallel.linear_token_losses(hidden, kernel, targets) * weights)


@pytest.mark.parametrize("name", ["plain", "chunks of tokens", "chunks of the vocabulary"])
def test_values_and_gradients(name):
  """Of three times the loss, so that the gradient that comes in is not one."""
  hidden, kernel, targets, weights = arrays()
  losses, d_logits = by_definition(hidden, kernel, targets)
  inputs = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]

  def run(hidden, kernel):
    return 3 * weighted(name, hidden, kernel, jnp.asarray(targets), jnp.asarray(weights, jnp.float32))

  value, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*inputs)
  np.testing.assert_allclose(value, 3 * (losses * weights).sum(), rtol=1e-5)
  d_logits = 3 * d_logits * weights[..., None]
  np.testing.assert_allclose(d_hidden, d_logits @ kernel.T, rtol=0, atol=1e-4)
  np.testing.assert_allclose(d_kernel, np.einsum("rsd,rsv->dv", hidden, d_logits), rtol=0, atol=1e-4)


def test_token_losses():
  hidden, kernel, targets, _ = arrays()
  losses, _ = by_definition(hidden, kernel, targets)
  logits = jnp.asarray(hidden @ kernel, jnp.float32)
  np.testing.assert_allclose(lm.token_losses(logits, jnp.asarray(targets)), losses, rtol=1e-5, atol=1e-6)
