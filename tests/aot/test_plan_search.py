"""How long exchanges take at least, and how a search goes through slices and cards."""

import dataclasses

import numpy as np
import pytest

from internvl_jax.aot import collectives, links, search
from internvl_jax.aot.program import batch_shape
from internvl_jax.aot.recipe import get_config
from internvl_jax.aot.target import Target
from internvl_jax.chips import GPUS, TPUS
from internvl_jax.errors import UserError
from internvl_jax.hf import published

# --- Times --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
  """A chip of a slice as far as a mesh asks for it."""

  id: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU"
  core_on_chip: int = 0
  process_index: int = 0
  slice_index: int = 0


def cards_of(kind, hosts, cards):
  devices = [
    Device(i, (0, 0, 0), "gpu", GPUS[kind].kind, process_index=i // cards, slice_index=i // cards)
    for i in range(hosts * cards)
  ]
  return Target(name="", devices=devices, chip=GPUS[kind], memory=GPUS[kind].usable, shape=(hosts, cards))


def slice_of(kind, *shape):
  devices = [Device(i, (*place, 0, 0)[:3]) for i, place in enumerate(np.ndindex(*shape))]
  return Target(name="", devices=devices, chip=TPUS[kind], memory=TPUS[kind].hbm, shape=shape)


@pytest.mark.parametrize(
  ("kind", "target", "group", "seconds"),
  [
    # Corners of an open grid have two links of 50 GB/s.
    ("all-gather", ("v5e", 4, 4), range(16), 15 / 16 / 100e9),
    ("all-reduce", ("v5e", 4, 4), range(16), 2 * 15 / 16 / 100e9),
    # A line of four: its ends have one link within the group.
    ("reduce-scatter", ("v5e", 4, 4), range(4), 3 / 4 / 50e9),
    # Rings of sixteen: two links each way.
    ("all-gather", ("v5e", 16, 16), range(256), 255 / 256 / 200e9),
    # A quarter of what each of four has crosses the middle of their ring of four.
    ("all-to-all", ("v5p", 4, 4, 4), range(4), 4 / 4 / 2 / 100e9),
    ("collective-permute", ("v6e", 2, 4), (0, 1), 1 / 100e9),
  ],
)
def test_links_bound_exchanges(kind, target, group, seconds):
  collective = collectives.Collective(kind, "bf16", 1_000_000, (tuple(group),), 1, "")
  assert links.exchange_seconds(collective, slice_of(*target)) == pytest.approx(1e6 * seconds)
  assert links.total_seconds([collective] * 3, slice_of(*target)) == pytest.approx(3e6 * seconds)


def test_devices_of_one_chip_have_links_of_their_own():
  """v7x: a chip is two devices, whose link is six times one to a neighbour; of that each has half."""
  devices = [Device(i, place[:3], core_on_chip=place[3]) for i, place in enumerate(np.ndindex(2, 2, 1, 2))]
  target = Target(name="", devices=devices, chip=TPUS["v7x"], memory=1, shape=(2, 2, 1))
  pair = collectives.Collective("all-gather", "bf16", 1_000_000, ((0, 1), (2, 3), (4, 5), (6, 7)), 1, "")
  assert links.exchange_seconds(pair, target) == pytest.approx(1e6 / 2 / 600e9)
  # Four chips in a square, two links each, of which a device has half.
  whole = dataclasses.replace(pair, groups=(tuple(range(8)),))
  assert links.exchange_seconds(whole, target) == pytest.approx(1e6 * 7 / 8 / (2 * 50e9))


@pytest.mark.parametrize(
  ("kind", "target", "group", "seconds"),
  [
    # A host: each card takes in seven eighths, over NVLink of 450 GB/s.
    ("all-gather", ("h100", 1, 8), range(8), 7 / 8 / 450e9),
    ("all-reduce", ("h100", 1, 8), range(8), 2 * 7 / 8 / 450e9),
    ("reduce-scatter", ("h800", 1, 8), range(8), 7 / 8 / 200e9),
    ("collective-permute", ("rtx4090", 1, 2), (0, 1), 1 / 31.5e9),
    # Four hosts: three quarters come into each over eight ports of 50 GB/s; within it, seven eighths are passed on.
    ("all-gather", ("h100", 4, 8), range(32), max(3 / 4 / 8 / 50e9, 7 / 8 / 450e9)),
    ("all-gather", ("b200", 4, 8), range(32), max(3 / 4 / 8 / 50e9, 7 / 8 / 900e9)),
    # One card of each of four hosts has its own port alone.
    ("all-reduce", ("h100", 4, 8), (0, 8, 16, 24), 2 * 3 / 4 / 50e9),
    ("collective-permute", ("a100-80g", 2, 8), (0, 8), 1 / 25e9),
    # Of what each of sixteen has, eight sixteenths are for the other host.
    ("all-to-all", ("h100", 2, 8), range(16), 8 / 16 / 50e9),
    ("all-to-all", ("h100", 1, 8), range(8), 7 / 8 / 450e9),
  ],
)
def test_nvlink_and_network_bound_exchanges(kind, target, group, seconds):
  collective = collectives.Collective(kind, "bf16", 1_000_000, (tuple(group),), 1, "")
  assert links.exchange_seconds(collective, cards_of(*target)) == pytest.approx(1e6 * seconds)


def test_devices_at_hand_have_no_known_links():
  collective = collectives.Collective("all-gather", "bf16", 8, ((0, 1),), 1, "")
  here = Target(name="cpu:2", devices=[Device(0, (0, 0, 0)), Device(1, (0, 0, 0))])
  assert links.exchange_seconds(collective, here) is None
  assert links.total_seconds([collective], here) is None


# --- Searching ----------------------------------------------------------------------------------------------


def test_slices_are_those_that_there_are():
  assert search.slices("v5e:2x4") == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
  assert search.slices("v5p")[0] == "v5p:2x2x1"
  with pytest.raises(UserError, match="the slices of v5e are"):
    search.slices("v5e:3x3")
  with pytest.raises(UserError, match="name one of them"):
    search.slices("cpu")


def test_cards_are_those_of_a_host_and_then_whole_hosts():
  assert search.slices("h100:8") == ["h100:1", "h100:2", "h100:4", "h100:8"]
  assert search.slices("rtx4090")[4:] == [f"rtx4090:{hosts}x8" for hosts in (2, 4, 8, 16, 32)]
  with pytest.raises(UserError, match="the hosts and cards of h100 are 1, 2, 4, 8, 2x8"):
    search.slices("h100:3")
  with pytest.raises(UserError, match="did you mean h100"):
    search.slices("h1000:8")


GIB = 2**30


def looked_for(monkeypatch, name, beyond, levels=None):
  """A search for 2.5-8b, with steps that take so many GiB beyond the arithmetic; what was compiled, and attempts."""
  config = get_config()
  config.model.model_name_or_path = published.hub_id("2.5-8b")
  compiled = []

  def pretend(plan, target, **options):
    compiled.append((target.name, plan.mesh.shape["tensor"], plan.step.objective.how.remat))
    total = search.lower_bound(plan) + round(beyond(plan) * GIB)
    if levels is None:
      return total
    levels.append(options["optimization_level"])
    return total if levels[-1] == "O0" else round(1.04 * total)

  @dataclasses.dataclass
  class Report:
    total: int
    fits: bool
    roofline = None

  monkeypatch.setattr(search, "compile_step", pretend)
  monkeypatch.setattr(
    search, "make_report", lambda plan, total, target, limit: Report(total=total, fits=total <= limit)
  )

  def slice_named(name):
    kind, _, shape = name.partition(":")
    lengths = tuple(map(int, shape.split("x")))
    if kind in GPUS:
      return dataclasses.replace(
        cards_of(kind, *(lengths if len(lengths) == 2 else (1, *lengths))), name=name
      )
    return dataclasses.replace(slice_of(kind, *lengths), name=name)

  monkeypatch.setattr(search, "open_target", slice_named)
  return compiled, search.search(config, name, batch_shape(config))


def test_a_search_compiles_only_where_arithmetic_leaves_room(monkeypatch):
  """8B: parameters and moments alone are 90 GiB, so slices of up to four chips of 15.75 GiB cannot hold it."""
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 2.0)
  # By arithmetic 15.6 GiB on eight chips that share a row: that it does not fit is seen by compiling it.
  assert compiled == [("v5e:2x4", 8, "full"), ("v5e:4x4", 1, "full")]
  found = attempts[-1]
  assert found.fits and (found.topology, found.mesh["fsdp"], found.remat) == ("v5e:4x4", 16, "full")
  assert {attempt.outcome for attempt in attempts[:-1] if not attempt.compiled} == {"cannot fit"}
  assert all("at least" in str(attempt) for attempt in attempts if not attempt.compiled)


def test_a_search_goes_by_what_was_compiled_and_does_not_fit(monkeypatch):
  """13.3 GiB by arithmetic with four chips that share a row: compiled to see that eight of 4x4's may as well."""
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 8.0 / plan.mesh.shape["tensor"])
  assert compiled == [("v5e:2x4", 8, "full"), ("v5e:4x4", 1, "full"), ("v5e:4x4", 2, "full")]
  assert [attempt.mesh["tensor"] for attempt in attempts if attempt.fits] == [2]
  # Beyond the arithmetic alike, however rows are shared: 4x4 is compiled only where that leaves much less.
  compiled, attempts = looked_for(monkeypatch, "v5e", lambda plan: 8.0)
  assert ("v5e:4x4", 1, "full") not in compiled and compiled[-1] == ("v5e:4x8", 1, "full")
  assert "cannot fit, by what another took" in {attempt.outcome for attempt in attempts}


def test_a_search_compiles_what_fits_narrowly_as_a_run_will(monkeypatch):
  """15.3 of 15.75 GiB, of which a run would take 4 % more: it takes twice the chips."""
  levels = []
  compiled, attempts = looked_for(monkeypatch, "v5e:4x8", lambda plan: 3.9, levels)
  tried = list(zip(compiled, levels, strict=True))
  narrow = ("v5e:4x4", 1, "full")
  assert tried[tried.index((narrow, "O0")) + 1] == (narrow, "default")
  assert attempts[-1].fits and attempts[-1].bytes < 0.96 * 15.75 * GIB


def test_a_search_recomputes_less_where_there_is_room(monkeypatch):
  compiled, attempts = looked_for(monkeypatch, "v5p", lambda plan: 2.0)
  assert compiled == [("v5p:2x2x1", 1, "dots")]
  assert attempts[-1].fits and attempts[-1].remat == "dots"
  # Where less is kept after all, all is recomputed.
  compiled, attempts = looked_for(
    monkeypatch, "v5p", lambda plan: 60.0 if plan.step.objective.how.remat == "dots" else 2.0
  )
  assert compiled == [("v5p:2x2x1", 1, "dots"), ("v5p:2x2x1", 1, "full")]
  assert attempts[-1].fits and attempts[-1].remat == "full"


def test_a_search_through_cards_finds_the_fewest(monkeypatch):
  """8B: 120 GiB of state and gradients, which two cards of 72 GiB hold only where rows are shared."""
  compiled, attempts = looked_for(monkeypatch, "h100", lambda plan: 3.0)
  assert {name for name, *_ in compiled} == {"h100:2"}
  assert attempts[-1].fits and attempts[-1].topology == "h100:2"
  # Across hosts, only the axes that split the batch go.
  compiled, attempts = looked_for(monkeypatch, "rtx4090:2x8", lambda plan: 5.0)
  assert attempts[-1].fits and attempts[-1].topology == "rtx4090:8"
  assert attempts[-1].mesh["fsdp"] * attempts[-1].mesh["tensor"] == 8


def test_what_is_compiled_for_cards_is_compiled_as_in_a_run(monkeypatch):
  """What fits narrowly need not be compiled again."""
  levels = []
  _, attempts = looked_for(monkeypatch, "h100:8", lambda plan: 9.5, levels)
  assert attempts[-1].fits and attempts[-1].bytes > 0.96 * GPUS["h100"].usable
  assert len(levels) == sum(attempt.compiled for attempt in attempts)


def test_axes_that_are_set_stay():
  config = get_config()
  config.mesh.sequence = 2
  (mesh,) = search.meshes(config, 8)
  assert (mesh.fsdp, mesh.sequence) == (-1, 2)
