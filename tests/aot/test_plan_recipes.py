"""Every published recipe has a size and cards to be planned for."""

import pytest

from internvl_jax.hf import published
from tests.support.scripts import load
from tests.support.toy import REPOSITORY
from tests.test_recipes import SCRIPTS


@pytest.fixture(scope="module")
def plan_recipes():
  return load(REPOSITORY / "scripts/plan_recipes.py")


@pytest.fixture(scope="module")
def entries(plan_recipes):
  found = [plan_recipes.entry_of(script) for script in SCRIPTS]
  return {entry.recipe: entry for entry in found}


def test_all_recipes_have_a_size_and_the_cards_of_their_script(entries):
  assert len(entries) == 117 and {entry.size for entry in entries.values()} <= set(published.SIZES)
  cards = {name: (entry.size, entry.hosts, entry.cards) for name, entry in entries.items()}
  assert cards["internvl2_5/finetune.py:8b,lora"] == ("2.5-8b", 1, 2)
  assert cards["internvl3/finetune.py:78b"] == ("3-78b", 4, 8)
  assert cards["internvl2_5/stage2.py:78b"] == ("2.5-78b", 64, 8)
  assert cards["internvl1_2/stage2.py:40b"] == ("2-40b", 8, 8)
  assert cards["internvl3_5/warmup.py:20b"] == ("3.5-20b-a4b", 1, 8)


def test_recipes_of_one_step_are_compiled_once(plan_recipes, entries, monkeypatch):
  monkeypatch.setattr(plan_recipes, "_CARD", type("Flag", (), {"value": "a100-80g"}))
  key = {name: entry.key for name, entry in entries.items()}
  assert key["internvl3/mpo.py:38b"] == key["internvl2_5/mpo.py:38b"]  # the same architecture
  assert key["mini_internvl/finetune.py:2b,bdd"] == key["mini_internvl/finetune.py:2b,medical"]
  assert key["internvl2_5/finetune.py:8b"] != key["internvl2_5/finetune.py:8b,lora"]
  assert entries["internvl3/finetune.py:78b"].topology == "a100-80g:4x8"
  assert entries["internvl2_5/finetune.py:8b,lora"].topology == "a100-80g:2"


def test_the_table_says_what_does_not_fit(plan_recipes):
  batch = {"rows": 4, "tokens": 8192, "tiles": 7}
  found = {
    "recipes": ["a.py:8b"],
    "topology": "a100-80g:8",
    "batch": batch,
    "fits": False,
    "bytes": 2**37,
    "limit": 2**36,
  }
  lines = plan_recipes.table({"a.py:8b": found, "b.py:1b": {"recipes": ["b.py:1b"], "error": "no word"}})
  assert lines[2:] == [
    "| `a:8b` | a100-80g:8 | 4 x 8192 + 7 | **128.0** of 64.0 |",
    "| `b:1b` | | | failed: no word |",
  ]


def test_what_does_not_fit_is_planned_for_more_hosts(plan_recipes, entries, monkeypatch):
  """Not for those whose cards cannot hold the state; the same recipe on more devices, until it fits."""
  monkeypatch.setattr(plan_recipes, "_CARD", type("Flag", (), {"value": "a100-80g"}))
  tried = []

  def planned(entry):
    tried.append((entry.recipe, entry.topology))
    return {
      "topology": entry.topology,
      "batch": {},
      "fits": entry.hosts == 16,
      "bytes": 1,
      "limit": 72,
      "seconds": 1,
    }

  monkeypatch.setattr(plan_recipes, "planned", planned)
  entry = entries["internvl3_5/sft.py:241b"]
  memory = {"parameters that train": 112, "frozen parameters": 0, "optimizer state": 224, "gradients": 112}
  found = plan_recipes.least(entry, {"memory": memory, "limit": 72})
  assert tried == [(f"internvl3_5/sft.py:241b,devices={8 * n}", f"a100-80g:{n}x8") for n in (8, 16)]
  assert found["topology"] == "a100-80g:16x8"
  there = {"topology": "a100-80g:16x8", "bytes": 2**36}
  assert plan_recipes.fewest({"least": there}) == "; 64.0 on a100-80g:16x8"
