"""The list of single faults goes with the code, and the tool tells a fault that is noticed from one that is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import scripts

REPOSITORY = Path(__file__).parents[2]
tool = scripts.load(REPOSITORY / "benchmarks" / "mutants.py")


def test_every_fault_still_applies():
  """Where this fails, the code has moved on: give the fault its new text, in benchmarks/mutants/*.toml."""
  assert tool.check(tool.read_mutants()) == []


def test_there_are_enough_of_them_in_all_rooms():
  mutants = tool.read_mutants()
  rooms = {Path(mutant.file).parts[1] for mutant in mutants}
  assert sum(not mutant.equivalent for mutant in mutants) >= 120
  assert rooms >= {"models", "losses", "data", "hf", "checkpoint", "eval", "parallel", "metrics", "storage"}


def mutant(**changes):
  fields = {"name": "sum", "file": "a.py", "old": "x + y", "new": "x - y", "tests": ("test_a.py",)}
  return tool.Mutant(**fields | changes)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"old": "x * y"}, "has the text 0 times"),
    ({"old": "x"}, "has the text 2 times"),
    ({"new": "x + y"}, "are the same"),
    ({"new": "x +"}, "invalid syntax"),
    ({"file": "b.py"}, "No such file"),
    ({"tests": ("test_b.py::test_c",)}, "no such tests: test_b.py"),
  ],
)
def test_a_fault_that_does_not_apply_is_named(tmp_path, changes, words):
  (tmp_path / "a.py").write_text("x = 1\ndef f(y):\n  return x + y\n")
  (tmp_path / "test_a.py").write_text("")
  assert tool.check([mutant()], tmp_path) == []
  (problem,) = tool.check([mutant(**changes)], tmp_path)
  assert words in problem


# In a process of its own, which has no threads yet when it forks.
TRY = """
import sys
from pathlib import Path
import mutants

folder = Path(sys.argv[1])
fault = dict(name="sum", file="a.py", old="x + y", new="x - y", tests=())
error = fault | {"new": "x.nothing + y"}
for entries, name in ((fault, "looks"), (fault, "looks_not"), (error, "looks"), (None, "looks")):
  one = entries and mutants.Mutant(**entries)
  found = mutants.run(one, [f"test_{name}.py"], folder, limit=60, log=folder / "log.txt")
  print(found.noticed, found.by)
"""


def test_noticed_or_not(tmp_path):
  """Against a test that looks, and one that does not; the file is as it was afterwards."""
  (tmp_path / "a.py").write_text("def f(x, y):\n  return x + y\n")
  (tmp_path / "pytest.ini").write_text("[pytest]\n")
  for name, value in (("looks", 1), ("looks_not", 0)):
    test = f"from a import f\n\ndef test():\n  assert f(0, {value}) == {value}\n"
    (tmp_path / f"test_{name}.py").write_text(test)
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "benchmarks")}
  command = [sys.executable, "-c", TRY, str(tmp_path)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  noticed = "True test_looks.py::test"
  assert done.stdout.splitlines() == [noticed, "False ", noticed, "False "], done.stderr
  assert (tmp_path / "a.py").read_text() == "def f(x, y):\n  return x + y\n"


def test_the_summary():
  found = {
    "sum": tool.Found(noticed=True, by="t", seconds=0.1),
    "other": tool.Found(noticed=False, by="", seconds=0.1),
  }
  told = tool.summary(found, [mutant(), mutant(name="other"), mutant(name="same", equivalent="it is")])
  assert (
    "1 of 2 noticed (50.0%)" in told and "not noticed: other" in told and "equivalent: same: it is" in told
  )
