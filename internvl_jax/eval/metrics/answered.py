"""What a metric scores: an answer, and what was wanted."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# "A. cat", "(B) dog", "C: bird", each on a line of its own.
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
  """A question with the model's answer.

  Attributes:
    prediction: what the model answered, without white space around it.
    answers: what is right: one answer, or those of several people.
    question: its text.
    record: its line of the annotation file.
    spellings: the answer of the line's last turn as it is written and as it is read back from its tokens; tokenizers
      that normalize text do not give it back as it was (Qwen's write letters and their accents as one). Empty: `answers`.
  """

  prediction: str
  answers: tuple[str, ...]
  question: str = ""
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  spellings: tuple[str, ...] = ()

  def options(self) -> dict[str, str]:
    """The texts of the options by their letters; empty where the question has none.

    They are the line's `options`, a list or an object by letter, or else lines of the question such as "A. cat".
    """
    stated = self.record.get("options")
    if isinstance(stated, dict):
      return {str(letter): str(text) for letter, text in stated.items()}
    if isinstance(stated, list):
      return {chr(ord("A") + i): str(text) for i, text in enumerate(stated)}
    found = _OPTION.findall(self.question)
    in_order = [letter for letter, _ in found] == [chr(ord("A") + i) for i in range(len(found))]
    return dict(found) if in_order and len(found) > 1 else {}
