"""DeepSpeed's ZeRO files: what is followed, and every reason to refuse one."""

import json

import jax
import pytest

from internvl_jax.aot import recipe
from internvl_jax.arguments import TrainingArguments
from internvl_jax.hf import published
from internvl_jax.open_model import open_shapes
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.parallel import zero
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import state_places

# The keys of the reference's files, all stages together.
PUBLISHED = {
  "zero_optimization": {
    "stage": 3,
    "allgather_partitions": True,
    "allgather_bucket_size": 1e9,
    "overlap_comm": True,
    "reduce_scatter": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": 1e9,
    "stage3_prefetch_bucket_size": 1e9,
    "stage3_param_persistence_threshold": 1e7,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
  },
  "fp16": {
    "enabled": "auto",
    "auto_cast": True,
    "loss_scale": 0,
    "initial_scale_power": 32,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
  },
  "bf16": {"enabled": "auto"},
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": True,
}


@pytest.fixture
def write(tmp_path):
  def write(settings):
    path = tmp_path / "zero.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(path)

  return write


def changed(path, value):
  """The published file with one setting changed or added."""
  settings = json.loads(json.dumps(PUBLISHED))
  *sections, name = path.split(".")
  inner = settings
  for section in sections:
    inner = inner[section]
  inner[name] = value
  return settings


def found(settings, write, **training):
  return list(zero.problems(write(settings), TrainingArguments(**training)))


@pytest.mark.parametrize("stage", zero.STAGES)
def test_the_published_files_are_followed(stage, write):
  settings = changed("zero_optimization.stage", stage)
  assert found(settings, write) == []
  assert zero.read_stage(write(settings)) == stage
  assert zero.read_stage(None) == 0


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True}, "mesh.fsdp"),
    ("zero_optimization.offload_param", {"device": "nvme"}, "python -m internvl_jax.plan"),
    ("zero_optimization.stage", 4, "zero_optimization.stage=4 must be one of 0, 1, 2, 3"),
    ("zero_optimization.overlap_com", True, "did you mean zero_optimization.overlap_comm?"),
    ("gradient_acumulation_steps", 2, "did you mean gradient_accumulation_steps?"),
    ("anything", 1, "anything is no setting of DeepSpeed's; remove it"),
    ("fp16.enabled", True, "training.bf16=True"),
    ("scheduler", {"type": "WarmupDecayLR"}, "training.lr_scheduler_type"),
    ("optimizer.type", "Lion", "optimizer.type='Lion'"),
    ("optimizer.params.betas", [0.9, 0.95], "training.adam_beta1=0.9, training.adam_beta2=0.999"),
    ("gradient_clipping", 0.5, "gradient_clipping=0.5, but training.max_grad_norm=1.0"),
    ("bf16.enabled", True, "bf16.enabled=True, but training.bf16=False"),
    ("train_batch_size", 64, "set it to 'auto'"),
  ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(path, value, message, write):
  (line,) = found(changed(path, value), write)
  assert line.startswith("training.deepspeed=") and path in line
  assert message in line and "\n" not in line


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("zero_optimization.offload_optimizer", {"device": "none", "pin_memory": True}),
    ("zero_optimization.offload_param", None),
    ("bf16.enabled", False),
    ("amp", {"enabled": False}),
    ("gradient_clipping", 1.0),
  ],
)
def test_what_is_off_or_equal_passes(path, value, write):
  assert found(changed(path, value), write) == []


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "cannot be read as JSON"),
    ("[]", "must hold a JSON object, not a list"),
    ('{"zero_optimization": 2}', "zero_optimization must be a JSON object"),
  ],
)
def test_files_that_are_none(text, message, write):
  (line,) = found(text, write)
  assert message in line and "\n" not in line


def test_a_missing_file():
  assert list(zero.problems("no.json", TrainingArguments())) == ["training.deepspeed='no.json': no such file"]


@pytest.mark.parametrize(("stage", "parts"), [(1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))])
def test_a_file_decides_where_a_models_state_lies(write, stage, parts):
  """How many parts parameters, gradients and moments are in, of a published size on eight devices."""
  config = recipe.get_config()
  config.model.model_name_or_path = published.hub_id("2.5-1b")
  config.mesh.data, config.mesh.fsdp = -1, 1
  settings = {**PUBLISHED, "zero_optimization": {**PUBLISHED["zero_optimization"], "stage": stage}}
  config.training.deepspeed = write(settings)
  source, mesh = open_shapes(config), open_mesh(config, jax.devices())
  trainable = trainable_paths(config.model, source.model.shapes)
  shapes, places = state_places(config, source, trainable, mesh)
  path = "language_model.model.layers.0:24.mlp.gate_proj.kernel"
  whole = shapes[path].size
  for place, expected in zip((places.params, places.gradients, places.moments), parts, strict=True):
    part = jax.ShapeDtypeStruct(place[path].shard_shape(shapes[path].shape), "f4")
    assert whole // part.size == expected
