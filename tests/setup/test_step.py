"""How a run computes, where nobody says it."""

import pytest

from internvl_jax.config import TrainConfig
from internvl_jax.models.kernels import Device
from internvl_jax.setup.step import execution
from tests.support.harness import toy

CPU, TPU = Device(platform="cpu", kind="cpu"), Device(platform="tpu", kind="TPU v5e")


def model(layers: int = 12, width: int = 256):
  return toy(layers, layers, width)


@pytest.mark.parametrize(
  ("shape", "device", "recomputes", "layers"),
  [
    (model(), CPU, False, 12),
    (model(layers=13), CPU, False, 1),
    (model(width=128), CPU, False, 1),
    (model(), CPU, True, 1),  # Outside of a loop XLA would keep what is to be computed again.
    (model(), TPU, False, 1),
  ],
)
def test_shallow_models_have_no_loop_over_layers_on_cpus(shape, device, recomputes, layers):
  config = TrainConfig()
  config.model.grad_checkpoint = recomputes
  assert execution(config, shape, device).scan_unroll == layers
  config.runtime.scan_unroll = 3
  assert execution(config, shape, device).scan_unroll == 3
