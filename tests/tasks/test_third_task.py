"""A way to learn is a folder and a line: `tests/support/text_task` trains without another change anywhere."""

import json

from internvl_jax import tasks
from internvl_jax.train.run import train
from tests.support.toy import CURVE, curve_config, log_history


def test_a_task_is_a_folder_and_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, "TASKS", ("tests.support.text_task", *tasks.TASKS))
  lines = [{"text": "red " * (1 + i % 4), "url": "x"} for i in range(8)]
  (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (tmp_path / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))
  config = curve_config(tmp_path / "out", CURVE)
  config.data.meta_path = str(tmp_path / "meta.json")
  config.training.max_steps, config.training.learning_rate = 2, 1e-2
  config.training.gradient_accumulation_steps, config.training.warmup_ratio = 1, 0.0
  # Both batches are the same four lines.
  config.training.per_device_train_batch_size = 4
  assert train(config)
  first, second = log_history(tmp_path / "out")
  assert second["loss"] < first["loss"] and 0 < first["long_rows"] < 1
  assert (tmp_path / "out" / "model.safetensors").is_file()
