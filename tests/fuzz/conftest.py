"""Seeded inputs, one by one; little memory and no worker processes, so that what goes wrong does so here."""

import gc

import pytest
import transformers

from internvl_jax.data.sample.tokenize import ChatTokenizer
from tests.fuzz import judge
from tests.support.toy import ASSETS


@pytest.fixture(autouse=True)
def confined(monkeypatch):
  monkeypatch.setattr("os.cpu_count", lambda: 1)
  # A loader that ended badly holds a thread, and its stack, until it is collected.
  seldom = gc.get_threshold()
  gc.set_threshold(700, 10, 10)
  with judge.bounded_memory():
    yield
  gc.set_threshold(*seldom)


@pytest.fixture(scope="session")
def tokenizer():
  plain = transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer")
  return ChatTokenizer(plain, "internvl2_5")


@pytest.fixture
def inputs(request):
  """(kind, how many) -> number and generator of each: the same for a number, whichever others are run."""
  seed, only = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-only")

  def generators(kind, count):
    return [(i, judge.generator(kind, i, seed)) for i in (range(count) if only is None else [only])]

  return generators
