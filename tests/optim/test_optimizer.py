"""The optimizer: one optax transformation, whose parts are looked up by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.arguments import MeshConfig, TrainingArguments
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.errors import UserError
from internvl_jax.objectives import Outcome
from internvl_jax.optim.optimizer import idle_settings, make_optimizer
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.state import TrainState, opt_state_shardings, parameter_table
from internvl_jax.step import TrainStep
from tests.support.harness import make_batch, on_one_device

KERNEL = "language_model.model.layers.0:2.q_proj.kernel"
"""A stack of two matrices."""


def updated(params, *grads, labels=None, decay=(), rate=1.0, scales=None, **settings):
  """The parameters after a step for each of the gradients, and the optimizer's state."""
  labels = labels or dict.fromkeys(params, "language_model")
  training = TrainingArguments(**settings)
  optimizer = make_optimizer(
    training, labels=labels, decay={path: path in decay for path in params}, scales=scales or {}
  )
  params = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
  state = optimizer.init(params)
  for grad in grads:
    grad = {path: jnp.asarray(value, jnp.float32) for path, value in grad.items()}
    norm, given = optax.tree.norm(grad), jnp.float32(rate)
    updates, state = optimizer.update(grad, state, params, grad_norm=norm, learning_rate=given)
    params = optax.apply_updates(params, updates)
  return params, state


def test_adamw_step_by_hand():
  params = {"a.kernel": [2.0], "a.bias": [2.0]}
  settings = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
  after, _ = updated(params, {"a.kernel": [0.5], "a.bias": [0.5]}, decay=["a.kernel"], rate=0.5, **settings)
  # The first step's moments, bias-corrected, are the gradient and its square.
  np.testing.assert_allclose(after["a.kernel"], 2 - 0.5 * (1 + 0.1 * 2.0), rtol=1e-6)
  np.testing.assert_allclose(after["a.bias"], 2 - 0.5, rtol=1e-6)


@pytest.mark.parametrize(("limit", "length"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping(limit, length):
  zeros = {"a": [0.0], "b": [0.0]}
  after, _ = updated(zeros, {"a": [3.0], "b": [4.0]}, optim="sgd", max_grad_norm=limit)
  np.testing.assert_allclose([-after["a"][0], -after["b"][0]], [0.6 * length, 0.8 * length], rtol=1e-6)


def test_lion_and_sgd_by_hand():
  lion, _ = updated({"a": 1.0}, {"a": 0.3}, {"a": -0.01}, optim="lion_32bit", weight_decay=0.5, decay=["a"])
  # Signs of 0.1 * 0.3, and of 0.9 * (0.001 * 0.3) - 0.1 * 0.01.
  assert float(lion["a"]) == pytest.approx((1 - 1 - 0.5) + 1 + 0.25)
  sgd, _ = updated({"a": 1.0}, {"a": 0.3}, {"a": 0.1}, optim="sgd", optim_args="momentum=0.5")
  assert float(sgd["a"]) == pytest.approx(1 - 0.3 - (0.15 + 0.1))
  nesterov, _ = updated({"a": 1.0}, {"a": 0.4}, optim="sgd", optim_args="momentum=0.5,nesterov=true")
  assert float(nesterov["a"]) == pytest.approx(1 - 0.4 * 1.5)


def test_adafactor_divides_by_the_root_of_mean_squares_and_clips():
  """A gradient of rank one is factored without a loss, so that the first update is its sign."""
  rows, columns = np.linspace(-1, 1, 128), np.linspace(0.5, 2, 130)
  grad = np.stack([np.outer(rows, columns), 3 * np.outer(rows, columns)])
  after, state = updated({KERNEL: np.zeros(grad.shape)}, {KERNEL: grad}, optim="adafactor", max_grad_norm=0)
  np.testing.assert_allclose(after[KERNEL], -np.sign(grad), rtol=1e-4)
  assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (1,), (2, 128), (2, 130)]
  bias, _ = updated({"a": [0.0, 0.0]}, {"a": [1.0, -4.0]}, optim="adafactor", optim_args="clip_threshold=0.5")
  np.testing.assert_allclose(bias["a"], [-0.5, 0.5], rtol=1e-5)


def test_muon_orthogonalizes_each_layers_matrix_and_leaves_the_rest_to_adam():
  grads = {KERNEL: np.random.default_rng(0).normal(size=(2, 8, 32)), "language_model.norm.scale": np.ones(4)}
  zeros = {path: np.zeros(grad.shape) for path, grad in grads.items()}
  after, _ = updated(zeros, grads, optim="muon", max_grad_norm=0)
  for update in np.asarray(after[KERNEL]):
    singular = np.linalg.svd(update / (0.2 * np.sqrt(32)), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
  np.testing.assert_allclose(after["language_model.norm.scale"], -1, rtol=1e-5)
  adapter = KERNEL.replace("kernel", "adapter.a")
  lora, state = updated(
    {adapter: np.zeros((2, 8, 4))}, {adapter: np.ones((2, 8, 4))}, optim="muon", max_grad_norm=0
  )
  np.testing.assert_allclose(lora[adapter], -1, rtol=1e-5)
  assert [leaf.shape for leaf in jax.tree.leaves(state)].count((2, 8, 4)) == 2
  alone, _ = updated(
    {KERNEL: np.zeros((1, 8, 32))}, {KERNEL: grads[KERNEL][1:]}, optim="muon", max_grad_norm=0
  )
  np.testing.assert_allclose(alone[KERNEL][0], after[KERNEL][1], atol=1e-5)


def test_scales_multiply_the_rate_and_the_decay():
  params = {KERNEL: np.ones((2, 1, 3)), "mlp1.a": 1.0}
  optimizer = make_optimizer(
    TrainingArguments(optim="sgd", weight_decay=1.0, max_grad_norm=0),
    labels={KERNEL: "language_model", "mlp1.a": "mlp1"},
    decay={KERNEL: True, "mlp1.a": True},
    scales={KERNEL: np.array([0.25, 2.0], np.float32)},
  )
  rates = {"grad_norm": 0.0, "learning_rate": jnp.float32(0.5)}
  updates, _ = optimizer.update(params, optimizer.init(params), params, **rates)
  np.testing.assert_array_equal(updates[KERNEL], [[[-0.25] * 3], [[-2.0] * 3]])
  assert updates["mlp1.a"] == -1.0


def test_averages_of_weights():
  """By hand: 1, 0, -2 with a decay of 0.75."""
  after, state = updated(
    {"a": 1.0}, {"a": 1.0}, {"a": 2.0}, optim="sgd", optim_args="ema_decay=0.75", max_grad_norm=0
  )
  assert float(after["a"]) == -2
  average = 0.75 * (0.75 * 1 + 0.25 * 0) + 0.25 * -2
  assert float(optax.tree.get(state, "average")["a"]) == pytest.approx(average)
  places = on_one_device(after)
  state = TrainState(jnp.int32(2), jax.device_put(after, places.params), state)
  assert float(state.model_params()["a"]) == pytest.approx(average)
  assert state.keeps_average and state.model_params(average=False) is state.params
  plain = TrainState(jnp.int32(2), after, ())
  assert not plain.keeps_average and plain.model_params() is after


def test_settings_that_an_optimizer_does_not_read_are_said():
  assert idle_settings(TrainingArguments(adam_beta1=0.5, adam_epsilon=1e-6)) == []
  assert idle_settings(TrainingArguments(optim="lion_32bit", adam_beta1=0.5)) == []
  (line,) = idle_settings(TrainingArguments(optim="sgd", adam_beta2=0.5))
  assert line == "training.adam_beta2=0.5 has no effect with training.optim='sgd'"


# --- Where the state is, and what is saved of it ------------------------------------------------------------


def test_state_is_sharded_by_its_shapes():
  mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
  params = {KERNEL: jax.ShapeDtypeStruct((4, 256, 512), jnp.float32)}
  places = rules.StateShardings(mesh, params={}, gradients={}, moments={KERNEL: place})

  def specs(**settings):
    optimizer = make_optimizer(
      TrainingArguments(**settings), labels={KERNEL: "language_model"}, decay={KERNEL: True}
    )
    state = jax.eval_shape(optimizer.init, params)
    shardings = opt_state_shardings(state, params, places)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    return {leaf.shape: tuple(sharding.spec) for leaf, sharding in leaves}

  whole, full = (4, 256, 512), (None, "fsdp", "tensor")
  assert specs() == {(): (), whole: full}
  assert specs(optim="adafactor") == {(): (), (1,): (), (4, 256): (None, "fsdp"), (4, 512): (None, "tensor")}
  assert specs(optim="adamw_8bit") == {(): (), whole: full, (4, 256, 4): full}
  assert specs(optim="muon") == {(): (), (3,): (), whole: full}
  assert specs(optim="sgd") == {} and specs(optim="sgd", optim_args="ema_decay=0.9") == {whole: full}


class Bowl:
  """An objective that needs no model: how far the parameters are from targets of their own."""

  def weights(self, batch):
    return batch.loss_weight

  def loss(self, params, batch, weights, key, running, *, share):
    targets = {
      path: jnp.cos(jnp.arange(value.size, dtype="f4")).reshape(value.shape) for path, value in params.items()
    }
    return sum(jnp.sum((params[path] - targets[path]) ** 2) for path in params), Outcome(running, {})


SHAPES = {KERNEL: (2, 128, 256), "language_model.norm.scale": (256,)}


def run_of(steps, *, mesh=None, state=None, **settings):
  """A state after steps towards the bowl's bottom, and the step."""
  mesh = meshes.make_mesh(MeshConfig(**(mesh or {})), jax.devices()[: 4 if mesh else 1])
  specs = {KERNEL: PartitionSpec(None, "fsdp"), "language_model.norm.scale": PartitionSpec()}
  over_data = {
    KERNEL: PartitionSpec(None, "fsdp", "data"),
    "language_model.norm.scale": PartitionSpec("data"),
  }
  params, moments = (
    {path: NamedSharding(mesh, spec) for path, spec in tree.items()} for tree in (specs, over_data)
  )
  places = rules.StateShardings(mesh, params=params, gradients=params, moments=moments)
  training = TrainingArguments(weight_decay=0.1, **settings)
  optimizer = make_optimizer(
    training, labels=dict.fromkeys(SHAPES, "language_model"), decay={path: path == KERNEL for path in SHAPES}
  )
  step = TrainStep(objective=Bowl(), optimizer=optimizer, seed=0, places=places)
  if state is None:
    values = {path: np.sin(np.arange(np.prod(shape))).reshape(shape) for path, shape in SHAPES.items()}
    state = TrainState.create(
      jax.device_put({p: v.astype("f4") for p, v in values.items()}, params), optimizer, places
    )
  program = jax.jit(step.__call__, donate_argnums=0)
  for _ in range(steps):
    state, _ = program(state, {}, make_batch(rows=2), np.float32(0.1))
  return state, step


CASES = {
  "adamw_torch": None,
  "adamw_8bit": None,
  "adafactor": None,
  "lion_32bit": "ema_decay=0.5",
  "muon": None,
  "sgd": None,
}


@pytest.mark.parametrize("name", CASES)
def test_steps_on_a_mesh_are_those_on_one_device(name):
  """With moments that are sharded over data by ZeRO's first stage, and weights over fsdp."""
  one, _ = run_of(2, optim=name, optim_args=CASES[name])
  many, _ = run_of(2, mesh={"fsdp": 2, "data": 2}, optim=name, optim_args=CASES[name])
  start, _ = run_of(0, optim=name, optim_args=CASES[name])
  for path, value in one.model_params().items():
    np.testing.assert_allclose(many.model_params()[path], value, atol=1e-5)
    assert np.abs(np.asarray(value) - np.asarray(start.params[path])).max() > 1e-3
    assert many.model_params()[path].sharding == many.params[path].sharding
  for leaf in jax.tree.leaves(many.opt_state):
    if leaf.shape == SHAPES[KERNEL]:
      assert leaf.sharding.spec == PartitionSpec(None, "fsdp", "data")


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_from_its_checkpoint(name, tmp_path):
  settings = {"optim": name, "optim_args": CASES[name]}
  straight, _ = run_of(3, **settings)
  state, step = run_of(2, **settings)
  writer = Checkpointer(tmp_path, keep=1)
  writer.save(state, loader={}, trainer={})
  writer.wait()
  like = TrainState.abstract(state.params, step.optimizer, step.places)
  restored, _, _ = writer.restore(like)
  other = "sgd" if name != "sgd" else "lion_32bit"
  with pytest.raises(UserError, match="made by another optimizer"):
    writer.restore(TrainState.abstract(state.params, run_of(0, optim=other)[1].optimizer, step.places))
  writer.close()
  after, _ = run_of(1, state=restored, **settings)
  jax.tree.map(np.testing.assert_array_equal, straight, after)


def test_what_is_saved_of_adamw_has_the_names_of_0_1_0(tmp_path):
  """Of a release in which clipping and rate were outside of optax: its checkpoints are still restored."""
  state, step = run_of(0)
  mask = {path: path == KERNEL for path in SHAPES}
  before = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=mask))
  moments = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), before.init(state.params))
  writer = Checkpointer(tmp_path, keep=1)
  writer.save(TrainState(jnp.int32(7), state.params, moments), loader={}, trainer={})
  writer.wait()
  saved = writer._manager.item_metadata(7)["state"]["opt_state"]
  assert set(saved) == {"0/count", *(f"0/{kind}/{path}" for kind in ("mu", "nu") for path in SHAPES)}
  restored, _, _ = writer.restore(TrainState.abstract(state.params, step.optimizer, step.places))
  writer.close()
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state.opt_state)
  assert {float(jnp.max(leaf)) for leaf in jax.tree.leaves(restored.opt_state)} == {3.0}


def test_the_table_of_parameters_counts_the_optimizers_bytes():
  shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
  shapes["mlp1.a"] = jax.ShapeDtypeStruct((5,), jnp.float32)

  def total(**settings):
    return int(
      parameter_table(shapes, run_of(0, **settings)[0]).splitlines()[-1].split()[-1].replace(",", "")
    )

  trains = 4 * sum(map(np.prod, SHAPES.values()))
  assert total() == 2 * trains and total(optim="lion_32bit", optim_args="ema_decay=0.9") == 2 * trains
  assert total(optim="sgd") == 0
  # A byte for each number of the matrices and four for each block of 128; vectors as before.
  matrices = int(np.prod(SHAPES[KERNEL]))
  assert total(optim="adamw_8bit") == 2 * (matrices + 4 * matrices // 128 + trains - 4 * matrices)
