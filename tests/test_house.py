"""The package's rooms import downwards only, and functions, signatures and files stay short."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "internvl_jax"
NAME = PACKAGE.name

FRONT_DOORS = (
  "train",
  "plan",
  "doctor",
  "convert",
  "verify",
  "certify",
  "evaluate",
  "generate",
  "report",
  "from_script",
)

# From the top of the house to its bottom. A room may import itself and the rooms of lower layers; rooms of one
# layer do not know each other, except where ALSO says so.
LAYERS = (
  ("integrations",),
  ("api",),
  FRONT_DOORS,
  ("aot", "answering", "conversion", "reporting", "sweep", "verification"),
  ("setup", "finish"),
  ("cli", "open_model", "output_dir"),
  ("pasted_arguments",),
  ("nearest_recipe",),
  ("reference_arguments",),
  ("help_text", "config_checks", "recipes", "recipe_files"),
  ("config_paths",),
  ("tasks",),
  ("config",),
  ("allowed_values", "unused_settings"),
  ("trainer",),
  ("callbacks",),
  ("step",),
  ("state", "checkpoint", "metrics", "optim", "objectives"),
  ("eval", "inference", "adapters", "serving"),
  ("inference_settings", "consistency"),
  ("hf",),
  ("models", "losses", "data"),
  ("parallel",),
  ("batch", "trees", "compiler", "lease"),
  ("outputs", "intervals"),
  ("digests",),
  ("storage",),
  ("arguments", "task_arguments", "chips", "errors", "foreign", "runtime_options", "watchdog"),
  ("environment", "signals", "stopwatch"),
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
  "cli": {
    "help_text",
    "recipe_files",
    "config",
    "config_checks",
    "arguments",
    "environment",
    "errors",
    "foreign",
    "pasted_arguments",
    "signals",
  },
  "pasted_arguments": {"nearest_recipe", "recipe_files", "reference_arguments"},
  "nearest_recipe": {"config", "recipe_files", "tasks"},
  "reference_arguments": {"arguments", "config", "errors", "foreign", "parallel"},
  "help_text": {"config", "errors"},
  # Read before anything heavy.
  "recipes": {"config", "errors"},
  "recipe_files": {"config", "errors", "foreign"},
  "config": {"arguments", "task_arguments", "errors"},
  "config_paths": {"config", "tasks", "outputs", "storage", "hf", "eval"},
  "config_checks": {
    *(
      "config",
      "config_paths",
      "unused_settings",
      "allowed_values",
      "arguments",
      "runtime_options",
      "errors",
    ),
    *("parallel", "data", "optim", "metrics", "tasks", "eval"),
  },
}


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def allowed(room: str) -> set[str]:
  (depth,) = [i for i, layer in enumerate(LAYERS) if room in layer]
  below = {name for layer in LAYERS[depth + 1 :] for name in layer}
  if room not in ("api", *FRONT_DOORS, "aot", "setup", "finish", "cli", "open_model", "output_dir", "tasks"):
    below -= {"config", "config_checks", "config_paths", "cli"}
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


WINGS = ("load", "schedule", "sample", "source", "where")
"""The wings of the data room: each imports itself and those behind it."""


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=lambda path: path.stem)
def test_wings_of_the_data_import_downwards(path):
  wing = path.relative_to(PACKAGE / "data").with_suffix("").parts[0]
  if wing == "__init__":
    assert not imported_rooms(path)
    return
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{NAME}.data"):
      parts = node.module.split(".")[2:]
      found |= {parts[0]} if parts else {alias.name for alias in node.names}
  assert found <= set(WINGS[WINGS.index(wing) :])


def test_nothing_is_named_utils():
  assert not [path for path in PACKAGE.rglob("*") if "utils" in path.stem]


def test_every_room_has_one_place():
  names = [name for layer in LAYERS for name in layer]
  assert len(names) == len(set(names))
  assert set(ALSO) | set(ONLY) <= set(names)


LONGEST_FUNCTION, LONGEST_FILE, MOST_PARAMETERS = 60, 450, 7

LONG_FILES: set[str] = set()
"""Those that are still too long; the list only shrinks."""

WIDE_FUNCTIONS = {
  "models/attention/triton_kernels.py:backward_kv": "a kernel's pointers: Pallas passes each array by itself",
  "models/attention/triton_kernels.py:backward_q": "a kernel's pointers: Pallas passes each array by itself",
  "models/attention/triton_kernels.py:forward": "a kernel's pointers: Pallas passes each array by itself",
  "models/decoder.py:__call__": "the arrays of a batch, each by its name, as models are called",
  "models/grouped_matmul/triton.py:_by_row_kernel": "a kernel's pointers: Pallas passes each array by itself",
}
"""Function -> why it has more parameters."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
  """All functions of the package, those inside others included, each with the name that the lists above use."""
  for path in (*FILES, PACKAGE / "__init__.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.FunctionDef):
        yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def parameters(node: ast.FunctionDef) -> list[str]:
  """The parameters that a caller gives: `self` and `cls` are not among them."""
  names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
  return names[names[:1] in (["self"], ["cls"]) :] + [arg.arg for arg in node.args.kwonlyargs]


def test_functions_are_short():
  found = {name for name, node in functions() if node.end_lineno - node.lineno >= LONGEST_FUNCTION}
  assert not found


def test_functions_have_few_parameters():
  found = {name for name, node in functions() if len(parameters(node)) > MOST_PARAMETERS}
  assert found == set(WIDE_FUNCTIONS)


def test_files_are_short():
  lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in FILES}
  assert {name for name, count in lines.items() if count > LONGEST_FILE} <= LONG_FILES


def module_of(path: Path) -> str:
  return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
  """Modules of the package that a file imports, inside functions, too, and the packages that this executes."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      # Of `from package import name` it is not visible whether the name is a module.
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= (names & modules) or {node.module}
  own = module_of(path)
  packages = {name.rpartition(".")[0] for name in found}
  return {name for name in found | packages if name in modules and not f"{own}.".startswith(f"{name}.")}


def test_no_import_is_circular():
  paths = {module_of(path): path for path in FILES}
  graph = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
  assert sum(map(len, graph.values())) > len(graph)  # The graph is not empty by a mistake of its own.
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    pytest.fail(" -> ".join(error.args[1]))


SAID_ONCE = {
  # What float32 asks of matrix products.
  r"default_matmul_precision[\"(]": {"compiler.py", "adapters.py"},
  r"= \"highest\"": {"compiler.py"},
  # What torch.save's files are called.
  r"\"\*?\.(pth|pt)\"": {"hf/files.py"},
  # The defaults of LoRA.
  r"dropout(: float)? ?= ?0\.05": {"arguments.py"},
  r"2(\.0)? \* rank": {"models/lora.py"},
  # What is a URL; a text of a sample that may have one is no path.
  r"\"://\" (not )?in": {"data/sample/keys.py", "errors.py"},
}
"""Regular expression -> the files that say the fact which it finds."""


@pytest.mark.parametrize("pattern", SAID_ONCE)
def test_a_fact_is_said_once(pattern):
  found = {str(path.relative_to(PACKAGE)) for path in FILES if re.search(pattern, path.read_text("utf-8"))}
  assert found == SAID_ONCE[pattern]


def test_nobody_above_the_tasks_names_one():
  """The grep: `preference` is a word of `tasks/`, of the losses, and of the settings."""
  homes = ("tasks", "losses", "config", "task_arguments")
  found = {
    str(path.relative_to(PACKAGE))
    for path in FILES
    if room_of(path) not in homes and "preference" in path.read_text("utf-8").lower()
  }
  assert not found


def test_nobody_asks_of_which_task_something_is():
  """Outside `tasks/`, no `isinstance` on a task, an objective or a batch: it would be a missing method."""
  kinds = {"TokenBatch", "Batch", "ForwardPass", "Objective", "Task", "Hooks"}
  for path in (PACKAGE / "tasks").rglob("*.py"):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
  assert {"PreferenceBatch", "PreferenceOptimization", "SupervisedFineTuning"} <= kinds
  for path in FILES:
    if room_of(path) == "tasks":
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
        assert not asked & kinds, f"{path}:{node.lineno}"
