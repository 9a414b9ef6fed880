"""What a person sees while waiting: what is left, what does not learn, and nothing that is not theirs to mend."""

import os
import subprocess
import sys

import numpy as np
import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import BatchCounts
from internvl_jax.callbacks import Unmoved, idle_on_text
from internvl_jax.data.sample.images import open_image
from internvl_jax.data.where import DataError, Typed, Where
from internvl_jax.metrics.gauges import StepTimes
from internvl_jax.metrics.writers.console import ProgressBar
from internvl_jax.step import StepMetrics
from tests.support.toy import CURVE, REPOSITORY
from tests.test_trainer import make_log


def metrics(grad_norm=1.0, image_tokens=4):
  counts = BatchCounts(np.int32(6), np.int32(20), np.int32(image_tokens), np.float32(100))
  return StepMetrics(np.float32(1), np.float32(grad_norm), np.bool_(False), counts, {})


def test_what_is_left_does_not_count_the_compilation(tmp_path, caplog):
  caplog.set_level("INFO")
  log = make_log(tmp_path, TrainingArguments(logging_steps=1), 100)
  (bar,) = [writer for writer in log._writers if isinstance(writer, ProgressBar)]
  with log:
    log.start(0)
    log.add(1, metrics(), next_rate=0.0, times=None)  # Compiled for.
    log.add(2, metrics(), next_rate=0.0, times=StepTimes(60.0, 0.0, 60.0))
    log.add(40, metrics(), next_rate=0.0, times=StepTimes(30.0, 0.0, 30.0))
    assert bar.bar.postfix == "0:45:00 left, loss 1.0000"
    log.add(100, metrics(), next_rate=0.0, times=StepTimes(30.0, 0.0, 30.0))
  said = [text for record in caplog.records if (text := record.getMessage()).startswith("step ")]
  assert [text.rpartition(", ")[2] for text in said[1:3]] == ["1:38:00 left", "0:45:00 left"]
  assert "left" not in said[0] and "left" not in said[3]


def test_what_trains_and_gets_no_gradient_is_told_once():
  unmoved = Unmoved({"mlp1"}, 3)
  told = [unmoved.remark(metrics(grad_norm=0.0)) for _ in range(5)]
  assert [bool(text) for text in told] == [False, False, True, False, False]
  assert "gradient was zero in 3 steps in a row" in told[2]

  on_text = [unmoved.remark(metrics(image_tokens=0)) for _ in range(4)]
  assert on_text[2].startswith("3 steps in a row had no image, and mlp1 learn") and not any(on_text[:2])
  assert not any(Unmoved({"language_model"}, 3).remark(metrics(image_tokens=0)) for _ in range(4))

  at_once = idle_on_text({"mlp1.fc1.kernel", "language_model.head"}, lambda: False)
  assert at_once == on_text[2].replace("3 steps in a row had", "the data have")
  assert idle_on_text({"mlp1.fc1.kernel"}, lambda: True) is None
  assert idle_on_text({"language_model.head"}, pytest.fail) is None

  now_and_then = Unmoved({"mlp1"}, 3)
  assert not any(now_and_then.remark(metrics(step % 3, 4 * (step % 2))) for step in range(12))


def test_an_image_from_the_command_line_has_no_line_to_delete(tmp_path):
  (tmp_path / "cut.png").write_bytes(b"")
  for path, cause in (
    (tmp_path, "is not a file; correct its path"),
    (tmp_path / "cut.png", "is empty (0 bytes)"),
  ):
    with pytest.raises(DataError) as typed:
      open_image(str(path), Typed("question", "", 1, "--image"))
    assert str(typed.value).startswith(f"--image: image {path} {cause}") and "line" not in str(typed.value)
    with pytest.raises(DataError, match=r"x\.jsonl:1 .* or delete the line"):
      open_image(str(path), Where("question", "x.jsonl", 1))


def test_a_folder_is_no_image(tmp_path):
  done = command("generate", "--model", CURVE / "init", "--question", "what?", "--image", tmp_path)
  assert (
    done.returncode == 1 and done.stderr == f"error: --image={tmp_path}: is a folder; name an image in it\n"
  )


def test_libraries_say_nothing_of_a_tokenizer():
  program = (
    f"import internvl_jax, transformers; transformers.AutoTokenizer.from_pretrained({str(CURVE / 'init')!r})"
  )
  environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=environment | {"PYTHONPATH": str(REPOSITORY)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stderr == ""


def command(name, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"internvl_jax.{name}", *map(str, arguments)],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    capture_output=True,
    text=True,
    check=False,
  )
