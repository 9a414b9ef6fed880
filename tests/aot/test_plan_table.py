"""The tables of docs/scale_tables.md hold what was found, and what there is to find."""

import pytest

from tests.support.scripts import load
from tests.support.toy import REPOSITORY

GIB = 2**30


@pytest.fixture(scope="module")
def plan_table():
  return load(REPOSITORY / "scripts/plan_table.py")


def found(topology, mesh, used, limit):
  return {
    "topology": topology,
    "mesh": mesh,
    "remat": "full",
    "fits": True,
    "bytes": round(used * GIB),
    "limit": round(limit * GIB),
    "mfu": 0.5,
  }


def test_cards_have_tables_beside_slices(plan_table):
  entries = plan_table.entries()
  assert {"2.5-4b/full/v5e", "2.5-4b/full/b200", "2.5-4b/lora/rtx4090:1"} <= set(entries)
  assert any(entry.startswith("named/2-8b/full/h100:8") or "2.5-8b/full/h100:8" in entry for entry in entries)
  assert len(set(entries)) == len(entries)


def test_entries_are_written_into_their_own_table(plan_table):
  results = {
    "2.5-4b/full/h100": found("h100:2", {"fsdp": 2}, 60.0, 72.07),
    "2.5-4b/full/rtx4090:1": {"topology": None, "tried": []},
    "2.5-4b/full/l40s:1": found("l40s:1", {}, 30.0, 40.2),
  }
  (head, _, row) = plan_table.table(results, plan_table.TABLES["cards"])
  assert head == "| size | trains | a100-80g | h100 | h200 | b200 |"
  assert row == "| 2.5-4b | full |  | **2**: fsdp 2, full, 60.0 of 72.1, ≤ 50% |  |  |"
  (*_, alone) = plan_table.table(results, plan_table.TABLES["one card"])
  # A search that begins with one card and ends with two says what one takes.
  assert alone == "| 2.5-4b | full | none | **1**: one device, full, 30.0 of 40.2, ≤ 50% | none |"
  assert "2.5-4b/full/h100:1" not in plan_table.entries()


def test_the_page_has_a_place_for_every_table(plan_table):
  page = (REPOSITORY / "docs/scale_tables.md").read_text(encoding="utf-8")
  for marker in ("named", *plan_table.TABLES):
    filled = plan_table.fill(page, marker, ["| a |", "|---|"])
    assert f"<!-- {marker} -->\n| a |\n|---|\n\n" in filled
    assert f"<!-- {marker} -->\n| size |" in page, "the table is empty"
