"""The loop by itself, with steps that compute nothing: what it skips, when it stops, what it logs and times."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import trainer as loop
from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import BatchCounts
from internvl_jax.callbacks import Callback, Check, SkippedSteps
from internvl_jax.errors import UserError
from internvl_jax.metrics.gauges import Gauges, StepClock
from internvl_jax.metrics.mfu import UsefulFlops
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TrackedRun, open_writers
from internvl_jax.state import TrainState
from internvl_jax.step import StepMetrics
from internvl_jax.trainer import Trainer
from internvl_jax.watchdog import Watchdog

USEFUL = UsefulFlops(10.0, 0.0, 1.0, 0.0, (), tokens_per_tile=4)
COUNTS = BatchCounts(np.int32(6), np.int32(20), np.int32(8), np.float32(100))


class Steps:
  """Loses the steps named, and counts the others."""

  def __init__(self, lost=()):
    self.lost = lost

  def knows(self, batch):
    return True

  def __call__(self, state, frozen, batch, rate):
    lost = batch in self.lost
    loss = jnp.float32(np.nan if lost else batch)
    state = dataclasses.replace(state, step=state.step + 1)
    return state, StepMetrics(loss, jnp.float32(1), jnp.bool_(lost), COUNTS, {})


class Batches:
  """Numbers, in place of batches."""

  def __init__(self):
    self.taken = 0

  def next(self, params):
    self.taken += 1
    return self.taken - 1

  def prefetch(self):
    pass

  def metrics(self):
    return {}

  def get_state(self):
    return {"next_step": self.taken}

  def counters(self):
    return {"vqa": {"samples": self.taken}}

  def batch_samples(self, step):
    return f"vqa.jsonl:{10 * step}"


class Saves:
  """Remembers at which steps it was asked to save, and what."""

  def __init__(self):
    self.saved = {}

  def save(self, state, *, loader, trainer):
    self.saved[int(state.step)] = (loader, json.loads(json.dumps(trainer)))

  def check(self):
    pass

  def wait(self):
    pass


def make_log(tmp_path, training, total, peak=None):
  gauges = Gauges(USEFUL, peak, [SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 << 30})])
  tracked = TrackedRun(training=training, output_dir=tmp_path)
  writers = open_writers(tracked, total_steps=total, terms={})
  epoch_of = lambda step: step / total  # noqa: E731
  return RunLog(training, tmp_path, total_steps=total, epoch_of=epoch_of, gauges=gauges, writers=writers)


class StopAt:
  """Stops the loop after a step."""

  def __init__(self, step):
    self.step = step

  def listen(self):
    pass

  def __call__(self, step):
    return step == self.step


def run(
  tmp_path,
  *,
  loader=None,
  steps=(),
  limit=10,
  stop_at=None,
  peak=None,
  total=6,
  evaluate=None,
  history=(),
  callbacks=(),
  scores_average=True,
  **training,
):
  training = TrainingArguments(logging_steps=2, disable_tqdm=True, **training)
  log = make_log(tmp_path, training, total, peak)
  log.history = list(history)
  saves = Saves()
  loader = loader or Batches()
  trainer = Trainer(
    training=training,
    steps=steps if isinstance(steps, Steps) else Steps(steps),
    schedule=lambda step: (step + 1) / 10,
    source=loader,
    checkpointer=saves,
    log=log,
    watchdog=Watchdog("here", 600),
    stop=StopAt(stop_at),
    evaluate=evaluate,
    scores_average=scores_average,
    callbacks=[*callbacks, SkippedSteps(log, loader.batch_samples, limit=limit)],
  )
  with log:
    trainer.run(TrainState(jnp.int32(total if history else 0), {}, {}), {})
  log.save_results(num_samples=30)
  return log.history, saves.saved


def test_skipped_steps_are_counted_and_leave_the_mean_alone(tmp_path, caplog):
  history, saved = run(tmp_path, steps=(1, 2, 3), save_steps=4)
  assert [(entry.get("loss"), entry.get("skipped_steps")) for entry in history] == [
    (0, 1),
    (None, 2),
    (4.5, None),
  ]
  assert saved[4][1]["skipped_in_a_row"] == 3
  json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=pytest.fail)
  said = [record.getMessage() for record in caplog.records if "changed nothing" in record.getMessage()]
  assert len(said) == 3 and "step 2: loss=nan" in said[0] and said[0].endswith("vqa.jsonl:10")


def test_steps_between_two_entries_go_on_after_a_restart(tmp_path):
  """The entry after a restart is that of a run without one: its losses, terms and skipped steps are of all its steps."""
  training = TrainingArguments(logging_steps=3, disable_tqdm=True)

  def add(log, steps):
    log.start(steps[0] - 1)
    for step in steps:
      loss = jnp.float32(np.nan if step == 4 else step)
      terms = {"margin": jnp.float32(10 * step)}
      log.add(
        step, StepMetrics(loss, jnp.float32(1), jnp.bool_(step == 4), COUNTS, terms), next_rate=1, times=None
      )

  def log_after(*parts):
    state = None
    for number, steps in enumerate(parts):
      with make_log(tmp_path / f"{len(parts)}{number}", training, 6) as log:
        if state is not None:
          log.restore(state)
        add(log, steps)
        assert log.skipped_in_a_row == (steps[-1] == 4)
        # What a checkpoint keeps is text.
        state = json.loads(json.dumps(log.state()))
    return log.history, log.skipped_steps

  expected, skipped = log_after([1, 2, 3, 4, 5, 6])
  assert [(entry["loss"], entry["margin"]) for entry in expected] == [
    (2.0, 20.0),
    (5.5, 55.0),
  ] and skipped == 1
  for cut in (2, 3, 4, 5):
    assert log_after(range(1, cut + 1), range(cut + 1, 7)) == (expected, 1), cut


def test_steps_take_their_rates_and_entries_have_the_next_ones(tmp_path):
  """A rate is (step + 1) / 10 here, of steps counted from 0; as in the Trainer, an entry has the one after its step."""
  taken = []

  class Rates(Steps):
    def __call__(self, state, frozen, batch, rate):
      taken.append(rate)
      return super().__call__(state, frozen, batch, rate)

  history, _ = run(tmp_path, steps=Rates())
  assert taken == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
  assert [(entry["step"], entry["learning_rate"]) for entry in history] == [(2, 0.3), (4, 0.5), (6, 0.7)]


def test_a_run_of_skipped_steps_alone_does_not_end_well(tmp_path):
  """Nor does it leave a checkpoint, from which the same command would go on to the end."""
  with pytest.raises(UserError, match=r"nothing was trained and no model is written: .* each of the 6 steps"):
    run(tmp_path, steps=range(6))
  state = json.loads((tmp_path / "trainer_state.json").read_text())
  assert sum(entry["skipped_steps"] for entry in state["log_history"]) == 6


def test_one_step_that_counts_is_a_run_and_the_others_are_told(tmp_path):
  history, saved = run(tmp_path, steps=range(1, 6))
  assert list(saved) == [6]
  assert json.loads((tmp_path / "train_results.json").read_text())["skipped_steps"] == 5
  log = make_log(tmp_path, TrainingArguments(), 6)
  assert log.skipped_remark() is None
  log.history = history
  line = log.skipped_remark()
  assert line.startswith("5 of 6 steps were skipped") and line.endswith("what the other 1 made of it")


def test_skipped_steps_before_a_restart_count_as_well(tmp_path):
  """A run that goes on without a step to take is no better for that."""
  log = make_log(tmp_path, TrainingArguments(logging_steps=2, disable_tqdm=True), 6)
  log.restore({"log_history": [{"step": 4, "skipped_steps": 4}], "pending": [], "pending_skipped": 2})
  assert log.skipped_steps == 6


def test_too_many_in_a_row_end_the_run_and_name_the_samples(tmp_path):
  assert len(run(tmp_path, steps=(0, 1, 3, 4), limit=3)[0]) == 3
  with pytest.raises(UserError, match=r"step 5: loss=nan.*each of the last 3 steps.*samples: vqa.jsonl:40"):
    run(tmp_path, steps=(2, 3, 4), limit=3)


def test_the_results_are_those_of_all_steps(tmp_path):
  """Losses 0, and 2 and 3 after two that were skipped; an evaluation in between; the last steps after a restart."""
  history, _ = run(tmp_path, steps=(1, 4), total=5)
  path = tmp_path / "train_results.json"
  found = json.loads(path.read_text())
  assert found["epoch"] == 1 and found["train_loss"] == pytest.approx((0 + 2 + 3) / 3)
  assert found["train_samples"] == 30
  assert found["train_samples_per_second"] == pytest.approx(30 / found["train_runtime"])
  assert found["train_steps_per_second"] == pytest.approx(5 / found["train_runtime"])

  log = make_log(tmp_path, TrainingArguments(disable_tqdm=True), 5)
  log.history = [*history[:2], {"eval_accuracy": 0.5, "epoch": 0.8, "step": 4}, *history[2:]]
  log.start(5)
  log.save_results(num_samples=30)
  assert json.loads(path.read_text()) == found  # What an earlier start wrote stays.
  path.unlink()
  log.save_results(num_samples=30)
  assert json.loads(path.read_text()) == {
    key: found[key] for key in ("epoch", "train_loss", "train_samples", "skipped_steps")
  }
  log.start(4)
  log.save_results(num_samples=30)
  again = json.loads(path.read_text())
  assert again["train_loss"] == found["train_loss"]
  assert again["train_samples_per_second"] == pytest.approx(6 / again["train_runtime"])


def test_asked_to_stop_it_saves_and_stops_before_the_next_batch(tmp_path):
  loader = Batches()
  history, saved = run(tmp_path, stop_at=3, loader=loader, save_strategy="no")
  assert list(saved) == [3] and saved[3][0] == {"next_step": 3} and loader.taken == 3
  # The third step is in the log of that checkpoint, though no entry was due.
  assert [entry["step"] for entry in history] == [2] and saved[3][1]["pending"] == [2.0]
  assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_the_first_step_of_a_start_is_told_once(tmp_path):
  told = []

  class Told(Callback):
    def after_first_step(self, done):
      told.append((done, time.perf_counter()))

    def after_step(self, step, metrics):
      told.append(step)

  began = time.perf_counter()
  run(tmp_path, callbacks=[Told()], total=3)
  (done, now), *steps = told
  assert began < done <= now and steps == [1, 2, 3]


def test_long_steps_are_not_handed_over_ahead(tmp_path, monkeypatch):
  """Told to stop while it waits for a long step, a run has none left to end."""
  order = []

  class Log(Steps):
    def __call__(self, *args):
      order.append("hand over")
      return super().__call__(*args)

  monkeypatch.setattr(Trainer, "_finish_step", finishes(order, Trainer._finish_step))
  run(tmp_path, steps=Log(), total=4)
  assert order == ["hand over", "hand over", "end", "hand over", "end", "hand over", "end", "end"]
  order.clear()
  monkeypatch.setattr(loop, "LONG_STEP_SECONDS", 0.0)
  run(tmp_path, steps=Log(), total=4)
  # The first two are: how long a step takes is not known before one is timed.
  assert order == ["hand over", "hand over", "end", "end", "hand over", "end", "hand over", "end"]


def finishes(order, finish):
  """Remarks when a step's end has been waited for."""

  def watched(self):
    flight = self._in_flight
    finish(self)
    if flight is not None:
      order.append("end")

  return watched


class SlowBatches(Batches):
  """Takes its time to put a batch together, once for each."""

  def __init__(self, clock, seconds):
    super().__init__()
    self.clock, self.seconds, self.ready = clock, seconds, False

  def prefetch(self):
    self.clock.now += 0 if self.ready else self.seconds
    self.ready = True

  def next(self, params):
    self.prefetch()
    self.ready = False
    return super().next(params)


class TimedSteps(Steps):
  """Devices that take 10 seconds for a step, one after another."""

  def __init__(self, clock):
    super().__init__()
    self.clock, self.free, self.handed = clock, 0.0, []

  def __call__(self, *args):
    self.handed.append(self.clock.now)
    self.free = max(self.clock.now, self.free) + 10
    state, metrics = super().__call__(*args)
    return state, (metrics, self.free)


@pytest.mark.parametrize(("seconds", "whole", "data"), [(8, 10, 0), (13, 13, 3)])
def test_the_next_batch_is_put_together_while_a_long_step_runs(tmp_path, monkeypatch, seconds, whole, data):
  clock = SimpleNamespace(now=0.0)
  monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
  monkeypatch.setattr(loop, "_read", lambda result: result)
  finish = Trainer._finish_step

  def waits(self):
    if (flight := self._in_flight) is not None:
      clock.now = max(clock.now, flight.result.result()[1])
    finish(self)

  monkeypatch.setattr(Trainer, "_finish_step", waits)
  loader, steps = SlowBatches(clock, seconds), TimedSteps(clock)
  history, saved = run(tmp_path, loader=loader, steps=steps, stop_at=5, save_strategy="no")
  # Of the first two steps the second one is handed over ahead, since the first one was not timed yet.
  assert np.diff(steps.handed)[2:].tolist() == [whole] * 2
  entry = history[1]
  assert (entry["step"], entry["data_seconds_per_step"]) == (4, pytest.approx(data))
  # The batch that is ready is not trained: the checkpoint names it as the next one.
  assert saved[5][0] == {"next_step": 5} and loader.taken == 5 and loader.ready
  assert clock.now == pytest.approx(steps.handed[-1] + max(10, seconds))


def test_every_entry_tells_how_fast_it_goes(tmp_path):
  history, _ = run(tmp_path, peak=1e3)
  for entry in history:
    seconds = entry["seconds_per_step"]
    assert 0 <= entry["data_seconds_per_step"] <= seconds
    assert 0 <= entry["compute_seconds_per_step"] <= seconds + 1e-6
    assert entry["supervised_tokens_per_second"] == pytest.approx(6 / seconds)
    # Two tiles of 10 and twenty tokens of 1.
    assert entry["mfu"] == pytest.approx(40 / seconds / 1e3)
    assert entry["peak_memory_bytes"] == 3 << 30


def test_saves_tell_how_long_the_devices_waited(tmp_path, monkeypatch):
  """In the entry that comes next, all of them since the last one; the save at the end holds nothing up."""
  clock = SimpleNamespace(now=0.0)

  def now():
    clock.now += 1e-6
    return clock.now

  def save(self, state, *, loader, trainer):
    clock.now += int(state.step)

  monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=now))
  monkeypatch.setattr(Saves, "save", save)
  history, _ = run(tmp_path, save_steps=1)
  pauses = [entry["save_pause_seconds"] for entry in history]
  assert pauses == pytest.approx([1, 2 + 3, 4 + 5], abs=1e-3)
  history, _ = run(tmp_path, save_steps=6)
  assert not any("save_pause_seconds" in entry for entry in history)


def test_the_clock_tells_waiting_from_computing():
  clock = StepClock()
  assert clock.times(fetched_in=1, dispatched=1, done=5) is None
  # Fetched while the step before was computed: the devices did not wait.
  hidden = clock.times(fetched_in=2, dispatched=4, done=9)
  assert (hidden.whole, hidden.data, hidden.compute) == (4, 0, 4)
  # They waited 3 seconds, 2 of them for the batch.
  late = clock.times(fetched_in=2, dispatched=12, done=14)
  assert (late.whole, late.data, late.compute) == (5, 2, 2)
  clock.restart(20)
  fresh = clock.times(fetched_in=1, dispatched=21, done=22)
  assert (fresh.whole, fresh.data, fresh.compute) == (2, 1, 1)


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def scored(history):
  return {entry["step"]: entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry}


def test_the_last_step_is_scored_where_the_best_is_looked_for(tmp_path):
  evaluate = lambda params, step: {"eval_accuracy": 1 / step}  # noqa: E731
  history, saved = run(tmp_path, evaluate=evaluate, **BEST)
  assert scored(history) == {2: 1 / 2, 4: 1 / 4, 6: 1 / 6}
  # Before it is saved, so that a run which is restarted then does not do it again.
  assert scored(saved[6][1]["log_history"]) == scored(history)
  again, _ = run(tmp_path, evaluate=pytest.fail, history=history, **BEST)
  assert again == history
  history, _ = run(tmp_path, evaluate=evaluate, **BEST | {"load_best_model_at_end": False})
  assert list(scored(history)) == [2, 4]


def test_a_run_may_be_scored_before_its_first_step(tmp_path):
  """The entry of step 0 is no step's, and a run that goes on does not repeat it."""
  evaluate = lambda params, step: {"eval_accuracy": float(step)}  # noqa: E731
  history, _ = run(tmp_path, evaluate=evaluate, eval_on_start=True)
  assert history[0] == {"eval_accuracy": 0.0, "epoch": 0.0, "step": 0} and list(scored(history)) == [0]
  assert json.loads((tmp_path / "train_results.json").read_text())["train_loss"] == 2.5
  again, _ = run(tmp_path, evaluate=pytest.fail, history=history, eval_on_start=True)
  assert again == history


def test_averages_of_the_weights_are_scored_unless_the_last_ones_are_asked_for(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(TrainState, "model_params", lambda state, *, average: asked.append(average) or {})
  evaluate = lambda params, step: {"eval_accuracy": 1.0}  # noqa: E731
  run(tmp_path, evaluate=evaluate, eval_on_start=True)
  run(tmp_path, evaluate=evaluate, eval_on_start=True, scores_average=False)
  assert asked == [True, False]


def test_shares_of_the_run_are_written_as_steps(tmp_path):
  _, saved = run(tmp_path, save_steps=0.34, eval_steps=0.5)
  assert list(saved) == [3, 6]
  state = json.loads((tmp_path / "trainer_state.json").read_text())
  assert (state["save_steps"], state["eval_steps"], state["logging_steps"]) == (3, 3, 2)


class Watcher(Callback):
  """Remembers what it was told."""

  def __init__(self):
    self.told = []

  def first_batch(self, step, batch, params):
    self.told.append(("first batch", step, batch))

  def before_step(self, step):
    self.told.append(("before", step))

  def after_step(self, step, metrics):
    self.told.append(("after", step, float(metrics.loss)))

  def after_save(self, step):
    self.told.append(("saved", step))

  def end(self, step):
    self.told.append(("end", step))


def test_callbacks_are_told_what_the_loop_does(tmp_path):
  """The host is a step ahead; before a save it waits for the step."""
  watcher = Watcher()
  run(tmp_path, total=3, save_steps=2, callbacks=[watcher])
  before = [("first batch", 0, 0), ("before", 1), ("before", 2), ("after", 1, 0.0), ("after", 2, 1.0)]
  assert watcher.told == [*before, ("saved", 2), ("before", 3), ("after", 3, 2.0), ("end", 3), ("saved", 3)]


def test_parameters_are_checked_with_the_first_batch_of_a_new_run_alone():
  checked = []
  check = Check(lambda params, batch: checked.append((params, batch)))
  check.first_batch(3, "batch", {})
  check.first_batch(0, "batch", {"w": 1})
  assert checked == [({"w": 1}, "batch")]
