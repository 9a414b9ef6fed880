"""The small tokenizer, as in the tests of data."""

from tests.data.conftest import hf_tokenizer, tokenizer

__all__ = ["hf_tokenizer", "tokenizer"]
