"""The small tokenizer, as in the tests of data, and preference pairs."""

import pytest

from internvl_jax.batch import IGNORE_INDEX
from tests.data.conftest import hf_tokenizer, tokenizer
from tests.support.data_toys import WHERE
from tests.support.pairs import LONG, maker, picture, write_mixture

__all__ = ["hf_tokenizer", "tokenizer"]


@pytest.fixture
def files(tmp_path):
  picture(tmp_path, "a.png")
  picture(tmp_path, "b.png", 16, 48)
  picture(tmp_path, "v.gif", frames=5)
  return tmp_path


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
  return write_mixture(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def lengths(files, tokenizer):
  """Tokens of the prompt, and of the two conversations about an image."""
  sample = maker(files, tokenizer).make(LONG, WHERE)
  prompt = int((sample.segments()[0].labels != IGNORE_INDEX).argmax())
  return prompt, *sample.lengths
