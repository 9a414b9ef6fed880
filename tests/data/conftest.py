"""The small tokenizer."""

import pytest
import transformers

from internvl_jax.data.sample.tokenize import ChatTokenizer
from tests.support.data_toys import ASSETS


@pytest.fixture(scope="session")
def hf_tokenizer():
  return transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer):
  return ChatTokenizer(hf_tokenizer, "internvl2_5")
