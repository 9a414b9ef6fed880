"""Divergences from a teacher against their definition in float64: values and gradients, in chunks and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.losses import distillation, vocab_parallel
from internvl_jax.losses.distillation import Divergence, TopK
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules

ROWS, TOKENS, WIDTH, VOCAB = 2, 8, 8, 150


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Two chunks of the vocabulary, the last not full."""
  monkeypatch.setattr(vocab_parallel, "CHUNK_LOGITS", ROWS * TOKENS * 100)


def arrays():
  """Hidden states and kernels of a student and of a teacher, targets, and weights of both losses."""
  rng = np.random.default_rng(0)
  states = [rng.normal(size=(ROWS, TOKENS, WIDTH)) for _ in range(2)]
  kernels = [rng.normal(size=(WIDTH, VOCAB)) for _ in range(2)]
  targets = rng.integers(0, VOCAB, (ROWS, TOKENS))
  targets[0, 0], targets[0, 1], targets[1, -1] = VOCAB - 1, IGNORE_INDEX, 0
  return states, kernels, targets, rng.uniform(0.5, 2, (2, ROWS, TOKENS))


def softmax(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def by_definition(hidden, kernel, theirs, targets, k, how):
  """Cross-entropies and divergences of tokens, and the derivatives of each by the logits, in float64."""
  T = how.temperature
  real = targets != IGNORE_INDEX
  logits = hidden @ kernel
  q, p = softmax(logits / T), softmax(theirs / T)
  best = np.argsort(-p, -1, kind="stable")[..., :k]
  is_class = np.zeros(p.shape, bool)
  np.put_along_axis(is_class, best, True, -1)
  tails = [np.where(is_class, 0, x).sum(-1, keepdims=True) for x in (p, q)]
  # Each token has the ratio of its class: of itself, or of the tail.
  p_tail, q_tail = (np.maximum(x, 1e-300) for x in tails)
  ratio = np.where(is_class, p / q, p_tail / q_tail)
  if how.kind == "forward":
    divergence = (ratio * q * np.log(ratio)).sum(-1)
    d_scaled = q - ratio * q
  else:
    divergence = -(q * np.log(ratio)).sum(-1)
    d_scaled = q * (-np.log(ratio) - divergence[..., None])
  probs = softmax(logits)
  picked = np.take_along_axis(probs, np.maximum(targets, 0)[..., None], -1)[..., 0]
  d_label = probs - np.eye(kernel.shape[1])[np.maximum(targets, 0)]
  losses = np.where(real, -np.log(picked), 0), np.where(real, T**2 * divergence, 0)
  return losses, (d_label * real[..., None], T * d_scaled * real[..., None])


def known(theirs, k, temperature):
  """The teacher's top k, from its logits in float64."""
  p = softmax(theirs / temperature)
  ids = np.argsort(-p, -1, kind="stable")[..., :k]
  logps = np.log(np.take_along_axis(p, ids, -1))
  tail = np.log(np.maximum(1 - np.exp(logps).sum(-1), 1e-7))
  return TopK(*(jnp.asarray(x) for x in (ids.astype("i4"), logps.astype("f4"), tail.astype("f4"))))


def weighted(name, hidden, kernel, targets, teacher, how):
  if name == "plain":
    return distillation.token_losses(hidden @ kernel, targets, teacher, how)
  return distillation.linear_token_losses(hidden, kernel, targets, teacher, how)


FORWARD, REVERSE = Divergence("forward", 2.5), Divergence("reverse", 0.7)


@pytest.mark.parametrize(
  ("name", "k", "how"),
  [
    ("plain", 7, REVERSE),
    ("chunks", 7, FORWARD),
    ("chunks", 7, REVERSE),
    ("chunks", 1, Divergence()),
    ("chunks", VOCAB, FORWARD),
  ],
)
def test_values_and_gradients(name, k, how):
  (ours, theirs), (kernel, other), targets, weights = arrays()
  theirs = theirs @ other
  losses, d_logits = by_definition(ours, kernel, theirs, targets, k, how)
  teacher = known(theirs, k, how.temperature)
  inputs = [jnp.asarray(x, jnp.float32) for x in (ours, kernel)]
  on_device = jnp.asarray(weights, jnp.float32)

  def run(hidden, kernel):
    found = weighted(name, hidden, kernel, jnp.asarray(targets), teacher, how)
    return jnp.sum(jnp.stack(found) * on_device), found

  (_, found), (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(*inputs)
  for value, wanted in zip(found, losses, strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
  wanted = (np.stack(d_logits) * weights[..., None]).sum(0)
  np.testing.assert_allclose(d_hidden, wanted @ kernel.T, rtol=0, atol=2e-4)
  np.testing.assert_allclose(d_kernel, np.einsum("rsd,rsv->dv", ours, wanted), rtol=0, atol=2e-4)


def test_a_tail_of_next_to_nothing_has_gradients():
  """A student that is sure of what the teacher is not: the tail's probability is below what 1 less the others can tell."""
  logits = jnp.full((1, 1, 5), -30.0).at[..., 0].set(0.0)
  teacher = TopK(*(jnp.asarray(x) for x in (np.array([[[0]]], "i4"), np.log([[[0.5]]]), np.log([[0.5]]))))
  kernel, targets = jnp.eye(5), jnp.zeros((1, 1), jnp.int32)
  gradient = jax.grad(
    lambda x: distillation.linear_token_losses(x, kernel, targets, teacher, Divergence()).divergence.sum()
  )(logits)
  np.testing.assert_allclose(gradient[0, 0], [0.5, *[-0.125] * 4], atol=1e-6)


def on_mesh(function, *operands):
  """What a function computes on eight devices, of which pairs share the vocabulary and tokens."""
  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), jax.devices()[:8])
  with rules.scope(mesh):
    return jax.jit(function)(*jax.device_put(operands, rules.replicated(mesh)))


def test_on_a_mesh():
  """Teacher and student, sharded over rows, tokens, widths and the vocabulary, have the numbers of one device."""
  (ours, theirs), kernels, targets, weights = arrays()
  operands = [jnp.asarray(x, jnp.float32) for x in (ours, theirs, *kernels, *weights)]

  def run(hidden, of_teacher, kernel, other, *weights):
    top = distillation.top_log_probs(of_teacher, other, k=7, size=VOCAB - 3, temperature=2.5)

    def total(hidden, kernel):
      found = distillation.linear_token_losses(hidden, kernel, jnp.asarray(targets), top, FORWARD)
      return jnp.sum(jnp.stack(found) * jnp.stack(weights)), found

    return top, jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, kernel)

  one, eight = jax.jit(run)(*operands), on_mesh(run, *operands)
  for found, wanted in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
  # And these are the teacher's, without what pads its vocabulary.
  wanted = known((theirs @ kernels[1])[..., : VOCAB - 3], 7, 2.5)
  np.testing.assert_array_equal(one[0].ids, wanted.ids)
  np.testing.assert_allclose(one[0].logps, wanted.logps, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(one[0].tail, wanted.tail, rtol=1e-4, atol=1e-4)
