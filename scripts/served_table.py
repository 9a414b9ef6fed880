"""Writes the table of docs/checkpoints.md: what transformers makes of an export beside what training makes.

  python scripts/served_table.py

It needs torch and torchvision (the extra parity). `tests/test_served.py` compares the table with what it says.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support import served

PAGE = Path(__file__).parent.parent / "docs/checkpoints.md"
MARKER = "<!-- served -->\n"


def written() -> list[str]:
  """The table as it stands in the page."""
  text = PAGE.read_text(encoding="utf-8")
  return text.split(MARKER)[1].split("\n\n")[0].splitlines()


def main() -> None:
  """Compares all combinations and writes the table."""
  with tempfile.TemporaryDirectory() as folder:
    lines = served.table(served.compare(Path(folder)))
  text = PAGE.read_text(encoding="utf-8")
  head, rest = text.split(MARKER)
  tail = rest.split("\n\n", 1)[1]
  PAGE.write_text(head + MARKER + "\n".join(lines) + "\n\n" + tail, encoding="utf-8")


if __name__ == "__main__":
  main()
