"""Revisions of this repository, each in a folder of its own: what the benchmarks that compare them share."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app

REPOSITORY = Path(__file__).resolve().parents[1]


def revisions(asked: Sequence[str]) -> list[str]:
  """The base first, then what is compared with it: commits, or `.`, the working tree."""
  if len(asked) == 1 and ".." in asked[0]:
    base, _, last = asked[0].partition("..")
    between = git("rev-list", "--reverse", "--first-parent", f"{base}..{last or 'HEAD'}").split()
    return [git("rev-parse", base), *between]
  found = [name if name == "." else git("rev-parse", name) for name in asked]
  return found if len(found) > 1 else [*found, "."]


def git(*arguments: str) -> str:
  ran = subprocess.run(
    ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
  )
  if ran.returncode:
    raise app.UsageError(ran.stderr.strip())
  return ran.stdout.strip()


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
  """A folder with a revision's files."""
  if revision == ".":
    yield REPOSITORY
    return
  with tempfile.TemporaryDirectory() as folder:
    archive = subprocess.run(
      ["git", "-C", str(REPOSITORY), "archive", revision], stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    yield Path(folder)
