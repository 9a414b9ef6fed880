"""Rows from sizes: how full they are, that nothing is lost or starves, and that a restart changes nothing."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from internvl_jax.data.schedule.packing import Packer, PackSettings, count_rows, look_ahead_of, pack

# Tokens and tiles of 6,000 samples as the recipes' data give them; text-only samples have no tile.
SIZES = np.load(Path(__file__).parents[2] / "assets" / "packing_sizes.npz")["sizes"]

# Rows of liquid samples, and the rows that the reference needs.
IDEAL = {(8192, 40): 1372.466, (16384, 48): 785.5625}
REFERENCE = {(8192, 40): 1447, (16384, 48): 800}


def recipe_sizes(settings, seed=None):
  """The 6,000 samples without those that fit no row, in file order or shuffled."""
  sizes = SIZES[settings.fits(*SIZES.T)]
  return sizes if seed is None else np.random.default_rng(seed).permutation(sizes)


def random_case(seed):
  """Sizes of one of several kinds, and settings."""
  rng = np.random.default_rng(seed)
  max_tokens, max_tiles = int(rng.integers(1, 400)), int(rng.integers(0, 20))
  count = int(rng.integers(0, 120))
  largest = max(1, int(max_tokens * rng.choice([0.05, 0.3, 0.6, 1])))
  tokens = rng.integers(1, largest + 1, count)
  tiles = rng.integers(0, max_tiles + 1, count) * (rng.random(count) < rng.random())
  settings = PackSettings(
    max_tokens=max_tokens,
    max_tiles=max_tiles,
    look_ahead=int(rng.choice([1, 2, 7, 30, 256])),
    allow_overflow=bool(rng.random() < 0.2),
  )
  return np.stack([tokens, tiles], axis=1), settings


def assert_sound(rows, sizes, settings):
  """Every sample once, budgets kept, and both bounds of the module's docstring."""
  assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
  waiting = np.ones(len(sizes), bool)
  for row in rows:
    assert row == sorted(row)
    tokens, tiles = sizes[row].T
    assert tiles.sum() <= settings.max_tiles
    if settings.allow_overflow:
      assert tokens.sum() - tokens.max() < settings.max_tokens
    else:
      assert tokens.sum() <= settings.max_tokens
    assert row[0] == np.flatnonzero(waiting)[0]
    waiting[row] = False
    assert waiting[: row[-1]].sum() < settings.look_ahead
  assert_no_starving(rows, settings)


def assert_no_starving(rows, settings):
  row_of = np.empty(sum(map(len, rows)), int)
  for number, row in enumerate(rows):
    row_of[row] = number
  overtaken_by = np.minimum.accumulate(row_of[::-1])[::-1]  # the first row with this sample or a younger one
  assert (row_of - overtaken_by < settings.look_ahead).all()


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(("budgets", "bound"), [((8192, 40), 1.002), ((16384, 48), 1.002)])
def test_rows_are_full(budgets, bound, seed):
  settings = PackSettings(max_tokens=budgets[0], max_tiles=budgets[1])
  sizes = recipe_sizes(settings, seed)
  assert max(sizes.sum(axis=0) / budgets) == pytest.approx(IDEAL[budgets], abs=1e-3)
  rows = list(pack(sizes, settings))
  assert len(rows) <= bound * IDEAL[budgets]
  assert len(rows) < REFERENCE[budgets]
  assert_sound(rows, sizes, settings)


@pytest.mark.parametrize("share_of_text", [0.54, 0.56, 0.58])
def test_rows_are_full_where_both_budgets_are_scarce(share_of_text):
  rng = np.random.default_rng(0)
  text = rng.random(4000) < share_of_text
  tokens = np.where(text, rng.integers(2000, 5000, 4000), rng.integers(50, 400, 4000))
  sizes = np.stack([tokens, np.where(text, 0, rng.integers(4, 26, 4000))], axis=1)
  settings = PackSettings(max_tokens=16384, max_tiles=48)
  ideal = sizes.sum(axis=0) / (16384, 48)
  assert ideal.min() > 0.9 * ideal.max()
  rows = list(pack(sizes, settings))
  assert len(rows) <= 1.01 * ideal.max()
  assert_sound(rows, sizes, settings)


def test_rows_of_three_and_four():
  sizes = np.random.default_rng(0).integers((1600, 0), (3300, 12), (3000, 2))
  settings = PackSettings(max_tokens=8192, max_tiles=40)
  assert count_rows(sizes, settings) <= 1.01 * sizes[:, 0].sum() / 8192


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_any_sizes(first):
  for seed in range(first, first + 50):
    sizes, settings = random_case(seed)
    assert_sound(list(pack(sizes, settings)), sizes, settings)


def test_an_awkward_sample_does_not_starve():
  # The second sample fills a row only half, and pairs of the others are always better.
  sizes = [[50, 0], [51, 0]] + [[50, 0]] * 2000
  settings = PackSettings(max_tokens=100, max_tiles=0)
  rows = list(pack(sizes, settings))
  assert rows[:2] == [[0, 2], [1]]
  assert_sound(rows, np.array(sizes), settings)


@pytest.mark.parametrize("seed", range(60))
def test_resume_at_any_row(seed):
  rng = np.random.default_rng(seed)
  sizes, settings = random_case(seed)
  expected = list(pack(sizes, settings))
  packer, rows = Packer(settings), []
  while packer.position < len(sizes):
    chunk = sizes[packer.position : packer.position + int(rng.integers(1, 60))]
    rows += itertools.islice(packer.feed(chunk), int(rng.integers(1, 6)))
    packer = resumed(packer)
  flushing = packer.flush()
  rows += itertools.islice(flushing, 2)
  packer = resumed(packer)
  rows += packer.flush()
  assert rows == expected
  assert packer.stats.rows == len(expected) and packer.stats.samples == len(sizes)


def resumed(packer):
  other = Packer(packer.settings)
  other.set_state(json.loads(json.dumps(packer.get_state())))
  assert other.get_state() == packer.get_state() and other.stats == packer.stats
  return other


def test_chunks_do_not_matter():
  settings = PackSettings(max_tokens=8192, max_tiles=40)
  sizes = recipe_sizes(settings)[:1500]
  expected = list(pack(sizes, settings))
  for length in (1, 100, 1499):
    packer = Packer(settings)
    rows = [row for at in range(0, 1500, length) for row in packer.feed(sizes[at : at + length])]
    assert rows + list(packer.flush()) == expected


def test_the_state_is_small():
  settings = PackSettings(max_tokens=16384, max_tiles=48)
  packer = Packer(settings)
  for _ in itertools.islice(packer.feed(recipe_sizes(settings)), 500):
    waiting = packer.get_state()["waiting"]
    assert len(waiting[0]) <= settings.look_ahead
  assert len(json.dumps(packer.get_state())) < 8000


def test_a_state_of_other_settings_is_refused():
  state = Packer(PackSettings(max_tokens=10, max_tiles=1)).get_state()
  with pytest.raises(ValueError, match=r"other settings: saved .*'max_tokens': 10.* now .*'max_tokens': 11"):
    Packer(PackSettings(max_tokens=11, max_tiles=1)).set_state(state)
  packer = Packer(PackSettings(max_tokens=10, max_tiles=1))
  with pytest.raises(ValueError, match="other algorithm"):
    packer.set_state(state | {"algorithm": 0})


def test_the_stream_goes_on_after_a_flush():
  packer = Packer(PackSettings(max_tokens=10, max_tiles=0))
  assert [*packer.feed([[6, 0]]), *packer.flush()] == [[0]]
  assert [*packer.feed([[4, 0], [6, 0]]), *packer.flush()] == [[1, 2]]


@pytest.mark.parametrize(
  ("sizes", "rows"),
  [
    ([], []),
    ([[1, 0]], [[0]]),
    ([[100, 0]] * 3, [[0], [1], [2]]),
    ([[1, 4]] * 3, [[0], [1], [2]]),
    ([[51, 0]] * 3, [[0], [1], [2]]),
    ([[50, 0]] * 4, [[0, 1], [2, 3]]),
    ([[1, 0]] * 250, [list(range(100)), list(range(100, 200)), list(range(200, 250))]),
    ([[1, 1]] * 6, [[0, 1, 2, 3], [4, 5]]),
    ([[60, 1], [70, 2], [30, 2], [40, 3]], [[0, 3], [1, 2]]),
  ],
)
def test_small_streams(sizes, rows):
  settings = PackSettings(max_tokens=100, max_tiles=4)
  assert list(pack(sizes, settings)) == rows
  assert count_rows(sizes, settings) == len(rows)


def test_tiny_samples_fill_rows_that_hold_more_than_the_look_ahead():
  settings = PackSettings(max_tokens=1000, max_tiles=0, look_ahead=4)
  assert list(pack([[1, 0]] * 2000, settings)) == [list(range(1000)), list(range(1000, 2000))]


def test_only_text_beside_a_budget_of_tiles():
  sizes = recipe_sizes(PackSettings(max_tokens=8192, max_tiles=40))[:600] * (1, 0)
  with_tiles = list(pack(sizes, PackSettings(max_tokens=8192, max_tiles=40)))
  assert with_tiles == list(pack(sizes, PackSettings(max_tokens=8192, max_tiles=0)))
  assert len(with_tiles) <= np.ceil(sizes[:, 0].sum() / 8192) + 1


def test_overflow_is_as_small_as_it_can_be():
  assert list(pack([[60, 0], [60, 0], [45, 0]], PackSettings(max_tokens=100, max_tiles=0))) == [[0], [1], [2]]
  settings = PackSettings(max_tokens=100, max_tiles=0, allow_overflow=True)
  assert list(pack([[60, 0], [60, 0], [45, 0]], settings)) == [[0, 2], [1]]


def test_over_long_samples():
  settings = PackSettings(max_tokens=100, max_tiles=4)
  sizes = [[10, 0], [101, 0], [90, 0], [10, 5], [20, 1]]
  assert settings.fits(*np.transpose(sizes)).tolist() == [True, False, True, False, True]
  assert settings.fits(100, 4) and not settings.fits(100, 5)
  packer = Packer(settings)
  cause = r"position 1 of the stream has 101 tokens and 0 tiles, but a row holds 100 tokens and 4 tiles"
  with pytest.raises(ValueError, match=cause + ".* 2 of the 5 samples"):
    packer.feed(sizes)
  assert packer.position == 0

  packer = Packer(PackSettings(max_tokens=100, max_tiles=4, over_long="drop"))
  assert [*packer.feed(sizes), *packer.flush()] == [[0, 4], [2]]
  assert packer.stats.dropped == 2 and packer.position == 5


def test_dropped_samples_are_counted_once_after_a_restart():
  settings = PackSettings(max_tokens=100, max_tiles=4, over_long="drop", look_ahead=2)
  sizes = np.array([[60, 0], [101, 0], [40, 0], [102, 0]] * 20)
  expected = list(pack(sizes, settings))
  for stop in range(1, len(expected)):
    packer = Packer(settings)
    rows = list(itertools.islice(packer.feed(sizes), stop))
    packer = resumed(packer)
    rows += [*packer.feed(sizes[packer.position :]), *packer.flush()]
    assert rows == expected and packer.stats.dropped == 40


def test_wrong_sizes_and_settings():
  packer = Packer(PackSettings(max_tokens=100, max_tiles=4, over_long="drop"))
  for sizes in ([[0, 1]], [[5, -1]]):
    with pytest.raises(ValueError, match="1 token or more and 0 tiles or more"):
      packer.feed(sizes)
  for sizes in ([5, 1], [[5, 1, 0]], [[5.0, 1.0]]):
    with pytest.raises(ValueError, match=r"integers \[n, 2\]"):
      packer.feed(sizes)
  for wrong in ({"max_tokens": 0}, {"max_tiles": -1}, {"look_ahead": 0}, {"over_long": "split"}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      PackSettings(**{"max_tokens": 100, "max_tiles": 4} | wrong)


def test_stats():
  packer = Packer(PackSettings(max_tokens=100, max_tiles=4))
  assert packer.stats == (0, 0, 0, 0, 0, 0)
  rows = [*packer.feed([[60, 1], [70, 2], [30, 2], [40, 3]]), *packer.flush()]
  assert len(rows) == 2
  assert packer.stats == (2, 4, 0, 1.0, 1.0, 2.0)


def test_look_ahead_of_the_references_open_rows():
  assert [look_ahead_of(rows) for rows in (1, 5, 20, 32, 100)] == [13, 64, 256, 410, 1280]


def test_planning_is_fast():
  settings = PackSettings(max_tokens=8192, max_tiles=40)
  sizes = recipe_sizes(settings)
  began = time.process_time()  # of this process only: other load does not count
  count_rows(sizes, settings)
  assert time.process_time() - began < 2  # measured: 0.14 s
