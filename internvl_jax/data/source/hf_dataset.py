"""Datasets of the library `datasets`: saved on disk, or by their name on the Hugging Face hub."""

import os
import zlib
from typing import Any

from internvl_jax.data.source.table import TableRecords
from internvl_jax.data.where import DataError

_SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` has written: of several splits, or of one."""


def is_saved(path: str) -> bool:
  """Whether a folder was written by `save_to_disk`."""
  return any(os.path.isfile(os.path.join(path, name)) for name in _SAVED)


def library(blame: str) -> Any:
  """The module `datasets`.

  Raises:
    DataError: it is not installed.
  """
  try:
    import datasets
  except ImportError:
    raise DataError(f"{blame}: it needs the package datasets: pip install 'internvl_jax[datasets]'") from None
  return datasets


def parse_name(name: str) -> tuple[str, str | None, str]:
  """The name, the subset and the split of "name@subset:split", of which the last two may be left out."""
  name, colon, split = name.rpartition(":") if ":" in name else (name, "", "train")
  name, _, subset = name.partition("@")
  return name, subset or None, split if colon or split else "train"


class HfDataset(TableRecords):
  """The rows of a dataset that `datasets` reads from its Arrow files; pictures are not decoded."""

  kind = "Hugging Face dataset"

  def __init__(
    self,
    path: str | os.PathLike[str],
    dataset: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    root: str | None = None,
    local: str | None = None,
  ):
    """Opens a folder, or what a name stands for; see `spans.RecordFile`.

    Args:
      path: the folder, or "name@subset:split".
      dataset: the name that errors use.
      cache: is not used: `datasets` has a cache of its own.
      root: the setting that says where its media are, where that is not the meta file.
      local: is not used.

    Raises:
      DataError: `datasets` is missing, or cannot open it.
    """
    del cache, local
    self.path, self.dataset = str(path), dataset
    self._root = {} if root is None else {"root": root}
    self._data = self._open().with_format("arrow")
    if not len(self):
      raise self._error("is empty: 0 samples; do not name it")
    self.state = self.find_state()

  def _open(self) -> Any:
    module = library(f"{self.path}: dataset {self.dataset!r}")
    try:
      if os.path.isdir(self.path) and is_saved(self.path):
        found = module.load_from_disk(self.path)
      else:
        name, subset, split = parse_name(self.path)
        found = module.load_dataset(name, subset, split=split)
    except Exception as error:  # its scripts, files and servers raise what they like
      raise self._error(f"datasets cannot open it: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
      splits = ", ".join(found)
      raise self._error(
        f"the folder has the splits {splits}; name one: {self.path.rstrip('/')}/{next(iter(found))}"
      )
    return found

  def __len__(self) -> int:
    return len(self._data)

  def rows(self, start: int, stop: int) -> Any:
    """The rows from `start` to before `stop`: a pyarrow.Table."""
    return self._data[start:stop]

  def files(self) -> list[str]:
    """Its Arrow files."""
    return [entry["filename"] for entry in self._data.cache_files]

  def stamp(self) -> tuple[str, int, int, int, int]:
    """A stamp that changes whenever its files do; of one that is in memory alone, its fingerprint by `datasets`."""
    if self.files():
      return super().stamp()
    return self.path, zlib.crc32(self._data._fingerprint.encode()), len(self), 0, 0


def undecoded(data: Any, module: Any) -> Any:
  """A streamed dataset whose pictures are the bytes of their files."""
  for name, feature in (data.features or {}).items():
    if isinstance(feature, module.Image):
      data = data.cast_column(name, module.Image(decode=False))
    elif isinstance(getattr(feature, "feature", None), module.Image):
      data = data.cast_column(name, module.List(module.Image(decode=False)))
  return data
