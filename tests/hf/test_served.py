"""transformers' processor and model, on an export, ask and answer as training asked and this program answers."""

import numpy as np
import pytest

from tests.support import served
from tests.support.scripts import load
from tests.support.toy import REPOSITORY

for package in ("torch", "torchvision"):
  pytest.importorskip(package)
pytestmark = pytest.mark.torch

REFUSED = {"no thumbnail": "data.use_thumbnail=False", "pad2square, fixed tile": "data.pad2square=True"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  return served.compare(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("name", served.CASES)
def test_ids_and_tiles(compared, name):
  for template in served.TEMPLATES:
    pair = compared[name, template]
    if name in REFUSED:
      assert REFUSED[name] in pair.refused and "(--layout=internvl)" in pair.refused
      continue
    assert pair.theirs.ids.tolist() == pair.ours.ids.tolist(), template
    assert pair.theirs.tiles.shape == pair.ours.tiles.shape, template
    np.testing.assert_allclose(pair.theirs.tiles, pair.ours.tiles, rtol=0, atol=1.01 / 255, err_msg=template)


def test_answers(compared):
  answers = {key: pair.answers for key, pair in compared.items() if pair.answers is not None}
  assert len(answers) == len(served.ANSWERED) * len(served.TEMPLATES)
  for key, (ours, theirs) in answers.items():
    assert ours == theirs, key
  assert len({tuple(ours) for ours, _ in answers.values()}) > len(served.TEMPLATES)


def test_the_page_has_the_table(compared):
  written = load(REPOSITORY / "scripts/served_table.py").written()
  assert written == served.table(compared), "run scripts/served_table.py"
