"""The measurements for a card run at toy size on the CPU, keep to their minutes, and say what they left out."""

import json
import math
import os
import pathlib
import sys

import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from tests.support import forked
from tests.support.scripts import load

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
PARTS = {"kernels", "step", "torch", "attention", "experts", "tilings", "curve", "costs"}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)


def start(out, *flags):
  environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "JAX_NUM_CPU_DEVICES": "1"}
  command = [str(BENCHMARKS / "gpu.py"), f"--out={out}", *flags]
  return forked.run(command, environment=environment, folder=out)


def run(out, *flags):
  done = start(out, *flags)
  assert done.returncode == 0, done.stderr
  return json.loads((out / "results.json").read_text()), (out / "table.md").read_text()


def assert_kernels_are_right(unit):
  """bfloat16 has eight bits; sums of products round a few times over, and means far less."""
  backends = {row["backend"] for row in unit["rows"]}
  assert unit["status"] == "done" and backends == {"triton_interpret", "xla"}
  assert len(unit["rows"]) == 12
  for row in unit["rows"]:
    assert 0 < row["forward_max"] < 2**-7 and 0 < row["backward_max"] < 2**-7, row
    assert 0 < row["forward_mean"] < 2**-8 and 0 < row["backward_mean"] < 2**-8, row


def test_parts_that_are_asked_for_and_parts_that_do_not_fit(tmp_path):
  found, _ = run(tmp_path, "--toy", "--only=kernels")
  assert list(found["units"]) == ["kernels"]
  assert_kernels_are_right(found["units"]["kernels"])

  # What is there stays, and all others are left out.
  later, table = run(tmp_path, "--toy", "--minutes=0")
  assert later["units"]["kernels"] == found["units"]["kernels"]
  assert {name.partition("/")[0] for name in later["units"]} == PARTS
  for name, unit in later["units"].items():
    if name != "kernels":
      assert unit["status"].startswith("left out: 0 s are left, and it may take") and not unit["rows"]
      assert f"- {name}: left out: 0 s are left" in table
  assert "toy sizes, whose times mean nothing" in table


def test_what_cannot_be_is_said_in_a_line(tmp_path):
  for flags, words in (
    (["--toy", "--only=kernel"], "--only=kernel: there is no such part; there are attention, costs, "),
    (["--toy", "--page=page.md"], "--page: what --toy measures says nothing"),
    ([], "JAX sees no NVIDIA card, but a cpu"),
  ):
    done = start(tmp_path, *flags)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_unit_that_takes_too_long_is_stopped_and_keeps_its_rows(tmp_path):
  from gpu_results import Results

  gpu, results = load(BENCHMARKS / "gpu.py"), Results(tmp_path)
  script = tmp_path / "script.py"
  script.write_text(
    "import sys, time; sys.path.insert(0, sys.argv[1]); from gpu_results import Results\n"
    "Results(sys.argv[2]).add('experts', case='first'); time.sleep(600)"
  )
  command = [sys.executable, str(script), str(BENCHMARKS), str(tmp_path)]
  path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
  unit = gpu.Unit(name="experts", functions=(), seconds=5)
  gpu.run_apart(unit, results, 5, command, os.environ | {"PYTHONPATH": path})
  unit = results.read()["units"]["experts"]
  assert unit["rows"] == [{"case": "first"}] and unit["status"].startswith("stopped after")

  broken = gpu.Unit(name="curve", functions=(), seconds=1)
  gpu.run_apart(broken, results, 60, [sys.executable, "-c", "import sys; sys.exit(3)"], dict(os.environ))
  assert results.read()["units"]["curve"]["status"] == "failed with status 3"


def test_results_of_another_card_are_not_mixed_in(tmp_path):
  from gpu_results import Results
  from internvl_jax.errors import UserError

  results = Results(tmp_path)
  results.describe(card="one", driver="1")
  results.describe(card="two", driver="1")  # Nothing was measured yet.
  results.begin("experts")
  results.describe(card="two", driver="1")
  with pytest.raises(UserError, match=r"of another card \(two, now one\); name another folder"):
    results.describe(card="one", driver="1")


def test_a_row_is_what_packing_makes():
  import gpu_rows

  batch = gpu_rows.packed_batch(512, per_tile=16, side=28, image_token=100)
  ids, segments, index, targets, positions = (
    getattr(batch, name)[0, 0] for name in ("input_ids", "segment_ids", "image_index", "targets", "positions")
  )
  used = index[index != NO_IMAGE]
  np.testing.assert_array_equal(used, np.arange(len(used)))
  assert len(used) % 16 == 0 and 0 < len(used) // 16 <= batch.tiles.shape[2]
  np.testing.assert_array_equal(ids == 100, index != NO_IMAGE)
  supervised = np.flatnonzero(targets != IGNORE_INDEX)
  assert supervised.size and (segments[supervised] == segments[supervised + 1]).all()
  np.testing.assert_array_equal(targets[supervised], ids[supervised + 1])
  assert (index[supervised + 1] == NO_IMAGE).all()
  np.testing.assert_array_equal(
    np.flatnonzero(positions[segments > 0] == 0)[1:], np.cumsum(gpu_rows.segment_lengths(512))[:-1]
  )
  seen = (segments[:, None] == segments) & (segments > 0) & (np.arange(512)[:, None] >= np.arange(512))
  assert gpu_rows.causal_pairs(512) == seen.sum()
  near = np.arange(512)[:, None] - np.arange(512) < 9
  assert gpu_rows.causal_pairs(512, window=9) == (seen & near).sum()


def test_a_row_shows_no_more_tiles_than_its_pool_has():
  import gpu_rows

  for segments in (1, 4, 16):
    for pool in (1, 5, 40):
      shares = [0.99 / segments] * segments
      row = gpu_rows.packed_batch(512, per_tile=16, side=28, image_token=100, pool=pool, shares=shares)
      assert row.tiles.shape[2] == pool and row.image_index.max() < 16 * pool
      assert row.segment_ids.max() == segments


def test_costs_are_those_that_were_planted():
  import gpu_costs
  from internvl_jax.errors import UserError

  tiles, tokens, pairs = [8, 24, 8, 24] * 3, [4096] * 6 + [8192] * 6, [1e6, 1e6, 8e6, 8e6, 3e5, 3e5] * 2
  features = np.array([tiles, tokens, pairs]).T

  def fitted(*costs):
    return gpu_costs.fit(features.tolist(), (features @ costs[:3] + costs[3]).tolist())

  found = fitted(2.5, 0.02, 4e-6, 15.0)
  np.testing.assert_allclose(
    (found.tile, found.token, found.pair, found.constant), (2.5, 0.02, 4e-6, 15), rtol=1e-6
  )
  assert found.worst < 1e-9 and found.setting == "loader.balance_costs=(2.5,0.02,4e-06)"
  # Costs are never below 0, and the error says what they miss.
  odd = fitted(2.5, 0.02, -1e-6, 15.0)
  assert odd.pair == 0 and odd.worst > 0.01
  assert fitted(2.5, 0.0, 4e-6, 15.0).setting is None
  with pytest.raises(UserError, match="do not tell tiles, tokens, pairs and the rest apart"):
    gpu_costs.fit([[8, 4096, 1e6], [24, 4096, 1e6], [8, 4096, 8e6], [24, 4096, 8e6]], [1, 2, 3, 4])


def test_a_page_gets_its_tables_between_its_markers(tmp_path):
  import gpu_report
  from internvl_jax.errors import UserError

  row = {"case": "3-1b", "trains": "full", "tokens": 8106, "row": 8192, "tiles": 23, "pool": 24}
  row |= {"attention": "triton", "remat": "full", "compile_seconds": 31.0, "useful_tflop": 75.0}
  row |= {"ms": 300.0, "ms_least": 299.0, "ms_most": 302.0, "tokens_per_second": 27020.0}
  row |= {"peak_bytes": 2**34, "peak_before_bytes": 2**33, "planned_bytes": 2**34}
  refused = {"case": "8B", "backend": "cudnn", "pass": "forward", "refused": "RuntimeError: no"}
  units = {
    "attention": {"status": "done", "rows": [refused]},
    "step/3-1b": {"status": "done", "rows": [row], "command": "python gpu.py", "date": "2026-01-01"},
    "curve": {"status": "left out: no time", "rows": []},
  }
  lines = gpu_report.render({"machine": {"card": "a card", "peak_tflops": 1000.0}, "units": units})
  page = tmp_path / "page.md"
  page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
  gpu_report.write_page(page, lines)
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
  assert "| 300 (299 to 302) | 27020 | 25.0% | 16.00 | 16.00 | 31 |" in text
  assert "- attention: 8B, cudnn, forward: RuntimeError: no" in text
  assert "- curve: left out: no time" in text and "Card a card." in text
  page.write_text("nothing")
  with pytest.raises(UserError, match="has no line"):
    gpu_report.write_page(page, lines)


def test_the_page_of_the_documentation_has_its_markers():
  import gpu_report

  text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
  assert text.count(gpu_report.BEGIN) == text.count(gpu_report.END) == 1


def test_samples_for_pytorch_are_those_of_the_row():
  import gpu_rows
  import gpu_torch

  batch = gpu_rows.packed_batch(512, per_tile=16, side=28, image_token=100)
  rows = {name: getattr(batch, name)[0, 0] for name in ("input_ids", "targets", "segment_ids", "image_index")}
  samples = gpu_torch.split({**rows, "tiles": batch.tiles[0, 0], "per_tile": np.asarray(16)})
  assert [len(sample["input_ids"]) for sample in samples] == gpu_rows.segment_lengths(512)
  assert all((s["input_ids"] == 100).sum() == 16 * len(s["tiles"]) for s in samples)
  # A label stands at its own token there, and one place earlier here.
  assert sum((s["labels"] != -100).sum() for s in samples) == (batch.targets != IGNORE_INDEX).sum()
  assert all(np.isin(s["labels"] - s["input_ids"], (0, *(-100 - s["input_ids"]))).all() for s in samples)
  first, second = gpu_torch.unpacked(samples, 4)
  assert first["input_ids"].shape == (4, len(samples[0]["input_ids"])) and second["input_ids"].shape[0] == 3
  assert first["attention_mask"].sum() + second["attention_mask"].sum() == (batch.segment_ids > 0).sum()
  packed = gpu_torch.packed_row(samples)
  np.testing.assert_array_equal(packed["position_ids"][0], batch.positions[batch.segment_ids > 0])


def test_another_tiling_is_the_one_that_runs():
  import functools

  import jax

  import gpu_attention
  from internvl_jax.models.attention import attention, triton

  shape = gpu_attention.timed_shapes(True)[0]
  own = triton._tilings(jax.numpy.dtype("bfloat16"), 16).forward

  def text():
    attend = functools.partial(attention, backend="triton_interpret")
    function, _ = gpu_attention.passes(shape, attend)["forward"]
    return str(jax.make_jaxpr(function)(shape.inputs()))

  before = text()
  with gpu_attention.tiled("forward", own._replace(TB=32)) as asked:
    during = text()
  assert asked and before != during and text() == before


@pytest.mark.slow
def test_everything_at_toy_size(tmp_path):
  found, table = run(tmp_path, "--toy", "--minutes=15")
  units = found["units"]
  assert {name.partition("/")[0] for name in units} == PARTS
  assert {unit["status"] for unit in units.values()} == {"done"}, units
  assert_kernels_are_right(units["kernels"])
  (step,) = units["step/toy"]["rows"]
  assert step["ms"] > 0 and step["planned_bytes"] > 0 and step["tiles"] <= step["pool"]
  assert math.isfinite(step["first_loss"]) and step["last_loss"] < step["first_loss"]
  (costs,) = units["costs/toy"]["rows"]
  assert len(costs["batches"]) == len(costs["times_ms"]) == 12 and costs["constant"] >= 0
  assert {tuple(batch[:2]) for batch in costs["batches"]} == {
    (tiles, tokens) for tiles in (math.ceil(step["pool"] / 3), step["pool"]) for tokens in (32, 64)
  }
  for name in ("attention", "experts", "tilings"):
    assert units[name]["rows"] and all(row["ms"] > 0 and row["tflops"] > 0 for row in units[name]["rows"])
  (curve,) = units["curve"]["rows"]
  assert len(curve["float32"]) == len(curve["bf16"]) == 3 and 0 < curve["largest"] < 0.01
  ways = {row["way"]: row for row in units["torch/toy"]["rows"]}
  try:
    import torch  # noqa: F401
  except ImportError:
    assert "not installed" in ways["all"]["skipped"]
  else:
    assert (
      ways["packed, sdpa"]["computed_tokens"] == step["tokens"] < ways["unpacked, sdpa"]["computed_tokens"]
    )
    assert all("ms" in row or "skipped" in row for row in ways.values())
  assert "### Training step, one packed row" in table
