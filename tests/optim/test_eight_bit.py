"""Moments of eight bits: what has them, where their blocks lie, and that learning is as with moments of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.hf.embeddings import EMBEDDING
from internvl_jax.optim.eight_bit import block_of, decode, encode
from internvl_jax.optim.optimizer import idle_settings, make_optimizer

LAYER = "language_model.model.layers.0:32."


@pytest.mark.parametrize(
  ("path", "shape", "axes", "block"),
  [
    # Along the axis that fsdp leaves whole, in the published 8B's shapes.
    (f"{LAYER}q_proj.kernel", (32, 4096, 4096), ("layers", "embed", "heads"), (2, 128)),
    (f"{LAYER}o_proj.kernel", (32, 4096, 4096), ("layers", "heads", "embed"), (1, 128)),
    (f"{LAYER}mlp.experts.up.kernel", (32, 8, 2048, 768), ("layers", "expert", "embed", "mlp"), (3, 128)),
    # A vocabulary that nothing divides, and narrow adapters.
    ("language_model.lm_head.kernel", (4096, 92553), ("table", "vocab"), (0, 128)),
    (f"{LAYER}q_proj.adapter.a", (32, 4096, 16), ("layers", "embed", None), (1, 128)),
    (f"{LAYER}q_proj.adapter.b", (32, 64, 4096), ("layers", None, "heads"), (2, 128)),
    ("mlp1.linear_1.kernel", (896, 896), None, (1, 128)),
    # Vectors, small and odd matrices, the input embedding.
    (f"{LAYER}norm.scale", (32, 4096), ("layers", "embed"), None),
    (f"{LAYER}small.kernel", (32, 63, 64), ("layers", "embed", "heads"), None),
    (f"{LAYER}odd.kernel", (32, 1001, 1001), ("layers", "embed", "heads"), None),
    (EMBEDDING, (92544, 4096), ("vocab", "table"), None),
  ],
)
def test_blocks_lie_where_shards_do_not_cut_them(path, shape, axes, block):
  assert block_of(path, shape, axes) == block


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_of_the_nearest_numbers(signed):
  x = np.concatenate([10.0 ** np.linspace(-8, 0, 4001), [0.0]]).astype(np.float32)
  x = np.concatenate([-x, x]) if signed else x
  numbers = np.asarray(decode(jnp.arange(256, dtype=jnp.uint8), signed=signed))
  nearest = np.abs(x[:, None] - numbers).argmin(axis=1)
  nearest = nearest if signed else np.where(x > 0, np.maximum(nearest, 1), 0)
  found = np.asarray(encode(jnp.asarray(x), signed=signed))
  # A number in the middle between two has either one.
  np.testing.assert_allclose(np.abs(x - numbers[found]), np.abs(x - numbers[nearest]), rtol=1e-4, atol=1e-12)
  assert (found == nearest).mean() > 0.999


def losses(optim, steps=300):
  """Of a network with one hidden layer that learns a function of another, batch after batch."""
  rng = np.random.default_rng(0)
  params = {
    "a.kernel": jnp.asarray(rng.normal(size=(32, 256)) / 6, jnp.float32),
    "a.bias": jnp.zeros(256),
    "b.kernel": jnp.asarray(rng.normal(size=(256, 16)) / 16, jnp.float32),
  }
  target = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
  training = TrainingArguments(optim=optim, max_grad_norm=0)
  optimizer = make_optimizer(
    training, labels=dict.fromkeys(params, "mlp1"), decay=dict.fromkeys(params, False)
  )

  def loss(params, x):
    hidden = jax.nn.relu(x @ params["a.kernel"] + params["a.bias"])
    return jnp.mean((hidden @ params["b.kernel"] - jnp.sin(x @ target)) ** 2)

  def step(carry, x):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, x)
    updates, state = optimizer.update(
      grads, state, params, grad_norm=jnp.float32(0), learning_rate=jnp.float32(3e-3)
    )
    return (jax.tree.map(jnp.add, params, updates), state), value

  xs = jnp.asarray(rng.normal(size=(steps, 64, 32)), jnp.float32) / 6
  (_, state), values = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(
    (params, optimizer.init(params)), xs
  )
  return np.asarray(values), sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_learning_is_as_with_float32():
  """The loss falls to an eighth, and stays within 5 % of that of float32 (the mean of ten steps), at less than a third of the bytes."""
  (whole, bytes_whole), (eight, bytes_eight) = losses("adamw_torch"), losses("adamw_8bit")
  whole, eight = (values.reshape(-1, 10).mean(axis=1) for values in (whole, eight))
  assert whole[-1] < whole[0] / 8 and bytes_eight < 0.3 * bytes_whole
  np.testing.assert_allclose(eight, whole, rtol=0.05)


def test_paged_is_said_to_be_none():
  (line,) = idle_settings(TrainingArguments(optim="paged_adamw_8bit"))
  assert line == "training.optim='paged_adamw_8bit': moments stay on the devices, nothing is paged"
  assert idle_settings(TrainingArguments(optim="adamw_bnb_8bit", adam_beta1=0.5)) == []
