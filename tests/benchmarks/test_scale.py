"""The simulation of many chips keeps to what is known by arithmetic, and says what it assumes before what it found."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

from tests.support.scripts import load
from tests.support.toy import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
IDEAL = {"hop": 0.0, "hidden": 1.0, "spread": 0.0, "stalls": 0.0}


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    yield


@pytest.fixture(scope="module")
def scale(on_the_path):
  return load(BENCHMARKS / "scale.py")


@pytest.fixture(scope="module")
def model(scale):
  return sys.modules["scale_model"]


@pytest.fixture(scope="module")
def found():
  return json.loads((BENCHMARKS / "scale_programs.json").read_text())


@pytest.fixture(scope="module")
def slices(scale, model, found):
  settings = scale.Settings(steps=8, runs=2, seed=0, epochs=1)
  rows = scale.recorded_rows(found["tokens"], found["tiles"], settings)
  made = model.programs(found)
  return [scale.drawn_slice(program, rows, found["useful"], settings) for program in (made[0], made[-1])]


def reliability(model, **changes):
  sure = {"between": 50_000.0, "copy": 20.0, "barrier": 0.0, "write": 0.0, "restart": 300.0, "sigma": 0.0}
  return model.Reliability(**sure | changes)


def test_every_program_fits_and_there_are_few_and_many_chips(found, model):
  assert all(entry["fits"] for entry in found["programs"].values())
  chips = [program.chips for program in model.programs(found)]
  assert chips[0] == 8 and chips[-1] == 4096 and chips == sorted(set(chips))


# --- A step -------------------------------------------------------------------------------------------------


def test_no_slice_exceeds_a_single_chip_without_padding(scale, model, slices):
  assumptions = model.Assumptions()
  for one in slices:
    flops = one.program.flops + (one.tiles - one.program.tiles) * one.program.flops_of_tile
    alone = assumptions.products * one.useful / flops
    outcome = scale.simulated(one, assumptions, scale.Settings(steps=8, runs=1, seed=0))
    mfus = [outcome.steps[kind].mfu for kind in scale.POOLS]
    assert all(0 < mfu < alone for mfu in mfus)
    assert outcome.effective <= outcome.step.mfu
    assert math.isclose(sum(outcome.shares().values()), 1.0)
    assert min(outcome.shares().values()) >= 0


def test_what_is_ideal_costs_nothing(model, slices):
  one = slices[0]
  pools = np.full(4, one.program.tiles)
  ideal = model.Assumptions().changed(IDEAL | {"products": 1.0, "memory": 1.0, "links": 1.0})
  step = model.step_time(one.program, one.useful, one.tiles, pools, ideal, np.random.default_rng(0))
  assert step.exchanges == step.waiting == 0
  assert math.isclose(step.total, one.program.flops / one.program.chip.flops)
  none_hidden = ideal.changed({"hidden": 0.0})
  slower = model.step_time(one.program, one.useful, one.tiles, pools, none_hidden, np.random.default_rng(0))
  least = sum(seconds for _, _, seconds in one.program.exchanges)
  assert math.isclose(slower.total - step.total, least)


def test_exchanges_hide_behind_products_that_there_are(model, slices):
  one = slices[0]
  slow = dataclasses.replace(one.program, exchanges=(("all-gather", 1, 100.0),))
  ideal = model.Assumptions().changed(IDEAL | {"links": 1.0})
  pools = np.full(4, one.program.tiles)
  step = model.step_time(slow, one.useful, one.tiles, pools, ideal, np.random.default_rng(0))
  assert math.isclose(step.total, 100.0)


def test_latency_grows_with_the_slice(model, slices):
  exchanges = (("all-gather", 10, 0.0), ("all-reduce", 10, 0.0), ("collective-permute", 10, 0.0))
  for topology, hops in (("v5p:2x2x2", 3), ("v5p:4x4x4", 6), ("v5p:16x16x16", 24)):
    program = dataclasses.replace(slices[0].program, topology=topology, exchanges=exchanges)
    assert math.isclose(program.exchanging(model.Assumptions()), 10 * (3 * hops + 1) * 1e-6)


def test_stragglers_grow_with_the_slice(model):
  rng = np.random.default_rng(0)
  few, many = (model._slowness(200, chips, rng).mean() for chips in (8, 4096))
  # The means of the largest of so many |normal|.
  assert abs(few - 1.84) < 0.1 and abs(many - 3.8) < 0.1
  assumptions = model.Assumptions().changed({"stalls": 0.01, "stall": 2.0})
  assert abs(model._lateness(50_000, 1, assumptions, rng).mean() - 0.02) < 0.003


def test_balanced_rows_pad_no_more_than_rows_as_they_come(scale, slices):
  for one in slices:
    budget, plain, balanced = (one.pools[kind] for kind in scale.POOLS)
    assert set(budget) == {one.program.tiles}
    assert balanced.mean() <= plain.mean()
    assert plain.min() >= one.tiles


def test_steps_wait_for_the_fullest_pool(model):
  assert model.fullest(np.array([[1, 5], [17, 3], [0, 0]])).tolist() == [6, 24, 0]


# --- A run --------------------------------------------------------------------------------------------------


def test_without_failures_all_but_saves_counts(model):
  how = reliability(model, between=math.inf, barrier=5.0, sigma=0.5)
  run = model.simulate(how, 600.0, days=2, runs=3, rng=np.random.default_rng(0))
  assert math.isclose(run.goodput, 1 - run.saves) and abs(run.lost) < 1e-12 and run.failures == 0
  assert math.isclose(run.saves, how.pause / (600 + how.pause), rel_tol=0.05)


def test_goodput_is_that_of_the_formula(model):
  how = reliability(model)
  for interval in (500.0, how.best_interval(), 6000.0):
    run = model.simulate(how, interval, days=200, runs=4, rng=np.random.default_rng(1))
    # About 1,400 failures, each of which costs half an interval and a restart, give or take as much.
    assert abs(run.goodput - model.expected_goodput(how, interval)) < 0.004
    assert 0 < run.goodput < 1 and math.isclose(run.goodput + run.saves + run.lost, 1.0)


def test_no_interval_is_better_than_the_optimum(model):
  how = reliability(model)
  best = how.best_interval()
  assert math.isclose(best, math.sqrt(2 * 20 * 50_000))
  goodput = {factor: model.expected_goodput(how, factor * best) for factor in (0.25, 0.5, 0.9, 1, 1.1, 2, 4)}
  # A first-order optimum: a tenth beside it makes no difference of a thousandth.
  assert max(goodput.values()) - goodput[1] < 1e-4
  assert goodput[1] > goodput[0.5] > goodput[0.25] and goodput[1] > goodput[2] > goodput[4]
  simulated = {
    factor: model.simulate(how, factor * best, days=200, runs=2, rng=np.random.default_rng(2)).goodput
    for factor in (0.25, 1, 4)
  }
  assert simulated[1] > max(simulated[0.25], simulated[4])


def test_a_save_begins_when_the_last_one_is_written(model):
  assert reliability(model, write=4000.0).best_interval() == 4000.0
  assert reliability(model, between=math.inf).best_interval() == model.DAY


def test_work_that_no_checkpoint_holds_is_lost(model):
  """A checkpoint that takes longer to write costs what is done meanwhile."""
  at_once, later = (
    model.simulate(reliability(model, write=write), 2000.0, days=100, runs=2, rng=np.random.default_rng(0))
    for write in (0.0, 1000.0)
  )
  assert at_once.failures == later.failures
  assert at_once.goodput - later.goodput == pytest.approx(1000 / 50_000, rel=0.25)


# --- The commands -------------------------------------------------------------------------------------------


def test_the_report_begins_with_assumptions_and_has_a_picture(scale, tmp_path, monkeypatch, capsys):
  page, picture, numbers = (tmp_path / name for name in ("page.md", "scale.png", "scale.json"))
  page.write_text(f"above\n{scale.BEGIN}\nold\n{scale.END}\nbelow\n")
  options = ["--chips=8", "--steps=4", "--runs=1", "--assume=failures=1e-3", f"--page={page}"]
  options += [f"--picture={picture}", f"--json={numbers}"]
  monkeypatch.setattr(sys, "argv", ["scale.py", *options])
  scale.main()
  text = capsys.readouterr().out
  assert text.index("`failures` | 0.001 a chip and hour") < text.index("| goodput |")
  assert page.read_text() == f"above\n{scale.BEGIN}\n\n{text}\n{scale.END}\nbelow\n"
  assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
  (outcome,) = json.loads(numbers.read_text())
  assert outcome["program"]["chips"] == 8 and 0 < outcome["run"]["goodput"] <= 1


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ("--assume=failure=1", "failure: there is no such assumption"),
    ("--assume=products=1.5", "products=1.5: give a number above 0, at most 1"),
    ("--assume=links=0", "links=0: give a number above 0"),
    ("--assume=restart=soon", "could not convert"),
    ("--chips=8,7", "not compiled for 7 chips, but for 8, "),
  ],
)
def test_what_cannot_be_is_refused_in_a_line(scale, monkeypatch, option, words):
  monkeypatch.setattr(sys, "argv", ["scale.py", option])
  with pytest.raises(SystemExit, match=words):
    scale.main()


def test_the_page_has_the_assumptions_that_the_code_has(scale, model):
  page = (REPOSITORY / "docs/scale_simulation.md").read_text(encoding="utf-8")
  for name, value, text in model.assumed(model.Assumptions()):
    assert f"| `{name}` | {value} | {text} |" in page


def test_programs_are_compiled_once(tmp_path, monkeypatch):
  module = load(BENCHMARKS / "scale_programs.py")
  results, calls = tmp_path / "results.json", []
  monkeypatch.setattr(module, "useful", lambda size: {})
  monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")  # libtpu need not be installed.
  monkeypatch.setattr(module, "compiled", lambda asked, topology: calls.append(topology) or {"chips": 8})
  for topologies in ("v5p:2x2x2", "v5p:2x2x2,v5p:2x2x4"):
    options = [f"--topologies={topologies}", f"--results={results}"]
    monkeypatch.setattr(sys, "argv", ["scale_programs.py", *options])
    module.main()
  assert calls == ["v5p:2x2x2", "v5p:2x2x4"] == list(json.loads(results.read_text())["programs"])
  monkeypatch.setattr(sys, "argv", ["scale_programs.py", "--tokens=4096", f"--results={results}"])
  with pytest.raises(SystemExit, match="tokens 8192, not 4096"):
    module.main()
