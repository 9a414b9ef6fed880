"""Scripts as modules."""

import importlib.util
import sys

from absl import flags


def load(path):
  """The module that a script is; its flags are taken back, for the next script may have some of the same names."""
  before = set(flags.FLAGS)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(path.parent))  # As Python does for a script.
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(path.parent))
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  return module
