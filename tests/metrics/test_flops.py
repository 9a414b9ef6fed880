"""What is frozen costs a forward pass, and only thawed layers run backward; no product is counted wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.metrics.flops import count_flops
from internvl_jax.models.internvl import Execution
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.towers import tower
from tests.support.harness import Harness, make_batch, toy

LAYERS, WIDTH = 24, 32


def step_flops(freeze=None, *, how=None, vision=None, text=None):
  config = toy(vision_layers=LAYERS, width=WIDTH, text=text, **(vision or {}))
  harness = Harness(config, freeze=freeze, how=how)
  return harness, count_flops(harness.step.__call__, *harness.inputs(make_batch()))


def encoder_flops(harness, layers=LAYERS):
  """Products of a forward pass: patches, and of every layer the projections and the attention."""
  tiles = make_batch().tiles.shape[2]
  rows = tiles * 16
  patches = 2 * rows * 4 * 4 * 3 * WIDTH
  tokens = tiles * 17
  layer = 2 * tokens * WIDTH * (3 + 1 + 2 + 2) * WIDTH + 2 * 2 * tiles * 17 * 17 * WIDTH
  return patches, layers * layer


def test_a_frozen_vit_costs_its_forward_pass_and_nothing_more(monkeypatch):
  harness, frozen = step_flops({"freeze_backbone": True})
  patches, layers = encoder_flops(harness)
  # The rest: the same step with the ViT's output given.
  hidden = jnp.zeros((make_batch().tiles.shape[2], 17, WIDTH))
  monkeypatch.setattr(tower.VisionTransformer, "__call__", lambda *args, **kwargs: hidden)
  rest = count_flops(harness.step.__call__, *harness.inputs(make_batch()))
  assert frozen == patches + layers + rest


def test_only_thawed_layers_run_backward():
  _, frozen = step_flops({"freeze_backbone": True})
  _, thawed = step_flops({"freeze_backbone": True, "unfreeze_vit_layers": -4}, vision={"split": LAYERS - 4})
  harness, everything = step_flops()
  patches, layers = encoder_flops(harness)
  # A backward pass has two products for each of the forward's; patches need no gradient of the pixels. The
  # gradients of biases, norms and layer scales (13 vectors a layer) are sums, written as products.
  tiles = make_batch().tiles.shape[2]
  sums = LAYERS * 13 * 2 * tiles * 17 * WIDTH
  assert everything - frozen == 2 * layers + sums + patches + 2 * tiles * 16 * WIDTH
  assert thawed - frozen == (2 * layers + sums) * 4 // LAYERS


def test_adapters_cost_no_gradient_of_their_kernels():
  """Of a frozen map's two backward products one stays, for what lies before it."""
  spec = LoRASpec(rank=2, alpha=4.0)
  _, everything = step_flops(how=Execution())
  flags = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "use_llm_lora": 2}
  harness, adapted = step_flops(flags, text={"lora": spec})
  assert all(".adapter." in path for path in harness.state.params)
  assert adapted < everything / 2


def test_rematerialisation_is_counted():
  """The backward pass of a rematerialised stack has the forward pass in it once more."""
  harness, plain = step_flops()
  _, remat = step_flops(how=Execution(remat="full"))
  _, layers = encoder_flops(harness)
  assert remat > plain + layers


def test_loops_count_as_often_as_they_run():
  def loop(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  x, w = jnp.zeros((3, 5)), jnp.zeros((7, 5, 5))
  assert count_flops(loop, x, w) == 7 * 2 * 3 * 5 * 5
  # Only with respect to w: a product each way, and one for the weight; the first layer needs none for x.
  grads = count_flops(jax.grad(lambda w: loop(x, w).sum()), w)
  assert grads == 3 * 7 * 2 * 3 * 5 * 5


def test_grouped_products_count_every_row_once():
  x, w, sizes = jnp.zeros((6, 5)), jnp.zeros((4, 5, 3)), np.array([1, 2, 3, 0])
  product = lambda x, w: jax.lax.ragged_dot(x, w, sizes)  # noqa: E731
  assert count_flops(product, x, w) == 2 * 6 * 5 * 3
  both = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
  assert count_flops(both, x, w) == 2 * 2 * 6 * 5 * 3


def test_what_runs_device_by_device_counts_for_all_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
  spread = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(jax.P("rows"), jax.P()), out_specs=jax.P("rows"))
  assert count_flops(spread, jnp.zeros((16, 5)), jnp.zeros((5, 3))) == 2 * 16 * 5 * 3


@pytest.mark.parametrize("thaw", [0, -4])
def test_optimizer_memory_is_that_of_what_trains(thaw):
  flags = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "unfreeze_lm_head": True}
  split = LAYERS + thaw if thaw else None
  config = toy(vision_layers=LAYERS, width=WIDTH, split=split)
  harness = Harness(config, freeze={**flags, "unfreeze_vit_layers": thaw})
  trained = sum(leaf.size for leaf in harness.state.params.values())
  moments = sum(leaf.size for leaf in jax.tree.leaves(harness.state.opt_state) if leaf.ndim)
  assert moments == 2 * trained
  head = 40 * WIDTH
  layer = (8 * WIDTH * WIDTH) + (3 + 1 + 2 + 1) * WIDTH + 6 * WIDTH
  assert trained == head - layer * thaw
