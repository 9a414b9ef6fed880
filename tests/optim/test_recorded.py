"""Optimizers against what other implementations computed: torch.optim.Muon, transformers' Adafactor, bitsandbytes.

`scripts/record_optimizers.py` made the recording.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.optim.eight_bit import BLOCK, decode, encode
from internvl_jax.optim.optimizer import make_optimizer
from tests.support.scripts import load
from tests.support.toy import ASSETS

recorded = load(Path(__file__).parents[2] / "scripts/record_optimizers.py")

FOUND = dict(np.load(ASSETS / "optimizers.npz"))
KERNEL, VECTOR = "language_model.model.layers.0:2.q_proj.kernel", "language_model.model.layers.0:2.norm.scale"


def run(path, shape, **settings):
  """The parameter after each step [steps, *shape], and the last state."""
  training = TrainingArguments(weight_decay=recorded.DECAY, max_grad_norm=0, **settings)
  optimizer = make_optimizer(training, labels={path: "language_model"}, decay={path: True})
  params = {path: jnp.asarray(recorded.start(shape))}
  state, found = optimizer.init(params), []
  rate = {"grad_norm": jnp.float32(0), "learning_rate": jnp.float32(recorded.RATE)}
  step = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params, **rate))
  for grad in recorded.gradients(shape, recorded.STEPS):
    updates, state = step({path: grad}, state, params)
    params = {path: params[path] + updates[path]}
    found.append(params[path])
  return np.stack(found), state


def moved(values, shape):
  """How far the parameters have moved since the start."""
  return values - recorded.start(shape)


def test_muon_is_torchs():
  """Two matrices of a stack; PyTorch's own products are of bfloat16."""
  ours, _ = run(KERNEL, recorded.MUON, optim="muon", optim_args="nesterov=false")
  np.testing.assert_allclose(ours, FOUND["muon_float32"], atol=2e-6)
  theirs = moved(FOUND["muon"], recorded.MUON)
  assert np.linalg.norm(ours - FOUND["muon"]) < 0.02 * np.linalg.norm(theirs)


def test_muon_looks_ahead_as_optax():
  """By Nesterov's momentum with its bias corrected, which torch.optim.Muon does not: the first step is the same."""
  ours, _ = run(KERNEL, recorded.MUON, optim="muon")
  theirs = FOUND["muon_nesterov_float32"]
  np.testing.assert_allclose(ours[0], theirs[0], atol=2e-6)
  apart = [
    np.linalg.norm(ours[i] - theirs[i]) / np.linalg.norm(moved(theirs[i], recorded.MUON)) for i in (1, 2)
  ]
  assert 0.01 < max(apart) < 0.2


def test_adafactor_is_transformers():
  """Two matrices, of which the first one's updates are clipped, and vectors of two layers."""
  ours, _ = run(KERNEL, recorded.ADAFACTOR, optim="adafactor")
  every = recorded.EVERY
  np.testing.assert_allclose(ours[..., ::every, ::every], FOUND["adafactor"], atol=2e-6)
  vectors, _ = run(VECTOR, (2, 40), optim="adafactor")
  np.testing.assert_allclose(vectors, FOUND["adafactor_vector"], atol=2e-6)


@pytest.mark.parametrize(("kind", "signed"), [("mu", True), ("nu", False)])
def test_the_map_of_eight_bits_is_that_of_bitsandbytes(kind, signed):
  numbers = FOUND[f"map_{kind}"]
  codes = np.arange(256, dtype=np.uint8)
  np.testing.assert_allclose(decode(codes, signed=signed), numbers, rtol=1e-6)
  np.testing.assert_array_equal(encode(jnp.asarray(numbers), signed=signed), codes)
  # Right and left of the middles between neighbors.
  middles, gaps = (numbers[1:] + numbers[:-1]) / 2, numbers[1:] - numbers[:-1]
  above, below = (
    np.asarray(encode(jnp.asarray(middles + part * gaps), signed=signed)) for part in (0.01, -0.01)
  )
  np.testing.assert_array_equal(above, codes[1:])
  # A square above 0 has no code of 0.
  np.testing.assert_array_equal(below[not signed :], codes[not signed : -1])
  assert signed or below[0] == 1


def quantized(value, numbers, *, signed):
  """Codes of the nearest numbers, scales, and what both stand for, of a matrix whose rows are cut into blocks."""
  blocks = value.reshape(-1, BLOCK)
  scales = np.abs(blocks).max(axis=1, keepdims=True)
  codes = np.abs((blocks / scales)[..., None] - numbers).argmin(axis=-1)
  codes = codes if signed else np.where(blocks > 0, np.maximum(codes, 1), 0)
  return codes.reshape(value.shape), scales.ravel(), (numbers[codes] * scales).reshape(value.shape)


def test_adam_of_eight_bits_decodes_computes_and_encodes():
  """Three steps by the rule of bitsandbytes, with its maps: parameters, codes and scales."""
  shape, (b1, b2) = (1, 8, 512), (0.9, 0.999)
  ours, state = run(KERNEL, shape, optim="adamw_8bit")
  params, mean, square = recorded.start(shape), np.zeros(shape), np.zeros(shape)
  for step, grad in enumerate(recorded.gradients(shape, recorded.STEPS), start=1):
    mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
    direction = mean / (1 - b1**step) / (np.sqrt(square / (1 - b2**step)) + 1e-8)
    params = params * (1 - recorded.RATE * recorded.DECAY) - recorded.RATE * direction
    mean_codes, mean_scales, mean = quantized(mean, FOUND["map_mu"], signed=True)
    square_codes, square_scales, square = quantized(square, FOUND["map_nu"], signed=False)
    np.testing.assert_allclose(ours[step - 1], params, atol=2e-6)
  (moments,) = [
    leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(leaf, "nu")
  ]
  for found, expected in ((moments.mu, mean_codes), (moments.nu, square_codes)):
    apart = np.abs(np.asarray(found[KERNEL].codes, int) - expected)
    # One or two of 4,096 lie in the middle between two numbers, to rounding.
    assert apart.max() <= 1 and apart.sum() <= 2
  np.testing.assert_allclose(np.ravel(moments.mu[KERNEL].scales), mean_scales, rtol=1e-5)
  np.testing.assert_allclose(np.ravel(moments.nu[KERNEL].scales), square_scales, rtol=1e-5)
