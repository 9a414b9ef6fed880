"""Adapters of every kind compute what PEFT recorded, and are the same once they were written and opened again."""

import jax
import numpy as np
import pytest

from internvl_jax import verification
from internvl_jax.hf.model import open_source
from internvl_jax.hf.peft import save_adapter
from internvl_jax.models.lora import adapter_paths
from tests.support import adapters, families


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return families.write_checkpoint(adapters.BASE, tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_equals_the_recording(kind, base, tmp_path):
  theirs = np.load(adapters.recording(kind))
  source, params = adapters.open_adapted(base, kind)
  inputs = verification.with_positions(source, families.inputs())
  ours, grads = verification.run_with_gradients(source.model, params, inputs)
  real = inputs["attention_mask"][:, ::4] > 0
  np.testing.assert_allclose(ours["logits"][:, ::4][real], theirs["logits"][real], rtol=0, atol=2e-4)
  np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0, atol=1e-5)
  expected = dict(zip(theirs["names"].tolist(), theirs["norms"].tolist(), strict=True))
  norms = adapters.gradient_norms(source, grads)
  assert norms.keys() == expected.keys() and min(expected.values()) > 0
  for name, norm in norms.items():
    np.testing.assert_allclose(norm, expected[name], rtol=1e-3, err_msg=name)

  # Written and opened again it is the same adapter.
  save_adapter(tmp_path, params, source.specs, source.layout, source.table, base=str(base))
  again = open_source(tmp_path)
  loaded = again.load(again.model.shapes, dict.fromkeys(again.model.shapes, adapters.PLACE))
  assert again.specs["language_model"].scale == source.specs["language_model"].scale
  for path in adapter_paths(params):
    np.testing.assert_array_equal(jax.device_get(loaded[path]), jax.device_get(params[path]), err_msg=path)
