"""Useful FLOPs are those of the traced step, less what padding, recomputing and unseen pairs cost."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from internvl_jax.batch import count
from internvl_jax.chips import GPUS, TPUS
from internvl_jax.metrics import mfu
from internvl_jax.metrics.flops import count_flops
from internvl_jax.models.lora import LoRASpec
from internvl_jax.models.moe import MoEConfig
from tests.support.harness import Harness, make_batch, toy

EXPERTS = MoEConfig(num_experts=4, top_k=2, intermediate_size=96, normalize_top_k=True)


@pytest.mark.parametrize(
  ("freeze", "text"),
  [
    ({}, {}),
    ({"freeze_backbone": True}, {"tie_word_embeddings": True}),
    ({"freeze_backbone": True, "freeze_llm": True}, {}),
    ({"freeze_llm": True, "use_llm_lora": 4}, {"lora": LoRASpec(rank=4, alpha=8.0)}),
    ({}, {"experts": EXPERTS}),
  ],
  ids=["whole", "frozen vit, tied", "projector", "lora", "experts"],
)
def test_useful_flops_are_those_of_the_step(freeze, text):
  config = toy(width=64, text=text)
  harness = Harness(config, freeze=freeze, fused=False)
  batch = full_batch()
  traced = count_flops(harness.step.__call__, *harness.inputs(batch))
  useful = mfu.useful_flops(config, harness.model.shapes, harness.trainable).of(count(batch))
  # The step computes the decoder's attention over pairs that see nothing, too.
  unseen = 4 * 16 * 2 * 8 * 12 * 11 / 2 * 3
  assert useful <= traced * 1.001
  np.testing.assert_allclose(useful + unseen, traced, rtol=0.03)


def full_batch():
  """Rows without padding, each of one tile."""
  batch = make_batch(rows=8)
  index = np.full((1, 8, 12), -1, "i4")
  index[0, :, :4] = np.arange(8)[:, None] * 4 + np.arange(4)
  return batch._replace(
    segment_ids=np.ones((1, 8, 12), "i4"),
    positions=np.broadcast_to(np.arange(12, dtype="i4"), (1, 8, 12)),
    image_index=index,
    tiles=np.zeros((1, 1, 8, 16, 16, 3), "u1"),
  )


def test_windows_bound_what_a_token_sees():
  config = toy(text={"windows": (4, None)})
  useful = mfu.useful_flops(config, Harness(config).model.shapes, Harness(config).trainable)
  assert [window for window, _ in useful.windowed] == [4] and useful.per_pair == useful.windowed[0][1]


def test_peaks_by_the_names_that_devices_have():
  def devices(kind, n=2, platform="gpu"):
    return [
      SimpleNamespace(device_kind=kind, platform=platform, id=i, slice_index=0, coords=(i,)) for i in range(n)
    ]

  others = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H20-3e": 148e12,
    "NVIDIA GB200": 2500e12,
  }
  planned = {card.kind: card.flops for card in GPUS.values()}
  assert (planned["NVIDIA H100 80GB HBM3"], planned["NVIDIA H200"], planned["NVIDIA H20"]) == (
    989e12,
    989e12,
    148e12,
  )
  tpus = {f"TPU {name}": TPUS[name].flops for name in ("v4", "v5e", "v5p")}
  peaks = others | planned | tpus
  for kind, peak in peaks.items():
    assert mfu.peak_flops(devices(kind)) == 2 * peak, kind
  # Cards that do less than their namesakes are not taken for them.
  for kind in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40"):
    assert mfu.peak_flops(devices(kind)) is None, kind
  assert mfu.peak_flops(jax.devices()) is None
  two_cores = [SimpleNamespace(device_kind="TPU v4", platform="tpu", slice_index=0, coords=(0, 0, 0))] * 2
  assert mfu.peak_flops(two_cores) == 275e12
  two_halves = [SimpleNamespace(device_kind="TPU7x", platform="tpu", slice_index=0, coords=(0, 0, 0))] * 2
  assert mfu.peak_flops(two_halves) == 2307e12 == 2 * TPUS["v7x"].flops
