"""The changes of docs/extending.md, made to a copy of the package, do what the page says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.toy import REPOSITORY

PAGE = REPOSITORY / "docs/extending.md"

# What a fence follows: the words that say what it is, and the file that it is of.
_BLOCK = re.compile(
  r"^(?:(?P<new>New file) |(?P<changed>In )|(?P<run>Try it))(?:`(?P<path>[^`]+)`)?(?: \(\[all of it\]\(\.\./(?P<whole>[\w/.]+)\)\))?:\n\n(?P<fences>(?:```\w+\n.*?^```\n+)+)",
  re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)


class HowTo(NamedTuple):
  """A section of the page.

  Attributes:
    new: path -> text of a file that it adds.
    changed: (path, diff) of what it changes.
    run: programs that show that it works.
  """

  title: str
  new: dict[str, str]
  changed: list[tuple[str, str]]
  run: list[str]


def how_to(section: str) -> HowTo:
  title, _, text = section.partition("\n")
  found = HowTo(title, {}, [], [])
  for block in _BLOCK.finditer(text):
    for fence in _FENCE.finditer(block["fences"]):
      if block["whole"]:  # The page shows parts of a file.
        found.new[block["path"]] = (REPOSITORY / block["whole"]).read_text(encoding="utf-8")
        assert fence["text"] in found.new[block["path"]], f"{title}: not in {block['whole']}"
      elif block["new"]:
        found.new[block["path"]] = fence["text"]
      elif block["changed"]:
        assert fence["language"] == "diff", f"{title}: {block['path']}"
        found.changed.append((block["path"], fence["text"]))
      else:
        found.run.append(fence["text"])
  return found


def sections() -> list[HowTo]:
  found = [
    how_to(section) for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
  ]
  return [section for section in found if section.run]


HOW_TOS = sections()


def apply(diff: str, text: str) -> str:
  """The text with a diff applied, whose context and removed lines stand once in it."""
  lines = diff.splitlines(keepends=True)
  assert all(line[0] in " +-\n" for line in lines), diff
  before = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
  after = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
  assert text.count(before) == 1, f"found {text.count(before)} times:\n{before}"
  return text.replace(before, after)


_RUNNER = """
import json, sys, traceback
outcomes = {}
for title, programs in json.load(open("programs.json")).items():
  try:
    for program in programs:
      exec(compile(program, title, "exec"), {"__name__": "__main__"})
    outcomes[title] = ""
  except BaseException:
    outcomes[title] = traceback.format_exc()
json.dump(outcomes, open("outcomes.json", "w"))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
  """Title -> what went wrong in its program, run with the package to which all changes have been made."""
  root: Path = tmp_path_factory.mktemp("extended")
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(REPOSITORY / "internvl_jax", root / "internvl_jax", ignore=ignored)
  (root / "tests").symlink_to(REPOSITORY / "tests")
  for section in HOW_TOS:
    for path, text in section.new.items():
      assert not (root / path).exists(), f"{section.title}: {path} is there"
      (root / path).parent.mkdir(parents=True, exist_ok=True)
      (root / path).write_text(text, encoding="utf-8")
    for path, diff in section.changed:
      file = root / path
      file.write_text(apply(diff, file.read_text(encoding="utf-8")), encoding="utf-8")
  (root / "programs.json").write_text(json.dumps({section.title: section.run for section in HOW_TOS}))
  done = subprocess.run(
    [sys.executable, "-c", _RUNNER],
    cwd=root,
    env=os.environ | {"PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads((root / "outcomes.json").read_text())


@pytest.mark.parametrize("section", HOW_TOS, ids=lambda section: section.title.replace(" ", "_"))
def test_the_change_works(section, outcomes):
  assert outcomes[section.title] == ""


@pytest.mark.parametrize("section", HOW_TOS, ids=lambda section: section.title.replace(" ", "_"))
def test_the_table_counts_files_and_lines(section):
  row = re.search(
    rf"^\| {section.title.lower()} \| (\d+) \| (\d+) \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.M
  )
  assert row, f"{section.title} is not in the table"
  changed = {path for path, _ in section.changed}
  lines = sum(len(text.splitlines()) for text in section.new.values())
  lines += sum(line[0] in "+-" for _, diff in section.changed for line in diff.splitlines() if line)
  assert tuple(map(int, row.groups())) == (len(section.new), len(changed), lines)


@pytest.mark.parametrize("path", sorted({path for section in HOW_TOS for path in section.new}))
def test_new_files_are_formatted(path):
  """New files pass the linter as they are printed."""
  pytest.importorskip("ruff")
  text = next(section.new[path] for section in HOW_TOS if path in section.new)
  for command in (["check"], ["format", "--check"]):
    done = subprocess.run(
      [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(REPOSITORY / path), "-"],
      input=text,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_diff_that_does_not_fit_is_noticed():
  assert apply(" a\n+b\n", "a\nc\n") == "a\nb\nc\n"
  with pytest.raises(AssertionError, match="found 0 times"):
    apply(" x\n+b\n", "a\n")
