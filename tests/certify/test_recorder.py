"""The recordings in tests/assets/certify are what scripts/certify_record.py makes, without and with each fault."""

import numpy as np
import pytest

from tests.certify.recorded import META, RECORDINGS, arrays_of, with_fault
from tests.support import planted
from tests.support.scripts import load
from tests.support.toy import REPOSITORY

for package in ("torch", "torchvision"):
  pytest.importorskip(package)
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("fault", [None, *planted.FAULTS])
def test_the_recorder_makes_the_recording(fault, hf_model, tmp_path):
  planted.record(tmp_path / "now", hf_model, META, fault)
  kept = RECORDINGS / "transformers" if fault is None else with_fault(fault, tmp_path / "kept")
  now, before = arrays_of(tmp_path / "now"), arrays_of(kept)
  assert now.keys() == before.keys()
  for name, value in before.items():
    if value.dtype.kind in "fc":
      # Gradients that are 0 in exact arithmetic are noise.
      np.testing.assert_allclose(
        now[name], value, rtol=1e-3, atol=1e-5 * (1 + np.abs(value).max(initial=0)), err_msg=name
      )
    elif name != "manifest":
      np.testing.assert_array_equal(now[name], value, err_msg=name)


def test_the_script_of_the_assets_is_imported():
  assert callable(load(REPOSITORY / "scripts/record_certify.py").main)
