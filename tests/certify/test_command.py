"""`python -m internvl_jax.certify`: what it prints and writes, how it ends, and what it refuses."""

import ast
import json
import os
import sys

import numpy as np
import pytest

from internvl_jax.certify import certificate, model_checks, sample_checks
from internvl_jax.certify import run as certify_run
from internvl_jax.certify.findings import Finding, Status
from internvl_jax.certify.recording import open_recording, recorder
from internvl_jax.errors import UserError
from tests.certify.recorded import META, with_fault
from tests.support import forked


def run(arguments, folder):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  return forked.run(["-m", "internvl_jax.certify", *arguments], environment=environment, folder=folder)


def test_the_command(hf_model, hf_ours, tmp_path, monkeypatch, capsys):
  """With the checkpoint of other tests, for which programs are compiled."""
  monkeypatch.setattr(certify_run, "open_ours", lambda *given: hf_ours)
  request = certify_run.Request(
    record=str(with_fault("decay of norms", tmp_path / "record")),
    model=str(hf_model),
    meta=str(META),
    output=str(tmp_path / "certificate"),
    questions=1,
    max_new_tokens=4,
  )
  assert not certify_run.certify(request)
  printed = capsys.readouterr().out
  assert "✗ weight decay" in printed and "Departs, first in weight decay: " in printed
  assert "norms decay in theirs" in (tmp_path / "certificate/certificate.md").read_text()
  (line,) = (tmp_path / "certificate/questions.jsonl").read_text().splitlines()
  question = json.loads(line)
  assert question.keys() == {"id", "question", "pictures", "answer", "answer_ids", "prompt_tokens"}
  assert question["id"] == "easy-1" and question["question"] == "what shape is present?"
  assert all(os.path.isfile(picture) for picture in question["pictures"])
  assert len(question["pictures"]) == 1 and 0 < len(question["answer_ids"]) <= 4


def test_the_recorder_is_printed_and_needs_nothing_of_ours(tmp_path):
  done = run(["--recorder"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout == recorder().read_text(encoding="utf-8")
  imported = set()
  for node in ast.walk(ast.parse(done.stdout)):
    if isinstance(node, ast.Import):
      imported |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add(node.module.split(".")[0])
  assert imported - sys.stdlib_module_names == {"numpy", "torch", "transformers", "PIL", "internvl"}


def test_flags_are_asked_for(tmp_path):
  done = run([], tmp_path)
  assert done.returncode == 1
  assert "--record, --model and --meta are needed" in done.stderr


def test_what_is_no_recording_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"has no manifest\.json; make one by certify_record\.py"):
    open_recording(str(tmp_path))
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(UserError, match="not JSON"):
    open_recording(str(tmp_path))
  (tmp_path / "manifest.json").write_text('{"format": 99}')
  with pytest.raises(UserError, match="is of format 99"):
    open_recording(str(tmp_path))
  (tmp_path / "manifest.json").write_text('{"format": 1, "samples": [{"deep": false}]}')
  (tmp_path / "sample-0.npz").write_bytes(b"PK")
  with pytest.raises(UserError, match="cannot be read"):
    _ = open_recording(str(tmp_path)).samples


# --- Causes that no planted fault has -----------------------------------------------------------------------


@pytest.fixture
def tiles():
  return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def test_orders_of_tiles_and_channels(tiles):
  mine = sample_checks.normalized(tiles, "siglip")
  cause = sample_checks._pixel_cause
  assert "blue, green, red" in cause(mine[:, ::-1], mine)
  assert "thumbnail comes first" in cause(mine[[4, 0, 1, 2, 3]], mine)
  assert "column by column" in cause(mine[[0, 2, 1, 3, 4]], mine)
  assert "theirs are our tiles [1, 0, 2, 3, 4]" in cause(mine[[1, 0, 2, 3, 4]], mine)
  assert "another picture" in cause(mine + 1, mine)


def test_rounding_is_told_from_other_statistics(tiles):
  mine = sample_checks.normalized(tiles, "imagenet")
  noise = np.random.default_rng(1).choice([-1, 0, 1], tiles.shape).astype(np.int16)
  rounded = sample_checks.normalized(
    (tiles.astype(np.int16) + noise).clip(0, 255).astype(np.uint8), "imagenet"
  )
  assert sample_checks._pixel_difference(rounded, mine, tiles, "imagenet") is None
  # All within a step of 8 bits, too, and no rounding.
  (place, cause) = sample_checks._pixel_difference(mine + np.float32(0.01), mine, tiles, "imagenet")
  assert place == [0, 0, 0, 0] and "normalized by the mean" in cause


def test_logits_that_are_not_finite_depart():
  theirs = {
    "places": np.array([0]),
    "top_ids": np.array([[1]]),
    "top_logits": np.array([[2.0]]),
    "logsumexp": np.array([2.1]),
    "full_logits": np.zeros((0, 3)),
  }
  assert model_checks.compare_predictions(np.full((1, 3), np.nan), theirs)[0] == np.inf


def test_the_table_says_where_and_why():
  findings = [
    Finding(stage="labels", status=Status.DEPARTS, where="sample 0, token 3", cause="a | b"),
    Finding(stage="logits", status=Status.AGREES, compared="3 tokens", difference=1e-6),
  ]
  assert "sample 0, token 3" in certificate.table(findings)
  assert "6.0 digits" in certificate.table(findings)
  assert certificate.verdict(findings) == (
    "Departs, first in labels: sample 0, token 3. Probable cause: a | b."
  )
  assert "sample 0, token 3. a \\| b |" in certificate.markdown(findings, {})
