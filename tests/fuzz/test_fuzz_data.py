"""No mutated line, meta file, image or video ends a run badly, and none is lost without being counted.

pytest tests/fuzz -m 'slow or not slow'                   the long form too: 2,000 lines, as many pairs, ...
pytest tests/fuzz -k image --fuzz-seed 3 --fuzz-only 41   one input, as a failure names it
"""

import functools
import json
import shutil

import pytest

from tests.fuzz import fates, judge, lines, media, metas, odd

POLICIES = ("drop", "truncate", "shrink_tiles")


def counts(few, many):
  return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def assert_none(failures):
  assert not failures, judge.report(failures)


def assert_each_alone(meta, tokenizer, numbered, *, pairs=False):
  """Every line between the first and the last is measured and made, or refused in words."""
  mixture = fates.open_mixture(meta, tokenizer, pairs=pairs)
  failures = []
  for index, (number, what) in enumerate(numbered, 1):
    if error := judge.ends_well(functools.partial(fates.measure_and_make, mixture, index)):
      failures.append(judge.Failure(number, what, error))
  mixture.close()
  assert_none(failures)


def assert_all_counted(meta, tokenizer, numbered, *, policy, packed, pairs=False):
  """The run and the doctor say the same of every line, and the run's counters add up to all of them."""
  how = {"packed": packed, "pairs": pairs, "policy": policy}
  with judge.limited(judge.SECONDS + len(numbered) / 10):
    run, counters = fates.by_run(meta, tokenizer, **how)
    doctor = fates.by_doctor(meta, tokenizer, **how)
  named = {index + 1: entry for index, entry in enumerate(numbered, 1)}
  failures = []
  for line in range(1, len(numbered) + 3):
    found, expected = set(run.get(line, ["is in no batch"])), {doctor.get(line, fates.TRAINED)}
    if found != expected:
      failures.append(
        judge.Failure(*named.get(line, (-1, "the good line")), f"{how}: run {found}, doctor {expected}")
      )
  assert_none(failures)
  met = [fate for found in run.values() for fate in found]
  lost = sum(fate != fates.TRAINED for fate in met)
  assert counters["samples"] == len(met) and run.keys() == set(range(1, len(numbered) + 3))
  assert lost == counters["unreadable"] + counters["over_long"] + counters["fully_masked"] == len(doctor)


@counts(60, 2000)
@pytest.mark.parametrize("pairs", [False, True], ids=["turns", "pairs"])
def test_lines(tmp_path, tokenizer, inputs, pairs, count):
  lines.write_media(tmp_path)
  made = [(number, *lines.make(rng, pairs=pairs)) for number, rng in inputs(f"lines{pairs}", count)]
  good = json.dumps(lines.GOOD_PAIR if pairs else lines.GOOD).encode()
  meta = lines.write_dataset(tmp_path, [good, *(text for _, text, _ in made), good])
  numbered = [(number, f"{done} {text[:300]}") for number, text, done in made]
  assert_each_alone(meta, tokenizer, numbered, pairs=pairs)
  for policy in POLICIES:
    for packed in (False, True):
      assert_all_counted(meta, tokenizer, numbered, policy=policy, packed=packed, pairs=pairs)


FOUND = (
  # A clip that is too long for a float.
  {"video": "v.gif", "clip": [0, 10**400], "conversations": lines.ASKED},
  # Two faults, of which a run meets the one first, and a doctor that believes the sizes the other.
  {"image": "gone.png", "width": 40, "height": 24, "conversations": [{"from": "gpt", "value": 1}]},
  {"image": "../a.png", "width": 40, "height": 24, "conversations": [{"from": "bot", "value": "x"}]},
  # Nothing is supervised, and fewer frames make it fit.
  {"video": "v.gif", "conversations": [{"from": "human", "value": "<video>\nwhat is it?"}] * 2},
  {"video": "v.mp4", "conversations": [{"from": "human", "value": "a red circle"}] * 2},
)
"""Lines of which the run and the doctor once said different things, or which ended both."""


@pytest.mark.parametrize("policy", POLICIES)
def test_lines_that_were_found(tmp_path, tokenizer, policy):
  lines.write_media(tmp_path)
  texts = [json.dumps(line).encode() for line in (lines.GOOD, *FOUND, lines.GOOD)]
  meta = lines.write_dataset(tmp_path, texts)
  numbered = [(number, str(line)) for number, line in enumerate(FOUND)]
  assert_each_alone(meta, tokenizer, numbered)
  for packed in (False, True):
    assert_all_counted(meta, tokenizer, numbered, policy=policy, packed=packed)


@pytest.mark.parametrize(
  ("kind", "count"),
  [
    ("image", 60),
    ("video", 30),
    *(pytest.param(*kind, marks=pytest.mark.slow) for kind in (("image", 500), ("video", 200))),
  ],
)
def test_media(tmp_path, tokenizer, inputs, kind, count):
  originals = media.images() if kind == "image" else media.videos()
  numbered, texts = [], []
  for number, rng in inputs(kind, count):
    name, done = media.write(tmp_path, str(number), rng, originals)
    numbered.append((number, f"{name} {done}"))
    texts.append(odd.dumps({kind: name, "conversations": lines.ASKED}).encode())
  good = json.dumps(lines.GOOD).encode()
  meta = lines.write_dataset(tmp_path, [good, *texts, good])
  assert_each_alone(meta, tokenizer, numbered)
  for packed in (False, True):
    assert_all_counted(meta, tokenizer, numbered, policy="truncate", packed=packed)


@counts(60, 500)
def test_metas(tmp_path, tokenizer, inputs, monkeypatch, count):
  lines.write_media(tmp_path)
  lines.write_dataset(tmp_path, [json.dumps(base).encode() for base in lines.BASES])
  monkeypatch.chdir(tmp_path)
  failures = []
  for number, rng in inputs("metas", count):
    text, done = metas.make(rng)
    meta = tmp_path / "mutated.json"
    meta.write_bytes(text)
    # The doctor first: it decodes in this thread, which the time limit can end.
    for start in (fates.by_doctor, fates.first_batch):
      error = judge.ends_well(functools.partial(start, meta, tokenizer, packed=number % 2 == 0))
      if error:
        failures.append(judge.Failure(number, f"{start.__name__} {done} {text[:300]}", error))
        break
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
  assert_none(failures)
