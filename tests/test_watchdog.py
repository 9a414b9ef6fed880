"""The watchdog names the phase that lasts too long, once every such time, and no other."""

import subprocess
import sys
import time

from internvl_jax.watchdog import Watchdog


def test_it_names_the_inner_phase_that_lasts():
  said = []
  with Watchdog("node7 (process 1 of 4)", 0.2, write=said.append) as watchdog:
    for step in range(20):
      with watchdog.phase("step", step):
        time.sleep(0.02)
    assert said == []
    start = time.monotonic()
    with watchdog.phase("save", 20), watchdog.phase("barrier"):
      time.sleep(0.5)
    lasted = time.monotonic() - start
    time.sleep(0.3)  # No phase, nothing to say.
  assert 2 <= len(said) <= lasted / 0.2
  assert all(text.startswith("node7 (process 1 of 4) has been in phase 'barrier' for ") for text in said), (
    said
  )


def test_an_outer_phase_waits_anew_after_an_inner_one():
  said = []
  with Watchdog("node7", 0.5, write=said.append) as watchdog, watchdog.phase("save"):
    for _ in range(8):
      with watchdog.phase("write"):
        time.sleep(0.1)
    assert not any("phase 'save'" in text for text in said)
    time.sleep(0.8)
  assert "phase 'save'" in said[-1]


def test_stacks_come_with_it():
  program = """
import time
from internvl_jax.watchdog import Watchdog

def reads_a_dead_disk():
  time.sleep(0.5)

with Watchdog("node7", 0.3) as watchdog, watchdog.phase("data wait", 12):
  reads_a_dead_disk()
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stderr.count("node7 has been in phase 'data wait' of step 12 for") == 1
  assert "in reads_a_dead_disk" in done.stderr
