"""A reward for tests."""


def early_letters(completions, **fields):
  """How many characters are early letters: answers of random weights have some. The lines' fields must come along."""
  assert len(fields["prompts"]) == len(completions) == len(fields["conversations"])
  return [sum(c in "abcdefghijkl" for c in text) / 16 for text in completions]
