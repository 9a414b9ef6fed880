"""The small tokenizer."""

import pytest
import transformers

from data_toys import ASSETS
from internvl_jax.data.tokenize import ChatTokenizer


@pytest.fixture(scope="session")
def hf_tokenizer():
  return transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer):
  return ChatTokenizer(hf_tokenizer, "internvl2_5")
