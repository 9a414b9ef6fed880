"""Rates of parameters: by part, by names of tensors, by layers of the ViT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.config_checks import value_problems
from internvl_jax.errors import UserError
from internvl_jax.optim.rates import rate_scales, rates_text
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import set_up
from tests.test_fields import run_of, source_of

LABELS = {
  "vision_model.embeddings.position_embedding": "vision_model",
  "vision_model.encoder.layers.0:2.attn.qkv.kernel": "vision_model",
  "vision_model.encoder.layers.2:3.attn.qkv.kernel": "vision_model",
  "vision_model.encoder.layers.2:3.attn.qkv.adapter.a": "adapters",
  "vision_model.post_layernorm.scale": "vision_model",
  "mlp1.linear_1.kernel": "mlp1",
  "language_model.model.layers.0:2.q_proj.kernel": "language_model",
}
_MAP = "language_model.model.layers.0:2.mlp.experts.kernel"


def scales(labels=LABELS, names=None, **settings):
  """The scales of rates, by path, as lists."""
  training = TrainingArguments(**{"learning_rate": 2.0, **settings})
  names = {path: np.array(keys, object) for path, keys in (names or {}).items()}
  return {path: scale.tolist() for path, scale in rate_scales(training, labels, names, 3).items()}


def test_without_a_rate_of_their_own_all_have_the_same():
  assert scales() == {} and scales(vision_lr=2.0) == {}


def test_layers_count_as_in_beit():
  """Embeddings 0, layer i as i + 1, what follows as 4: of 3 layers, and in split stacks; adapters as their layers."""
  assert scales(layer_lr_decay=0.5) == {
    "vision_model.embeddings.position_embedding": 0.5**4,
    "vision_model.encoder.layers.0:2.attn.qkv.kernel": [0.5**3, 0.5**2],
    "vision_model.encoder.layers.2:3.attn.qkv.kernel": 0.5,
    "vision_model.encoder.layers.2:3.attn.qkv.adapter.a": 0.5,
  }


def test_rates_of_parts_are_decayed_by_layers():
  found = scales(vision_lr=1.0, projector_lr=8.0, adapters_lr=16.0, layer_lr_decay=0.5)
  assert found == {
    "vision_model.embeddings.position_embedding": 0.5**5,
    "vision_model.encoder.layers.0:2.attn.qkv.kernel": [0.5**4, 0.5**3],
    "vision_model.encoder.layers.2:3.attn.qkv.kernel": 0.25,
    "vision_model.encoder.layers.2:3.attn.qkv.adapter.a": 4.0,
    "vision_model.post_layernorm.scale": 0.5,
    "mlp1.linear_1.kernel": 4.0,
  }
  text = rates_text({path: np.array(scale) for path, scale in found.items()}, LABELS, 2.0)
  assert text == "vision_model 0.0625 to 1, adapters 8, mlp1 8, language_model 2"


def test_a_rate_of_a_part_that_does_not_train_is_refused():
  with pytest.raises(UserError, match=r"training.projector_lr=1, but of mlp1 nothing trains; remove it"):
    scales({"language_model.a": "language_model"}, projector_lr=1.0)
  with pytest.raises(
    UserError, match=r"of vision_model nothing trains \(adapters in it have training.adapters_lr\)"
  ):
    scales({"vision_model.a": "adapters"}, vision_lr=1.0)


def test_patterns_are_of_tensors_and_the_first_counts():
  labels = {"mlp1.linear_1.kernel": "mlp1", _MAP: "language_model"}
  names = {
    "mlp1.linear_1.kernel": ["mlp1.1.weight"],
    _MAP: [
      [[f"model.{layer}.{expert}.w1", f"model.{layer}.{expert}.w3"] for expert in range(3)]
      for layer in range(2)
    ],
  }

  def by(**patterns):
    text = ",".join(f'"{pattern}": {rate}' for pattern, rate in patterns.items())
    return scales(labels, names, lr_by_pattern="{" + text + "}", projector_lr=1.0)

  assert by(**{r"model\\.1.*": 4, r".*\\.2\\.w\\d": 0}) == {
    "mlp1.linear_1.kernel": 0.5,
    _MAP: [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]],
  }
  assert by(**{"mlp1.*": 6}) == {"mlp1.linear_1.kernel": 3.0}
  with pytest.raises(
    UserError,
    match=r"'mlp' matches the whole name of no tensor that trains \(the first one is mlp1.1.weight\)",
  ):
    by(mlp=1)
  with pytest.raises(
    UserError, match=r"model.0.0.w1 and model.0.0.w3 are one parameter here and have one rate"
  ):
    by(**{r".*w1": 1})


def test_patterns_over_the_names_of_a_checkpoint():
  """One layer of a stack of the language model, and the biases of the ViT's qkv, by the names in its file."""
  config = run_of()
  config.training.learning_rate, config.training.projector_lr = 1e-4, 5e-4
  config.training.lr_by_pattern = (
    r'{".*layers\\.1\\.self_attn\\.q_proj\\.weight": 2e-4, "vision_model.*qkv\\.bias": 0}'
  )
  setup = set_up(config, source_of(), open_mesh(config, jax.devices()[:1]))
  state = setup.abstract_state()

  def updates(params):
    optimizer = setup.step.optimizer
    ones = jax.tree.map(jnp.ones_like, params)
    return optimizer.update(ones, optimizer.init(params), params, grad_norm=1.0, learning_rate=1.0)[0]

  found = jax.jit(updates)({path: np.ones(leaf.shape, np.float32) for path, leaf in state.params.items()})
  (q_proj,) = [leaf for path, leaf in found.items() if path.endswith("q_proj.kernel")]
  np.testing.assert_allclose(np.asarray(q_proj[:, 0, 0]), [-1, -2, -1], rtol=1e-5)
  np.testing.assert_allclose(found["mlp1.linear_1.kernel"], -5, rtol=1e-5)
  (bias,) = [leaf for path, leaf in found.items() if path.endswith("attn.qkv.bias")]
  assert not np.any(bias)
  assert setup.rates == "language_model 0.0001 to 0.0002, mlp1 0.0005, vision_model 0 to 0.0001"


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"lr_by_pattern": "mlp1=1"}, "must be a JSON object of names and rates, such as '{\"mlp1"),
    ({"lr_by_pattern": "[1]"}, "must be a JSON object"),
    ({"lr_by_pattern": '{"a": "1e-4"}'}, "the rate of 'a' must be a number of at least 0, not '1e-4'"),
    ({"lr_by_pattern": '{"a": -1}'}, "must be a number of at least 0, not -1"),
    ({"lr_by_pattern": '{"(": 1}'}, "'(' is no regular expression"),
    (
      {"vision_lr": 1e-5, "learning_rate": 0.0},
      "training.vision_lr=1e-05 with training.learning_rate=0: rates follow",
    ),
    ({"vision_lr": -1.0}, "training.vision_lr=-1.0 must be at least 0"),
    ({"layer_lr_decay": 0.0}, "training.layer_lr_decay=0.0 must be above 0 and at most 1"),
    ({"optim_args": "mlp1_rate=2"}, "set training.projector_lr in place of mlp1_rate, to the rate itself"),
  ],
)
def test_what_cannot_be_used_is_said_before_a_run(settings, words):
  config = run_of()
  for name, value in settings.items():
    setattr(config.training, name, value)
  (line,) = [line for line in value_problems(config) if "training." in line]
  assert words in line and "\n" not in line
