"""Mutation testing: single faults put into a copy of the package, one at a time, and whether the tests notice them.

  python benchmarks/mutants.py                        every fault against the tests that cover its place
  python benchmarks/mutants.py --only 'rope|lora'     those whose names match
  python benchmarks/mutants.py --gate                 against all tests of the gate, until the first that fails
  python benchmarks/mutants.py --output report.json   what was found, also as JSON

The faults are in benchmarks/mutants/*.toml. Each replaces a text that its file has exactly once; one that cannot be
replaced ends the tool, so that the list goes with the code. A fault that changes nothing anybody could see has a reason
in `equivalent`, and is not run. The tool exits with 1 where fewer than 95 % of the others are noticed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
LISTS = Path(__file__).parent / "mutants"
NOTICED = 0.95

# Imported once, before the processes that run tests are forked: it takes longer than most tests.
_PRELOADED = (
  "numpy",
  "jax",
  "flax.nnx",
  "optax",
  "orbax.checkpoint",
  "grain",
  "transformers",
  "PIL",
  "pytest",
)

_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "8",
  "TOKENIZERS_PARALLELISM": "false",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
  """A single fault.

  Attributes:
    name: what goes wrong, unique.
    file: path in the repository.
    old: a text that the file has once.
    new: what takes its place.
    tests: files or node ids of the tests that cover the place.
    equivalent: why nobody could see it; empty where somebody should.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]
  equivalent: str = ""

  def mutated(self, text: str) -> str:
    """The file's text with the fault.

    Raises:
      ValueError: the old text is not there exactly once, or the fault changes nothing.
    """
    if (found := text.count(self.old)) != 1:
      raise ValueError(f"{self.name}: {self.file} has the text {found} times, expected once:\n{self.old}")
    if self.old == self.new:
      raise ValueError(f"{self.name}: old and new text are the same")
    return text.replace(self.old, self.new)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What became of a mutant.

  Attributes:
    noticed: a test failed, or did not come to an end.
    by: the first such test; empty if none.
    seconds: the run's time.
  """

  noticed: bool
  by: str
  seconds: float


def read_mutants(folder: Path = LISTS) -> list[Mutant]:
  """All faults of the lists, in order.

  Raises:
    ValueError: two have one name.
  """
  found = []
  for path in sorted(folder.glob("*.toml")):
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    found += [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]
  names = [mutant.name for mutant in found]
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f"names that two mutants have: {sorted(twice)}")
  return found


def check(mutants: Sequence[Mutant], root: Path = REPOSITORY) -> list[str]:
  """What is wrong with the list: faults that no longer fit their file, and tests that are not there."""
  problems = []
  for mutant in mutants:
    try:
      source = mutant.mutated((root / mutant.file).read_text(encoding="utf-8"))
      compile(source, mutant.file, "exec")
    except (ValueError, OSError, SyntaxError) as error:
      problems.append(str(error))
    missing = [test for test in mutant.tests if not (root / test.partition("::")[0]).exists()]
    problems += [f"{mutant.name}: no such tests: {test}" for test in missing]
  return problems


# --- Running ------------------------------------------------------------------------------------------------


def copy_tree(target: Path) -> None:
  """Copies the files that git knows, or would add."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=REPOSITORY,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  for name in filter(None, listed.split("\0")):
    if (REPOSITORY / name).exists():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(REPOSITORY / name, target / name)


_times = itertools.count(1)


@contextlib.contextmanager
def applied(mutant: Mutant | None, tree: Path) -> Iterator[None]:
  """A copy of the tree with the fault in it."""
  if mutant is None:
    yield
    return
  path = tree / mutant.file
  text = path.read_text(encoding="utf-8")

  def write(content: str) -> None:
    path.write_text(content, encoding="utf-8")
    # Python takes a compiled file for current whose time, in seconds, and size are those of the source.
    now = int(time.time()) + next(_times)
    os.utime(path, (now, now))

  write(mutant.mutated(text))
  try:
    yield
  finally:
    write(text)


class _FirstFailure:
  """A plugin of pytest that remembers the first test that failed."""

  def __init__(self):
    self.by = ""

  def pytest_runtest_logreport(self, report: Any) -> None:
    if report.failed and not self.by:
      self.by = report.nodeid

  def pytest_collectreport(self, report: Any) -> None:
    if report.failed and not self.by:
      self.by = f"{report.nodeid or 'collection'} (import)"


def _run_tests(tree: Path, tests: Sequence[str], answer: int, log: Path) -> None:
  """Runs in a forked process: tests of the copy until one fails; its name goes to the pipe."""
  os.setsid()
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1)
  os.dup2(output, 2)
  os.chdir(tree)
  os.environ["PYTHONPATH"] = str(tree)
  sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != REPOSITORY)]
  pytest = importlib.import_module("pytest")
  plugin = _FirstFailure()
  arguments = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0", *tests]
  code = int(pytest.main(arguments, plugins=[plugin]))
  os.write(answer, json.dumps({"code": code, "by": plugin.by}).encode())
  os._exit(0)


def run(mutant: Mutant | None, tests: Sequence[str], tree: Path, *, limit: float, log: Path) -> Found:
  """Runs tests on a copy with a fault, for at most `limit` seconds.

  Raises:
    RuntimeError: pytest could not run them.
  """
  begin = time.monotonic()
  reads, writes = os.pipe()
  with applied(mutant, tree):
    if not (pid := os.fork()):
      _run_tests(tree, tests, writes, log)
    os.close(writes)
    ended = _wait(pid, limit)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(pid, signal.SIGKILL)  # And what its tests have left behind.
    with os.fdopen(reads, "rb") as pipe:
      answer = pipe.read() if ended else b""
  seconds = time.monotonic() - begin
  if not ended:
    os.waitpid(pid, 0)
    return Found(noticed=True, by=f"no end after {limit:.0f} s", seconds=seconds)
  if not answer:
    return Found(noticed=True, by="the tests' process died", seconds=seconds)
  said = json.loads(answer)
  if said["code"] not in (0, 1, 2) or (said["code"] and not said["by"]):
    raise RuntimeError(f"pytest ended with {said['code']} on {' '.join(tests)}; see {log}")
  return Found(noticed=bool(said["code"]), by=said["by"], seconds=seconds)


def _wait(pid: int, limit: float) -> bool:
  """Whether a process came to an end in time."""
  end = time.monotonic() + limit
  while time.monotonic() < end:
    if os.waitpid(pid, os.WNOHANG)[0]:
      return True
    time.sleep(0.05)
  return False


# --- The report ---------------------------------------------------------------------------------------------


def summary(found: dict[str, Found], mutants: Sequence[Mutant]) -> str:
  """How many are noticed, room by room, and which are not."""
  rooms: dict[str, list[bool]] = {}
  for mutant in mutants:
    if mutant.name in found:
      parts = Path(mutant.file).parts
      rooms.setdefault(parts[1] if len(parts) > 2 else "root", []).append(found[mutant.name].noticed)
  lines = [f"{room:12} {sum(noticed):3} of {len(noticed):3}" for room, noticed in sorted(rooms.items())]
  noticed = sum(one.noticed for one in found.values())
  lines.append(f"{noticed} of {len(found)} noticed ({noticed / max(len(found), 1):.1%})")
  lines += [f"not noticed: {name}" for name, one in found.items() if not one.noticed]
  lines += [f"equivalent: {one.name}: {one.equivalent}" for one in mutants if one.equivalent]
  return "\n".join(lines)


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", help="regular expression of the names to run")
  parser.add_argument("--gate", action="store_true", help="against all tests of the gate")
  parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
  parser.add_argument("--output", type=Path, help="JSON file of what was found")
  parser.add_argument(
    "--skip-unmutated", action="store_true", help="do not run the tests without a fault first"
  )
  return parser.parse_args()


def _prepare() -> None:
  """Sets what the tests' conftest would set, and imports what takes long."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  sys.path.insert(0, str(REPOSITORY))
  importlib.import_module("tests.support.compiling").set_up()
  for name in _PRELOADED:
    importlib.import_module(name)
  for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "internvl_jax")]:
    del sys.modules[name]


def main() -> int:
  arguments = _parse()
  mutants = read_mutants()
  if problems := check(mutants):
    print("\n".join(problems), file=sys.stderr)
    return 2
  chosen = [one for one in mutants if re.search(arguments.only, one.name) and not one.equivalent]
  _prepare()
  found: dict[str, Found] = {}
  with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
    tree, log = Path(folder) / "tree", Path(folder) / "log.txt"
    copy_tree(tree)

    def tried(mutant: Mutant | None, tests: Sequence[str]) -> Found:
      return run(mutant, tests, tree, limit=arguments.limit, log=log)

    if not arguments.skip_unmutated and not arguments.gate:
      every = sorted({test for mutant in chosen for test in mutant.tests})
      whole = run(None, every, tree, limit=10 * arguments.limit, log=log)
      if whole.noticed:
        print(f"without a fault: {whole.by} fails\n{log.read_text()[-3000:]}", file=sys.stderr)
        return 2
      print(f"without a fault: {len(every)} files pass, {whole.seconds:.0f} s", flush=True)
    for number, mutant in enumerate(chosen, 1):
      one = found[mutant.name] = tried(mutant, ["tests"] if arguments.gate else mutant.tests)
      print(
        f"{number:3}/{len(chosen)} {one.seconds:5.0f} s  {mutant.name}: {one.by or 'NOT NOTICED'}", flush=True
      )
      if arguments.output:
        arguments.output.write_text(
          json.dumps({name: dataclasses.asdict(f) for name, f in found.items()}, indent=1)
        )
  print(summary(found, mutants))
  return int(sum(one.noticed for one in found.values()) < NOTICED * len(found))


if __name__ == "__main__":
  sys.exit(main())
