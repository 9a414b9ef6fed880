"""The package's rooms import downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "internvl_jax"
NAME = PACKAGE.name

FRONT_DOORS = ("train", "plan", "doctor", "convert", "verify", "evaluate", "generate")

# From the top of the house to its bottom. A room may import itself and the rooms of lower layers; rooms of one
# layer do not know each other, except where ALSO says so.
LAYERS = (
  FRONT_DOORS,
  ("aot",),
  ("preference", "finish"),
  ("cli", "assembly", "output_dir"),
  ("help_text",),
  ("config",),
  ("trainer",),
  ("step",),
  ("reference",),
  ("state", "checkpoint", "metrics", "optim", "objectives"),
  ("mfu",),
  ("eval", "inference", "adapters", "serving"),
  ("inference_settings", "consistency"),
  ("hf",),
  ("models", "losses", "data"),
  ("parallel",),
  ("batch", "trees", "flops", "compiler", "lease"),
  ("outputs", "unused_settings", "intervals", "allowed_values"),
  ("digests",),
  ("storage",),
  ("arguments", "chips", "errors", "foreign", "watchdog"),
  ("environment", "signals"),
)

# Room -> rooms of its own layer that it may import.
ALSO = {"checkpoint": {"state"}, "optim": {"state"}, "serving": {"inference"}}

# Room -> all it may import, where that is less than the layers below it.
ONLY = {
  # Numpy, in worker processes: nothing that brings JAX along.
  "data": {"batch", "arguments", "errors", "storage"},
  # Checkpoint formats and the models they fill; data comes with a tokenizer in hand.
  "hf": {"models", "parallel", "batch", "trees", "outputs", "storage", "arguments", "errors"},
  # Only front doors see the whole configuration; below them a room gets its leaf.
  "cli": {"help_text", "config", "arguments", "environment", "errors", "foreign", "signals"},
  "help_text": {"config"},
}


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def allowed(room: str) -> set[str]:
  (depth,) = [i for i, layer in enumerate(LAYERS) if room in layer]
  below = {name for layer in LAYERS[depth + 1 :] for name in layer}
  if room not in (*FRONT_DOORS, "aot", "preference", "finish", "cli", "assembly", "output_dir"):
    below -= {"config", "cli"}
  if room == "config":
    below = below - {"trainer"}
  return {room} | ONLY.get(room, below | ALSO.get(room, set()))


def imported_rooms(path: Path) -> set[str]:
  """Rooms of the package that a file imports, wherever in the file."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
      names = [node.module] if node.module != NAME else [f"{NAME}.{alias.name}" for alias in node.names]
    else:
      continue
    rooms |= {name.split(".")[1] for name in names if name and name.startswith(f"{NAME}.")}
  return rooms - {"__version__"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
  room = room_of(path)
  assert room in {name for layer in LAYERS for name in layer}, f"{room} has no place in LAYERS"
  assert imported_rooms(path) <= allowed(room)


def test_nothing_is_named_utils():
  assert not [path for path in PACKAGE.rglob("*") if "utils" in path.stem]


def test_every_room_has_one_place():
  names = [name for layer in LAYERS for name in layer]
  assert len(names) == len(set(names))
  assert set(ALSO) | set(ONLY) <= set(names)
