"""Which backends a run gets, by its platform, card and model, and what it says where a better one is passed over."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from internvl_jax.aot import recipe
from internvl_jax.errors import UserError
from internvl_jax.hf import published
from internvl_jax.models.activations import BACKENDS as ACTIVATIONS
from internvl_jax.models.attention import BACKENDS as ATTENTION
from internvl_jax.models.grouped_matmul import BACKENDS as EXPERTS
from internvl_jax.models.kernels import Backend, Device, Kernels, choose, find
from internvl_jax.open_model import open_shapes
from internvl_jax.setup.step import execution

TPU, CPU = Device(platform="tpu", kind="TPU v5e"), Device(platform="cpu", kind="cpu")
H100 = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3", capability=(9, 0))
T4 = Device(platform="gpu", kind="Tesla T4", capability=(7, 5))


def of_size(size, device, **runtime):
  config = recipe.get_config()
  config.model.model_name_or_path = published.hub_id(size)
  for name, value in runtime.items():
    setattr(config.runtime, name, value)
  return execution(config, open_shapes(config).config, device).kernels


@pytest.mark.parametrize(
  ("size", "device", "expected"),
  [
    ("2.5-8b", TPU, Kernels(attention="splash")),
    ("2.5-8b", H100, Kernels(attention="triton")),
    ("2.5-8b", CPU, Kernels(attention="cpu", activations="from_inputs")),
    ("2.5-78b", H100, Kernels(attention="triton")),
    ("2-4b", H100, Kernels(attention="triton")),  # Heads of 96.
    ("3.5-30b-a3b", H100, Kernels(attention="triton", experts="triton")),
    ("3.5-30b-a3b", TPU, Kernels(attention="splash", experts="megablox")),
    ("3.5-20b-a4b", H100, Kernels(attention="triton", experts="triton")),  # Sinks and windows.
    ("3.5-20b-a4b", CPU, Kernels(attention="cpu", activations="from_inputs")),
  ],
)
def test_auto_is_what_the_platform_has(size, device, expected):
  assert of_size(size, device) == expected


def test_a_card_of_unknown_capability_is_taken_for_a_new_one():
  assert of_size("2.5-8b", Device(platform="gpu")).attention == "triton"


def test_an_old_card_falls_back_and_says_what_it_costs(caplog):
  with caplog.at_level(logging.WARNING):
    assert of_size("3.5-30b-a3b", T4) == Kernels()
  attention, experts = [record.getMessage() for record in caplog.records]
  assert attention.startswith(
    "runtime.attention: 'xla' computes it, for 'triton' needs a card of compute capability 8.0, and Tesla T4 has 7.5"
  )
  assert "multiple of the time" in attention
  assert experts.startswith("runtime.experts") and "matrices of all groups" in experts


def test_a_card_of_another_maker_does_not_get_nvidias_kernels(caplog):
  card = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
  assert of_size("3.5-30b-a3b", Device.of(card)) == Kernels()
  assert "AMD Instinct MI300X" in caplog.text
  nvidia = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
  assert Device.of(nvidia).capability == (9, 0)
  assert Device.of(SimpleNamespace(platform="gpu", device_kind="a card")).capability is None


def test_experts_are_checked_in_dense_models_too():
  with pytest.raises(UserError, match=r"runtime\.experts='megablox' is made for tpu"):
    of_size("2.5-8b", H100, experts="megablox")


@pytest.mark.parametrize(
  ("setting", "device", "words"),
  [
    (
      {"attention": "splash"},
      H100,
      "runtime.attention='splash' is made for tpu, and this is a gpu; set it to",
    ),
    ({"attention": "triton"}, CPU, "is made for gpu, and this is a cpu"),
    ({"attention": "triton"}, T4, r"needs a card of compute capability 8\.0, and Tesla T4 has 7\.5"),
    ({"experts": "megablox"}, CPU, "runtime.experts='megablox' is made for tpu"),
  ],
)
def test_what_cannot_run_is_refused(setting, device, words):
  with pytest.raises(UserError, match=words):
    of_size("3.5-30b-a3b", device, **setting)


def test_what_is_asked_for_is_taken():
  assert of_size("3.5-30b-a3b", H100, attention="xla", experts="xla") == Kernels()


def test_tables_are_tried_in_order():
  rows = (
    Backend(name="new", function="", platforms=("gpu",), oldest_jax=(99, 0), reason="twice as fast"),
    Backend(name="narrow", function="", platforms=("gpu",), widest_head=64),
    Backend(name="plain", function="", platforms=("gpu", "cpu")),
  )
  row, passed = choose(rows, H100, head_width=128)
  assert (
    row.name == "plain"
    and passed is not None
    and "'new' needs jax 99.0" in passed
    and "twice as fast" in passed
  )
  assert choose(rows, CPU) == (rows[2], None)
  assert "takes heads up to a width of 64" in str(rows[1].refusal(H100, head_width=128))
  assert "has no sinks" in str(rows[2].refusal(H100, {"sinks"}))


def test_what_a_later_jax_may_drop_is_still_there():
  """JAX 0.12 calls Pallas' Triton route deprecated; without it, cards fall back and say so."""
  row = find(ATTENTION, "triton")
  assert row.module is not None and row.refusal(H100) is None
  gone = dataclasses.replace(row, module="jax.experimental.pallas.dropped")
  assert "needs jax.experimental.pallas.dropped, which jax" in str(gone.refusal(H100))
  assert "needs jax.no_such.triton" in str(
    dataclasses.replace(row, module="jax.no_such.triton").refusal(H100)
  )
  chosen, passed = choose((gone, find(ATTENTION, "xla")), H100)
  assert chosen.name == "xla" and "multiple of the time" in str(passed)


@pytest.mark.parametrize("table", [ATTENTION, EXPERTS, ACTIVATIONS])
def test_every_platform_has_a_backend_and_every_row_a_reason(table):
  for device in (TPU, H100, CPU):
    assert choose(table, device)[1] is None
  assert all(row.reason for row in table)
  assert find(table, "xla").platforms == ("tpu", "gpu", "cpu")
