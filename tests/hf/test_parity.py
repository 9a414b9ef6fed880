"""The forward pass, the losses and the gradients agree with what PyTorch recorded for the reference's model."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internvl_jax import verification
from internvl_jax.hf.model import open_source
from internvl_jax.hf.weights import names_of
from internvl_jax.losses import lm
from internvl_jax.models.projector import pixel_shuffle
from internvl_jax.models.towers.tower import resize_position_embedding
from tests.support import forked
from tests.support.toy import ASSETS

# Whole models recorded in PyTorch: the reference's own classes (layout internvl), transformers' (layout hf).
RECORDED = ("qwen2", "internlm2", "hf_qwen3")
TOLERANCES = {"logits": 2e-4, "loss": 1e-5, "loss_square": 1e-5, "vit_last_hidden": 1e-4, "features": 1e-4}


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request):
  """A recorded model's folder, and what ours computes on its inputs."""
  folder = ASSETS / request.param
  source = open_source(folder)
  inputs = verification.with_positions(source, verification.read_inputs(str(folder / "io.npz")))
  return folder, source, *verification.run_with_gradients(source.model, verification.load(source), inputs)


def test_outputs_agree_with_the_recording(recorded):
  folder, _, ours, grads = recorded
  theirs = np.load(folder / "io.npz")
  compared = [name for name in TOLERANCES if name in theirs]
  assert {"logits", "loss"} <= set(compared)
  for name in compared:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=TOLERANCES[name], err_msg=name)
  np.testing.assert_allclose(optax.tree.norm(grads), theirs["grad_norm"], rtol=1e-4)


def test_gradient_norm_of_every_parameter(recorded):
  folder, source, _, grads = recorded
  compare_gradient_norms(source, grads, json.loads((folder / "grad_norms.json").read_text()))


def compare_gradient_norms(source, grads, theirs):
  """Compares the gradients of a checkpoint's tensors, one by one, with norms under its modules' names."""
  compared = set()
  for path, grad in grads.items():
    names = names_of(path, grad.shape, source.table)
    for cell in np.ndindex(*names.keys.shape[:-1]):
      parts = names.row.transform.save(np.asarray(grad[cell]))
      for key, part in zip(map(source.layout.module, names.keys[cell]), parts, strict=True):
        # 1e-9: a key bias has no gradient in exact arithmetic, and float32's noise on both sides.
        np.testing.assert_allclose(np.linalg.norm(part), theirs[key], rtol=1e-3, atol=1e-9, err_msg=key)
        compared.add(key)
  assert compared == set(theirs)


def test_the_command(tmp_path):
  """It writes what was computed and prints how far that is from arrays of the same names in its inputs."""
  out, folder = tmp_path / "out.npz", ASSETS / "qwen2"
  command = ["-m", "internvl_jax.verify", f"--model={folder}", f"--inputs={folder / 'io.npz'}"]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  done = forked.run([*command, f"--outputs={out}"], environment=environment, folder=tmp_path)
  assert done.returncode == 0, done.stderr
  ours, theirs = np.load(out), np.load(folder / "io.npz")
  np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=0, atol=2e-4)
  np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)
  assert [line.split()[0] for line in done.stdout.splitlines()] == [
    n for n in verification._OUTPUTS if n in ours
  ]


@pytest.mark.parametrize("tokens", [7, 64, 129])
def test_chunked_loss_equals_plain(monkeypatch, tokens):
  monkeypatch.setattr(lm, "CHUNK", 32)
  rng = np.random.default_rng(0)
  hidden, kernel = rng.normal(size=(tokens, 16)).astype("f4"), rng.normal(size=(16, 50)).astype("f4")
  targets = rng.integers(0, 50, tokens).astype("i4")
  targets[::3] = -100
  weights = rng.random(tokens).astype("f4")

  def plain(hidden, kernel):
    return lm.cross_entropy(hidden @ kernel, targets, weights)

  def chunked(hidden, kernel):
    return lm.chunked_linear_cross_entropy(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights))

  for ours, theirs in zip(
    jax.tree.leaves(jax.value_and_grad(chunked, argnums=(0, 1))(hidden, kernel)),
    jax.tree.leaves(jax.value_and_grad(plain, argnums=(0, 1))(hidden, kernel)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
  # A head that does not train costs no gradient, and hidden states get the same one.
  only = jax.grad(chunked)(hidden, kernel)
  np.testing.assert_allclose(only, jax.grad(plain)(hidden, kernel), rtol=2e-5, atol=1e-5)


def test_pixel_shuffle_orders_channels_and_grid():
  # Patch (r, c) holds the number 10 r + c in its one channel.
  grid = np.array([[10 * r + c for c in range(4)] for r in range(4)], "f4")
  x = grid.reshape(1, 16, 1)
  upright = np.asarray(pixel_shuffle(x, ratio=0.5, version="v2"))[0]
  np.testing.assert_array_equal(upright, [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]])
  transposed = np.asarray(pixel_shuffle(x, ratio=0.5, version="v1"))[0]
  np.testing.assert_array_equal(transposed, upright[[0, 2, 1, 3]])


def test_position_embedding_resize():
  # From 8 to 16 along the rows of a slope. With a = -0.75 the four weights at a quarter's distance are
  # -0.10546875, 0.87890625, 0.26171875, -0.03515625 (Keys' formula by hand).
  old, new = 8, 16
  slope = np.broadcast_to(np.arange(old, dtype="f8")[:, None], (old, old)).reshape(-1, 1)
  positions = np.concatenate([[[7.5]], slope])
  resized = resize_position_embedding(positions, new * new)
  assert resized.shape == (1 + new * new, 1)
  assert resized[0, 0] == 7.5
  rows = resized[1:, 0].reshape(new, new)
  np.testing.assert_allclose(rows[4], 1.703125, rtol=1e-12)  # at 1.75
  np.testing.assert_allclose(rows[5], 2.296875, rtol=1e-12)  # at 2.25
  np.testing.assert_allclose(
    rows[0], -0.03515625 * 0 + 0.26171875 * 0 + -0.10546875 * 1, atol=1e-12
  )  # at -0.25
  assert resize_position_embedding(positions, old * old) is positions
