"""Errors of `data/`: one line that names the file, the line, the cause and the remedy."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from internvl_jax.errors import UserError

# What is that long is no path but a mistake; its ends are shown.
_LONG_WORD = re.compile(r"(\S{150})\S{200,}(\S{150})")


class DataError(UserError):
  """The data or its settings are wrong; the message is one line and says what to change."""

  def __init__(self, message: object):
    # Libraries' messages, quoted in ours, may hold line breaks; paths and texts may hold anything.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))
    super().__init__(_LONG_WORD.sub(r"\1...\2", line))  # and then without the secrets of URLs


class SharedDataError(DataError):
  """An error of one process of a run that the others wait for: all of them raise it, in the same words."""

  everywhere = True


class OverLengthError(DataError):
  """A sample is longer than it may be, and cannot or must not be shortened."""


class UnsupervisedError(DataError):
  """Of a sample that is longer than it may be, nothing is left that could be learned."""


class Where(NamedTuple):
  """The line of an annotation file that a sample comes from.

  Attributes:
    dataset: name in the meta file.
    file: path of the annotation file.
    line: number of the line, from 1.
    root: where its media's folder is said, for remedies.
  """

  dataset: str
  file: str
  line: int
  root: str = "the dataset's root in the meta file"

  def __str__(self) -> str:
    return f"{self.file}:{self.line} (dataset {self.dataset!r})"

  def error(self, cause: str, kind: type[DataError] | None = None) -> DataError:
    """The error that blames this line, a `DataError` or a kind of it."""
    return (kind or DataError)(f"{self}: {cause}")


class Typed(Where):
  """A sample from the command line: it has no file and no line that could be deleted. `root` is the flag it came by."""

  def __str__(self) -> str:
    return self.root

  def error(self, cause: str, kind: type[DataError] | None = None) -> DataError:
    """The error that blames the flag."""
    return super().error(re.sub(r"(; | or )delete the line$", "", cause), kind)


def shown(value: Any, write: Callable[[Any], str] = str) -> str:
  """A value of the data as a message shows it: its beginning, in quotes where it is written as `str` does."""
  try:
    text = write(value)[:80]
  except RecursionError:  # What could be parsed may be too deep to be written.
    return f"a {type(value).__name__} of many levels"
  except ValueError:  # Python writes no integer of more than 4,300 digits.
    return f"a {type(value).__name__} with a number of thousands of digits"
  return repr(text) if write is str else text
