"""Files and folders that a configuration names: what is refused, and what is left to who opens it."""

import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax.config_checks import problems
from tests.support.configurations import set_field, sound_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path):
  return sound_config(tmp_path)


def test_paths_that_are_there_but_wrong(config, tmp_path):
  (tmp_path / "empty").mkdir()
  config.model.model_name_or_path = str(tmp_path / "empty")
  config.training.output_dir = config.data.meta_path
  config.eval.annotation = str(tmp_path / "eval.jsonl")
  config.eval.root = str(tmp_path / "none")
  found = "\n".join(problems(config))
  assert "holds no config.json" in found
  assert "is a file; name a folder" in found
  assert "eval.root=" in found and "no such folder" in found


def test_hub_ids_pass_and_parts_may_take_the_models_place(config, tmp_path):
  config.model.model_name_or_path = "OpenGVLab/InternVL2_5-1B@main"
  config.model.mlp_path = str(tmp_path / "model")
  assert not problems(config)
  config.model.model_name_or_path = None
  config.model.vision_path = "OpenGVLab/InternViT-300M-448px-V2_5"
  config.model.llm_path = str(tmp_path / "model")
  config.model.mlp_path = str(tmp_path / "mlp.pth")
  # Planning reads no weights.
  assert not problems(config, "plan") and "no such file" in problems(config)[0]
  (tmp_path / "mlp.pth").write_text("")
  assert not problems(config)
  code = "import sys, internvl_jax.config_paths as c; c._is_hub_id('a/b'); sys.exit('huggingface_hub' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", ["model.vision_path", "model.llm_path", "model.mlp_path"])
def test_the_output_never_covers_a_part(config, tmp_path, path):
  model = tmp_path / "out"
  model.mkdir()
  (model / "config.json").write_text("{}")
  (model / "mlp.safetensors").write_text("")
  config.model.model_name_or_path = None
  config.model.vision_path = config.model.llm_path = "org/name"
  set_field(config, path, str(model / "mlp.safetensors" if path == "model.mlp_path" else model))
  (line,) = problems(config)
  assert line.startswith(f"{path}=") and "write to a folder of its own" in line


@pytest.mark.parametrize("inside", ["", "checkpoints/5", "adapter"])
def test_the_output_never_covers_the_model(config, tmp_path, inside):
  model = tmp_path / "out" / inside
  model.mkdir(parents=True)
  (model / "config.json").write_text("{}")
  config.model.model_name_or_path = str(model)
  (line,) = problems(config)
  assert "write to a folder of its own" in line
  config.training.output_dir = str(tmp_path / "elsewhere")
  assert not problems(config)


def test_remote_paths_are_left_to_who_opens_them(config):
  config.model.model_name_or_path = "gs://bucket/model"
  config.data.meta_path = "gs://bucket/meta.json"
  assert not problems(config)


def test_an_output_directory_on_a_web_server_is_refused(config):
  config.training.output_dir = "s3://bucket/out"
  assert not problems(config)
  config.training.output_dir = "https://host/out"
  (line,) = problems(config)
  assert line.startswith(
    "training.output_dir='https://host/out': runs write to folders, gs:// and s3:// only"
  )


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("s3://", "names no bucket; write s3://bucket/folder"),
    ("gs:///run", "names no bucket; write gs://bucket/folder"),
    ("gs:/bucket/run", "did you mean gs://bucket/run?"),
  ],
)
def test_half_a_url_makes_no_folder_of_that_name(config, name, told):
  config.training.output_dir = name
  (line,) = problems(config)
  assert line.startswith(f"training.output_dir={name!r}") and line.endswith(told)
