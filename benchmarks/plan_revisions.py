"""Plans arrangements of docs/scale_tables.md by two revisions: memory, operations, and the compiler's work.

  python benchmarks/plan_revisions.py BASE [REVISION] [--arrangements 2.5-8b/full/v5e:4x4] [--pairs 2]

A change that is to leave programs for TPUs alone is shown to do so here. Each revision is checked out apart and plans by its
own code, in a process of its own, in turn; REVISION is the working tree (`.`) by default. Prints for each arrangement the
bytes of a device and the FLOPs of both, and the median ratio of the time that cores worked on a plan, which neighbors on
a busy machine disturb less than its time. Exits with 1 where a revision's program takes more memory or more FLOPs, or
its plan more than 5 % more work.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from revisions import REPOSITORY, checkout, revisions

from internvl_jax.aot import recipe

DEFAULT = (
  "2.5-8b/full/v5e:4x4",
  "2.5-8b/lora/v6e:2x2",
  "2.5-78b/full/v5p:4x4x4",
  "3.5-30b-a3b/full/v6e:4x8",
  "3-8b/MPO/v5e:4x4",
)
"""Of each kind one: dense, with adapters, with tensor parallelism, of experts, of pairs."""

MOST_WORK = 1.05
"""Times of one revision's plans differ by a few percent."""

_ARRANGEMENTS = flags.DEFINE_list(
  "arrangements", list(DEFAULT), "Arrangements of scripts/plan_table.py, as SIZE/MODE/TOPOLOGY."
)
_PAIRS = flags.DEFINE_integer("pairs", 2, "Plans by each revision.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a plan found, and the seconds that cores worked on it."""

  device_bytes: int
  flops: int
  busy: float


def main(argv: Sequence[str]) -> int:
  if len(argv) not in (2, 3):
    raise app.UsageError(
      "name a revision to compare with, and the one to compare unless it is the working tree"
    )
  base, other = revisions(argv[1:])
  options = arrangements()
  if unknown := set(_ARRANGEMENTS.value) - set(options):
    raise app.UsageError(f"no arrangements: {sorted(unknown)}; there are {', '.join(options)}")
  worse = False
  with checkout(base) as before, checkout(other) as after:
    for name in _ARRANGEMENTS.value:
      pairs = [(plan(before, options[name]), plan(after, options[name])) for _ in range(_PAIRS.value)]
      worse |= report(name, pairs)
  return int(worse)


def arrangements() -> dict[str, list[str]]:
  """Options of `plan` by SIZE/MODE/TOPOLOGY; of several of one name the first."""
  sys.path.insert(0, str(REPOSITORY / "scripts"))
  from plan_table import NAMED

  return {f"{a.size}/{a.mode}/{a.topology}": a.options for a in reversed(NAMED)}


def plan(tree: Path, options: Sequence[str]) -> Plan:
  """Plans by the code of a tree.

  Raises:
    RuntimeError: it fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / "plan.json"
    # The package's recipe lies in the tree that plans.
    options = [
      option.replace(recipe.__file__, str(tree / "internvl_jax/aot/recipe.py")) for option in options
    ]
    command = [sys.executable, "-m", "internvl_jax.plan", *options, f"--json={written}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
      command,
      env=os.environ | {"PYTHONPATH": str(tree)},
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
      raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-3000:].strip()}")
    found = json.loads(written.read_text())
  busy = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
  return Plan(found["total"], found["compiled_flops"], busy)


def report(name: str, pairs: Sequence[tuple[Plan, Plan]]) -> bool:
  """Prints a line; whether the second of the pairs is worse."""
  before, after = pairs[0]
  work = statistics.median(new.busy / old.busy for old, new in pairs)
  print(
    f"{name}: {before.device_bytes / 2**30:.3f} -> {after.device_bytes / 2**30:.3f} GiB a device, "
    f"{before.flops:.4g} -> {after.flops:.4g} FLOPs, {work:.3f} of the work to plan ({after.busy:.0f} s)",
    flush=True,
  )
  return after.device_bytes > before.device_bytes or after.flops > before.flops or work > MOST_WORK


if __name__ == "__main__":
  app.run(main)
