"""Texts of `--help`, `--helpfull` (every field that `--config` takes) and `--print_config` (a configuration's values)."""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator

from absl import flags

from internvl_jax.config import FIELDS, LEAVES, TrainConfig, get, is_changed, type_name
from internvl_jax.errors import redacted

_WIDTH = 110


def usage(doc: str, flag_values: flags.FlagValues, config_flag: str, *, full: bool) -> str:
  """The text for a command.

  Args:
    doc: the command's module docstring.
    flag_values: all flags; those of libraries are left out.
    config_flag: name of the flag that takes a recipe, of commands that have it.
    full: whether to list the fields, too.
  """
  lines = [doc.strip(), "", "flags:"]
  for flag in _own_flags(flag_values):
    default = (flag.default_as_str or "").strip("'")
    default = f" (default: {default})" if default else ""
    lines += _entry(f"--{flag.name}", f"{flag.help}{default}")
  if config_flag in flag_values:
    lines += _entry(
      f"--{config_flag}.GROUP.FIELD=VALUE", "Overrides a field of the recipe; --helpfull lists all of them."
    )
  if full and config_flag in flag_values:
    for name, leaf in LEAVES.items():
      lines += ["", f"--{config_flag}.{name}.…: {inspect.getdoc(leaf)}"]
      for field, comment in field_comments(leaf).items():
        kind = FIELDS[f"{name}.{field}"]
        lines += _entry(f"{field}: {type_name(kind.type)} = {kind.default!r}", comment)
  return "\n".join(lines)


def field_comments(leaf: type) -> dict[str, str]:
  """What the source says above each field of a leaf; fields under one comment share it."""
  found: dict[str, str] = {}
  comment: list[str] = []
  follows = False
  for line in inspect.getsource(leaf).splitlines():
    text = line.strip()
    if text.startswith("#"):
      comment = [*(comment if follows else []), text.removeprefix("#").strip()]
      follows = True
    elif match := re.match(r"(\w+): ", text):
      follows = False
      if match[1] in leaf.__dataclass_fields__:
        found[match[1]] = " ".join(comment)
  return found


def config_text(config: TrainConfig) -> str:
  """A line for each field of a configuration, in the order of the tree, without the secrets of URLs.

  >>> print(config_text(config))
  * model.model_name_or_path = 'OpenGVLab/InternVL2_5-8B'  (default: None)
    model.vision_path = None
    ...

  An asterisk marks what differs from the default.
  """
  return redacted("\n".join(_field_line(config, path) for path in FIELDS))


def _field_line(config: TrainConfig, path: str) -> str:
  line = f"{path} = {get(config, path)!r}"
  return f"* {line}  (default: {FIELDS[path].default!r})" if is_changed(config, path) else f"  {line}"


def _own_flags(flag_values: flags.FlagValues) -> Iterator[flags.Flag]:
  for module, defined in flag_values.flags_by_module_dict().items():
    # The module that runs as a program has the program's name.
    if module == sys.argv[0] or module.startswith("internvl_jax."):
      yield from (flag for flag in defined if "." not in flag.name)


def _entry(head: str, text: str) -> list[str]:
  wrapped = textwrap.wrap(text, _WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return [f"  {head}", *wrapped]
