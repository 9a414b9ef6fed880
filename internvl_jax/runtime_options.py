"""The parts of settings of `runtime` that are written as one text."""

import re


def parse_xla_option(text: str) -> tuple[str, bool | int | str]:
  """The name and the value of an entry of `xla_options`; a value that looks like a bool or an integer is one.

  Raises:
    ValueError: it is not "xla_…=value".
  """
  match = re.fullmatch(r"(?:--)?(xla_[a-z0-9_]+)=(.*)", text.strip())
  if match is None:
    raise ValueError(f"{text!r} is not xla_…=value")
  name, value = match.groups()
  if value.lower() in ("true", "false"):
    return name, value.lower() == "true"
  return name, int(value) if re.fullmatch(r"-?[0-9]+", value) else value


def parse_distributed(setting: str) -> tuple[str, int, int] | None:
  """The parts of "host:port,processes,process"; None for another form, and for numbers that cannot be."""
  match = re.fullmatch(r"([^,\s]+:[0-9]+),([0-9]+),([0-9]+)", setting)
  if match is None or int(match[3]) >= int(match[2]):
    return None
  return match[1], int(match[2]), int(match[3])
