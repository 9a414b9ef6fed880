import dataclasses
import hashlib

import numpy as np
import pytest

from internvl_jax.certify.ours import Ours, open_ours
from internvl_jax.conversion import convert
from internvl_jax.hf.model_config import HF
from tests.certify.recorded import META, RECORDINGS, opened
from tests.support.toy import CURVE


@pytest.fixture(scope="package")
def hf_model(tmp_path_factory):
  """The checkpoint of the recordings of transformers."""
  folder = tmp_path_factory.mktemp("certify") / "hf"
  convert(str(CURVE / "init"), folder, HF, lora="merge")
  return folder


@pytest.fixture(scope="package")
def hf_ours(hf_model):
  """That checkpoint and its mixture as this program has them."""
  ours = open_ours(str(hf_model), str(META), opened(RECORDINGS / "transformers").manifest["settings"])
  return Remembering(**{field.name: getattr(ours, field.name) for field in dataclasses.fields(ours)})


class Remembering(Ours):
  """Computes what it is asked for once: most faults leave what the model runs on as it is."""

  def run(self, rows, picks=None, config=None):
    return _remembered(self, "run", rows, picks, config)

  def gradients(self, rows):
    return _remembered(self, "gradients", rows)


_RESULTS = {}


def _remembered(ours, method, rows, *others):
  asked = [getattr(rows, field.name) for field in dataclasses.fields(rows)]
  asked += [array for picks in others if isinstance(picks, dict) for array in picks.values()]
  digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in asked)).hexdigest()
  key = (id(ours), method, digest, *(other for other in others if not isinstance(other, dict)))
  if key not in _RESULTS:
    _RESULTS[key] = getattr(super(Remembering, ours), method)(rows, *others)
  return _RESULTS[key]
