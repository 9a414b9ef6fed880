"""Plans every published recipe, as shipped, for as many A100s of 80 GB as its launch script names.

  python scripts/plan_recipes.py [--results benchmarks/recipes.json] [--only internvl2_5/finetune] [--card a100-80g] [--list]

Recipes that differ in nothing that a compiled step depends on are compiled once, each by `python -m internvl_jax.plan`:
half a minute to minutes. Every outcome goes to the file of results at once, so that a run that was stopped goes on where
it was; entries that failed are tried again. Of what does not fit, the least number of hosts that does, by powers of two,
is looked for. At the end, all that is there is printed as a table. It needs the extras
`plan-gpu` and `test`: which script a recipe is of, tests/test_recipes.py knows.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parent.parent))

from internvl_jax.config import TrainConfig, to_json
from internvl_jax.hf import published
from tests.test_recipes import CONFIGS, SCRIPTS, load, recipe_of

GIB = 2**30
DOCS = Path(__file__).parents[1] / "docs"

_RESULTS = flags.DEFINE_string(
  "results", str(DOCS.parent / "benchmarks" / "recipes.json"), "File of results; made if it is not there."
)
_ONLY = flags.DEFINE_list("only", [], "Recipes to plan, or what they begin with; none: all.")
_CARD = flags.DEFINE_string("card", "a100-80g", "Kind of card.")
_LIST = flags.DEFINE_bool(
  "list", False, "Plan nothing; print what there is to plan, and which recipes share it."
)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "The longest that a recipe may take.", lower_bound=0)

SIZES = {"20b": "20b-a4b", "30b": "30b-a3b", "241b": "241b-a28b"}
"""What recipes of InternVL3.5 call their models -> how the published sizes are called."""

FREE = {
  "data": {"meta_path", "conv_style", "loss_reduction", "max_buffer_size", "log_freq", "strict_mode"},
  "training": {
    *(
      "output_dir",
      "learning_rate",
      "weight_decay",
      "warmup_ratio",
      "warmup_steps",
      "lr_scheduler_type",
      "seed",
    ),
    *("num_train_epochs", "max_steps", "logging_steps", "save_steps", "save_total_limit", "save_strategy"),
    *("report_to", "dataloader_num_workers", "gradient_accumulation_steps", "group_by_length", "do_train"),
    *("remove_unused_columns", "overwrite_output_dir", "evaluation_strategy"),
  },
  "model": {"model_name_or_path", "vision_path", "llm_path", "mlp_path", "use_fast_tokenizer", "use_liger"},
}
"""Leaf -> fields that the memory of a step does not depend on; of accumulation, that there is any is kept."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A recipe with the model and the cards that it is for."""

  recipe: str
  size: str
  hosts: int
  cards: int
  config: TrainConfig

  @property
  def topology(self) -> str:
    """As `plan` calls it."""
    return f"{_CARD.value}:{f'{self.hosts}x' if self.hosts > 1 else ''}{self.cards}"

  @property
  def key(self) -> str:
    """What the compiled step depends on: equal for recipes that are compiled once."""
    tree = to_json(self.config)
    kept = {
      leaf: {k: v for k, v in fields.items() if k not in FREE.get(leaf, ())} for leaf, fields in tree.items()
    }
    accumulates = self.config.training.gradient_accumulation_steps > 1
    model = published.config_of(self.size)
    return json.dumps([model, self.topology, accumulates, kept], sort_keys=True)


def entry_of(script: str) -> Entry:
  """The recipe of a launch script."""
  recipe, launch = recipe_of(script), SCRIPTS[script]["launch"]
  config = load(recipe)
  training = config.training
  rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
  shards = launch["BATCH_SIZE"] // rows if "BATCH_SIZE" in launch else launch["GPUS"]
  devices = shards * config.mesh.sequence
  cards = min(devices, 8)
  return Entry(recipe, size_of(recipe), devices // cards, cards, config)


def size_of(recipe: str) -> str:
  """The published size of the same architecture as a recipe's model."""
  folder, size = re.fullmatch(r"(\w+)/\w+\.py:(\w+)(?:,.*)?", recipe).groups()  # pyright: ignore[reportOptionalMemberAccess]
  generation = {"internvl2_5": "2.5", "internvl3": "3", "internvl3_5": "3.5"}.get(folder, "2")
  if generation == "2" and size in ("yi34b", "40b"):
    size = "40b"
  return f"{generation}-{SIZES.get(size, size) if generation == '3.5' else size}"


def main(argv: Sequence[str]) -> None:
  """Plans what is missing, and prints the table."""
  del argv
  path, only = Path(_RESULTS.value), tuple(_ONLY.value)
  entries = [entry_of(script) for script in SCRIPTS]
  groups: dict[str, list[Entry]] = {}
  for entry in entries:
    groups.setdefault(entry.key, []).append(entry)
  for members in groups.values():
    name = members[0].recipe
    if _LIST.value:
      print(f"{members[0].size:<14}{members[0].topology:<16}{'  '.join(entry.recipe for entry in members)}")
    elif not only or any(entry.recipe.startswith(only) for entry in members):
      found = read(path).get(name, {"error": "not there"})
      if "error" in found:
        found = planned(members[0]) | {"recipes": [entry.recipe for entry in members]}
        keep(path, name, found)
      if not found.get("fits", True) and "least" not in found:
        keep(path, name, found | {"least": least(members[0], found)})
  if not _LIST.value:
    print("\n".join(table(read(path))))


def keep(path: Path, name: str, found: dict[str, Any]) -> None:
  """Writes a result and tells it."""
  path.write_text(json.dumps(read(path) | {name: found}, indent=1) + "\n")
  print(f"{name}: {words(found)}", flush=True)


KEPT = ("parameters that train", "frozen parameters", "optimizer state")
"""What all cards share."""


def least(entry: Entry, there: dict[str, Any]) -> dict[str, Any] | None:
  """The plan for the fewest hosts, up to 64, on which a recipe fits that does not fit on its script's; or None."""
  kept = sum(there["memory"][part] for part in KEPT) * entry.hosts * entry.cards
  for hosts in (2**n for n in range(1, 7)):
    if hosts > entry.hosts and kept / (8 * hosts) < there["limit"]:
      recipe = f"{entry.recipe},devices={8 * hosts}"
      found = planned(dataclasses.replace(entry, recipe=recipe, hosts=hosts, cards=8))
      print(f"  {recipe}: {words(found)}", flush=True)
      if found.get("fits"):
        return {name: found[name] for name in ("topology", "batch", "bytes", "seconds")}
  return None


def read(path: Path) -> dict[str, Any]:
  """The results so far."""
  return json.loads(path.read_text()) if path.is_file() else {}


def planned(entry: Entry) -> dict[str, Any]:
  """What `plan` says of a recipe, shortened, or why it says nothing."""
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / "found.json"
    command = [sys.executable, "-m", "internvl_jax.plan", f"--config={CONFIGS / entry.recipe}"]
    command += [f"--size={entry.size}", f"--topology={entry.topology}", f"--json={written}"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * _MINUTES.value)
    except subprocess.TimeoutExpired:
      return {"error": f"took more than {_MINUTES.value:g} minutes"}
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
      return {"error": (lines or done.stderr.splitlines() or ["no word"])[0]}
    found = json.loads(written.read_text())
  return {
    "topology": found["topology"],
    "batch": found["batch"],
    "fits": found["fits"],
    "bytes": found["total"],
    "limit": found["limit"],
    "memory": found["memory"],
    "peak": found["peak"][:6],
    "seconds": round(found["lower_seconds"] + found["compile_seconds"]),
  }


def words(found: dict[str, Any]) -> str:
  """An outcome in a few words."""
  if "error" in found:
    return f"failed: {found['error']}"
  verdict = "fits" if found["fits"] else "does not fit"
  return f"{verdict} {found['topology']}: {found['bytes'] / GIB:.1f} of {found['limit'] / GIB:.1f} GiB a card{fewest(found)}"


def fewest(found: dict[str, Any]) -> str:
  """The least number of cards of what does not fit, and what it takes there."""
  if "least" not in found:
    return ""
  there = found["least"]
  return f"; {there['bytes'] / GIB:.1f} on {there['topology']}" if there else "; not on 64 hosts either"


def table(results: dict[str, Any]) -> list[str]:
  """All outcomes as Markdown."""
  lines = ["| recipes | cards | rows x tokens + tiles a card | GiB a card, of |", "|---|---|---|---|"]
  for found in results.values():
    names = ", ".join(f"`{name.replace('.py', '')}`" for name in found["recipes"])
    if "error" in found:
      lines.append(f"| {names} | | | failed: {found['error']} |")
      continue
    batch, used = found["batch"], f"{found['bytes'] / GIB:.1f}"
    lines.append(
      f"| {names} | {found['topology']} | {batch['rows']} x {batch['tokens']} + {batch['tiles']} | "
      f"{used if found['fits'] else f'**{used}**'} of {found['limit'] / GIB:.1f}{fewest(found)} |"
    )
  return lines


if __name__ == "__main__":
  app.run(main)
