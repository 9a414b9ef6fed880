"""Patterns match whole paths."""

import pytest

from internvl_jax.trees import first_match


def test_a_pattern_matches_from_end_to_end():
  assert first_match([("a", 1), (r"a\.b", 2)], ["a", "a.b"]) == {"a": 1, "a.b": 2}
  with pytest.raises(ValueError, match=r"matches the parameter 'a\.b'"):
    first_match([("a", 1)], ["a", "a.b"])
