"""Schedules and weight decay agree with Hugging Face's Trainer."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import optim
from internvl_jax.arguments import ModelArguments, TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.hf.model import open_source
from internvl_jax.hf.weights import names_of
from internvl_jax.trees import first_match
from tests.support.toy import CURVE, CURVE_INTERNLM2


@pytest.mark.parametrize("curve", [CURVE, CURVE_INTERNLM2], ids=lambda curve: curve.name)
def test_weight_decay_falls_on_the_recorded_names(curve):
  """By their names: InternLM2's norms decay, Qwen2's do not."""
  source = open_source(curve / "init")
  recorded = json.loads((curve / "expected.json").read_text())
  decayed, trainable = set(), set()
  for path, decays in optim.decays(source.reference_names, source.undecayed).items():
    keys = names_of(path, source.model.shapes[path].shape, source.table).keys.reshape(-1)
    trainable |= set(keys)
    decayed |= set(keys) if decays else set()
  assert trainable == set(recorded["trainable"])
  assert decayed == set(recorded["decay"])


def schedule(total=100, **settings):
  return optim.make_schedule(TrainingArguments(learning_rate=2.0, **settings), total)


def test_schedules_at_their_landmarks():
  linear = schedule(lr_scheduler_type="linear", warmup_ratio=0.095)  # ceil(9.5) = 10 steps
  assert [linear(step) for step in (0, 5, 10, 55, 100)] == [0.0, 1.0, 2.0, 1.0, 0.0]
  cosine = schedule(lr_scheduler_type="cosine", warmup_steps=10, warmup_ratio=0.5)  # steps win over the ratio
  assert cosine(10) == 2.0 and cosine(55) == pytest.approx(1.0) and cosine(100) == 0.0
  assert schedule(lr_scheduler_type="constant", warmup_steps=10)(0) == 2.0
  warm = schedule(lr_scheduler_type="constant_with_warmup", warmup_steps=10)
  assert (warm(5), warm(50)) == (1.0, 2.0)
  restarts = schedule(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs='{"num_cycles": 2}')
  assert restarts(0) == restarts(50) == 2.0 and restarts(25) == pytest.approx(1.0)
  floor = schedule(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr_rate": 0.1}')
  assert floor(100) == pytest.approx(0.2)
  polynomial = schedule(lr_scheduler_type="polynomial", lr_scheduler_kwargs='{"lr_end": 0.5, "power": 2.0}')
  assert polynomial(50) == pytest.approx(1.5 / 4 + 0.5) and polynomial(101) == 0.5
  inverse = schedule(lr_scheduler_type="inverse_sqrt", warmup_steps=25)
  assert inverse(100) == pytest.approx(2.0 / math.sqrt(4))


def test_wrong_schedules_are_named():
  with pytest.raises(UserError, match="'cosin'"):
    schedule(lr_scheduler_type="cosin")
  with pytest.raises(UserError, match="num_cycle"):
    schedule(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"num_cycle": 2}')
  with pytest.raises(UserError, match="one of min_lr and min_lr_rate"):
    schedule(lr_scheduler_type="cosine_with_min_lr")


def test_adamw_step_by_hand():
  training = TrainingArguments(weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8)
  optimizer = optim.make_optimizer(training, {path: path for path in ("a.kernel", "a.bias")}, "bias")
  params = {"a.kernel": jnp.array([2.0]), "a.bias": jnp.array([2.0])}
  state = optimizer.init(params)
  grads = {"a.kernel": jnp.array([0.5]), "a.bias": jnp.array([0.5])}
  updates, _ = optimizer.update(grads, state, params)
  # The first step's moments, bias-corrected, are the gradient and its square.
  np.testing.assert_allclose(updates["a.kernel"], 0.5 / (0.5 + 1e-8) + 0.1 * 2.0, rtol=1e-6)
  np.testing.assert_allclose(updates["a.bias"], 0.5 / (0.5 + 1e-8), rtol=1e-6)


def test_clipping():
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  clipped, norm = optim.clip_by_global_norm(grads, 1.0)
  assert norm == 5.0
  np.testing.assert_allclose(clipped["b"], 0.8, rtol=1e-6)
  assert optim.clip_by_global_norm(grads, 10.0)[0]["a"] == 3.0
  assert optim.clip_by_global_norm(grads, 0.0)[0]["b"] == 4.0


def test_freezing_everything_is_refused():
  paths = ["vision_model.a", "mlp1.b", "language_model.c"]
  with pytest.raises(UserError, match="nothing trains"):
    optim.trainable_paths(ModelArguments(freeze_backbone=True, freeze_mlp=True, freeze_llm=True), paths)
  assert optim.trainable_paths(ModelArguments(freeze_llm=True), paths) == {"vision_model.a", "mlp1.b"}


def test_patterns_cover_all_paths_and_match_something():
  assert first_match([("a.*", 1), (".*", 2)], ["ab", "b"]) == {"ab": 1, "b": 2}
  with pytest.raises(ValueError, match="'b'"):
    first_match([("a.*", 1)], ["ab", "b"])
  with pytest.raises(ValueError, match=r"'c\.\*' matches no parameter"):
    first_match([("c.*", 1), (".*", 2)], ["ab", "b"])
