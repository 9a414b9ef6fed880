"""The stopwatch: phases of a start add up to it, and what other threads do is listed apart."""

import threading
import time
from types import SimpleNamespace

import pytest

from internvl_jax import stopwatch as module
from internvl_jax.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
  """A clock that only `pass_` moves: so many seconds, of them half as many of processor time."""
  now = SimpleNamespace(seconds=100.0)
  fake = SimpleNamespace(perf_counter=lambda: now.seconds, process_time=lambda: (now.seconds - 90.0) / 2)
  monkeypatch.setattr(module, "time", fake)

  def pass_(seconds):
    now.seconds += seconds

  return pass_


def test_phases_count_without_those_inside_and_add_up(clock):
  watch = Stopwatch(began=97.0)
  clock(0.5)
  with watch.phase("model"):
    clock(1.0)
    with watch.phase("barrier"):
      clock(2.0)
    clock(4.0)
  with watch.phase("barrier"):
    clock(8.0)
  with watch.phase("data wait"):
    clock(16.0)
  watch.stop(131.5)
  found = {row.name: (row.seconds, row.cpu) for row in watch.rows()}
  assert found == {
    "config": (3.0, 5.0),
    "model": (5.0, 2.5),
    "barrier": (10.0, 5.0),
    "first batch": (16.0, 8.0),
    "other": (0.5, 0.25),
  }
  assert list(found)[-1] == "other"
  assert sum(seconds for seconds, _ in found.values()) == watch.seconds == 34.5


def test_what_lies_behind_the_first_step_does_not_count(clock):
  """The host is a step ahead: when it learns that the first step was done, it has fetched a batch more."""
  watch = Stopwatch()
  with watch.phase("step"):
    clock(2.0)
  with watch.phase("compile"):
    clock(3.0)
  watch.stop(103.5)
  with watch.phase("step"):
    clock(9.0)
  watch.stop(114.0)
  assert watch.seconds == 3.5
  assert [(row.name, row.seconds) for row in watch.rows()] == [
    ("first step", 2.0),
    ("compile", 1.5),
    ("other", 0.0),
  ]


def test_other_threads_are_listed_apart():
  watch = Stopwatch()

  def compiles():
    with watch.phase("compile"):
      time.sleep(0.06)

  with watch.phase("weights"):
    thread = threading.Thread(target=compiles)
    thread.start()
    thread.join()
  watch.stop(time.perf_counter())
  assert [row.name for row in watch.rows()] == ["weights", "other"]
  (row,) = watch.beside()
  assert row.name == "compile" and row.cpu is None and 0.06 <= row.seconds <= watch.rows()[0].seconds


def test_line_and_table(clock):
  watch = Stopwatch(began=97.0)
  with watch.phase("imports"):
    clock(2.0)
  clock(0.01)
  watch.stop(102.01)
  assert watch.line() == "First step after 5.0 s: config 3.0, imports 2.0"
  lines = watch.table()
  assert lines[0].split() == ["phase", "seconds", "CPU", "s"] and len(set(map(len, lines))) == 1
  assert [line.split()[-2:] for line in lines[1:]] == [
    ["3.00", "5.00"],
    ["2.00", "1.00"],
    ["0.01", "0.01"],
    ["5.01", "6.01"],
  ]


def test_of_the_process_it_counts_what_came_before():
  """At least what this test's process has computed so far, in all of its threads on all cores."""
  (before, *_) = Stopwatch.of_process().rows()
  assert before.name == "config" and before.cpu is not None
  assert before.seconds >= 0.9 * before.cpu / 64 and before.seconds > 0.1
