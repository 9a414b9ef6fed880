"""Every field of `training` does what it says: a test a field, by its name."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.allowed_values import ACCEPTED
from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.config_checks import idle_settings, problems
from internvl_jax.data.load import prefetch
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.intervals import Best, Due, best_of, steps_of
from internvl_jax.metrics import writers
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TrackedRun, open_writers
from internvl_jax.metrics.writers.console import ProgressBar
from internvl_jax.optim.labels import labels_of, trained
from internvl_jax.optim.learning_rate import make_schedule
from internvl_jax.optim.optimizer import OPTIMIZERS, make_optimizer
from internvl_jax.outputs import check_output_dir
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import execution, scales_of
from internvl_jax.setup.step import set_up as make_setup
from internvl_jax.state import TrainState
from tests.support.toy import ASSETS
from tests.test_fields import run_of, source_of


def test_all_fields_are_here():
  fields = [field.name for field in dataclasses.fields(TrainingArguments)]
  tests = {name for name in dir(sys.modules[__name__]) if name.startswith("test_")}
  assert [name for name in fields if f"test_{name}" not in tests] == []


def configured(**settings):
  config = run_of()
  for name, value in settings.items():
    setattr(config.training, name, value)
  return config


def refusals(**settings):
  """What is said of the settings before a run."""
  return [line for line in problems(configured(**settings), "plan") if "training." in line]


def set_up(**settings):
  config = configured(**settings)
  return make_setup(config, source_of(), open_mesh(config, jax.devices()[:1]))


# --- The optimizer ------------------------------------------------------------------------------------------


def updates(*grads, start=0.0, **settings):
  """What the optimizer subtracts from one number that decays, at a learning rate of 1, gradient after gradient."""
  settings = {"max_grad_norm": 0.0, **settings}
  optimizer = make_optimizer(TrainingArguments(**settings), labels={"w": "mlp1"}, decay={"w": True})
  params = {"w": jnp.float32(start)}
  state, found = optimizer.init(params), []
  for grad in grads:
    update, state = optimizer.update(
      {"w": jnp.float32(grad)}, state, params, grad_norm=jnp.float32(abs(grad)), learning_rate=jnp.float32(1)
    )
    found.append(-float(update["w"]))
  return found


def test_weight_decay():
  assert updates(0.0, start=2.0, weight_decay=0.25) == [0.5] and updates(0.0, start=2.0) == [0.0]


def test_l2_to_start():
  assert updates(1.0, start=2.0, optim="sgd", l2_to_start=0.25) == [1.0]  # It is where it began.
  optimizer = make_optimizer(
    TrainingArguments(optim="sgd", l2_to_start=0.25), labels={"w": "mlp1"}, decay={"w": True}
  )
  state = optimizer.init({"w": jnp.float32(2)})
  given = {"grad_norm": jnp.float32(0), "learning_rate": jnp.float32(0.5)}
  update, _ = optimizer.update({"w": jnp.float32(0)}, state, {"w": jnp.float32(1)}, **given)
  assert float(update["w"]) == 0.5 * 0.25
  (line,) = refusals(l2_to_start=200.0, learning_rate=5e-3)
  assert (
    "l2_to_start=200 times training.learning_rate=0.005 is 1: each step would carry the weights past" in line
  )
  assert not refusals(l2_to_start=199.0, learning_rate=5e-3) and "at least 0" in refusals(l2_to_start=-1.0)[0]


def test_adam_beta1():
  # The second direction: (b1 (1 - b1) g1 + (1 - b1) g2) / (1 - b1^2), over the root of mean squares, which is 1.
  for beta in (0.5, 0.9):
    expected = (beta * (1 - beta) - (1 - beta)) / (1 - beta**2)
    assert updates(1.0, -1.0, adam_beta1=beta)[1] == pytest.approx(expected, rel=1e-5)


def test_adam_beta2():
  for beta in (0.5, 0.999):
    second = ((1 - beta) * beta * 1 + (1 - beta) * 9) / (1 - beta**2)
    assert updates(1.0, 3.0, adam_beta1=0.0, adam_beta2=beta)[1] == pytest.approx(
      3 / math.sqrt(second), rel=1e-4
    )


def test_adam_epsilon():
  assert updates(1.0, adam_epsilon=1.0)[0] == pytest.approx(0.5, rel=1e-5)
  assert updates(1.0, adam_epsilon=1e-8)[0] == pytest.approx(1.0, rel=1e-5)


def test_max_grad_norm():
  for limit, length in ((0.5, 0.5), (0.0, 5.0), (9.0, 5.0)):
    assert updates(5.0, optim="sgd", max_grad_norm=limit) == [pytest.approx(length, rel=1e-5)]


def test_optim():
  assert not any(refusals(optim=name) for name in OPTIMIZERS)
  for name, words in {
    "adamw_torch_4bit": "adamw_8bit has moments of eight bits; mesh.fsdp",
    "paged_adamw_32bit": "host's memory",
    "lion_8bit": "of these, adamw_8bit has moments of eight bits",
    "adafactr": "did you mean adafactor?",
  }.items():
    (line,) = refusals(optim=name)
    assert words in line and "\n" not in line


def test_optim_args():
  assert not refusals(optim="sgd", optim_args="momentum=0.9, nesterov=True,ema_decay=0.99")
  for (name, given), words in {
    ("adamw_torch", "betas=0.9"): "has no argument 'betas'; there are eps_root, nesterov, ema_decay",
    ("adamw_torch", "b1=0.9"): "set training.adam_beta1 in place of b1",
    ("sgd", "momentum"): "momentum must be a number, not ''",
    ("sgd", "nesterov=1"): "nesterov must be true or false, not '1'",
    ("muon", "ns_steps=2.5"): "ns_steps must be a whole number, not '2.5'",
    ("muon", "ema_decay=1"): "ema_decay=1 must be at least 0 and below 1",
    ("lion_32bit", "mlp1_rate=2"): "set training.projector_lr in place of mlp1_rate",
  }.items():
    (line,) = refusals(optim=name, optim_args=given)
    assert words in line and "\n" not in line


def rates(steps=10, **settings):
  schedule = make_schedule(TrainingArguments(**settings), steps)
  return [schedule(step) for step in range(steps + 1)]


def test_learning_rate():
  assert max(rates(learning_rate=3e-3)) == 3e-3


def scales(**settings):
  """What multiplies the rate, by the paths' parts."""
  config = configured(learning_rate=1e-3, **settings)
  source = source_of(use_llm_lora=2)
  config.model.use_llm_lora = 2
  labels = trained(labels_of(config.model, source.model.shapes))
  found = scales_of(config, source, labels)
  return {labels[path]: scale for path, scale in found.items()}


def test_vision_lr():
  assert scales(vision_lr=5e-4) == {"vision_model": 0.5}


def test_projector_lr():
  assert scales(projector_lr=2e-3) == {"mlp1": 2}


def test_language_lr():
  config = configured(learning_rate=1e-3, language_lr=5e-4)
  labels = trained(labels_of(config.model, source_of().model.shapes))
  found = scales_of(config, source_of(), labels)
  assert {labels[path] for path in found} == {"language_model"} and set(map(float, found.values())) == {0.5}


def test_adapters_lr():
  assert scales(adapters_lr=2e-3) == {"adapters": 2}


def test_lr_by_pattern():
  assert scales(lr_by_pattern='{".*q_proj.lora_B.*": 4e-3}') == {"adapters": 4}


def test_layer_lr_decay():
  assert set(scales(layer_lr_decay=0.9)) == {"vision_model"}
  frozen = configured(layer_lr_decay=0.9)
  frozen.model.freeze_backbone = True
  assert "training.layer_lr_decay=0.9 has no effect with model.freeze_backbone" in idle_settings(frozen)[0]


def test_lr_scheduler_type():
  assert len(set(rates(lr_scheduler_type="constant"))) == 1
  assert rates(lr_scheduler_type="linear") != rates(lr_scheduler_type="cosine")


def test_lr_scheduler_kwargs():
  for rate in (0.1, 0.5):
    kwargs = json.dumps({"min_lr_rate": rate})
    found = rates(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=kwargs, learning_rate=1.0)
    assert found[-1] == pytest.approx(rate)


def test_warmup_ratio():
  assert rates(warmup_ratio=0.25, learning_rate=1.0)[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_warmup_steps():
  assert rates(warmup_steps=2, learning_rate=1.0)[:3] == [0, 0.5, 1]


# --- Batches ------------------------------------------------------------------------------------------------


@pytest.fixture
def loader_of(tmp_path):
  """A function from training settings to a loader of twelve short texts and one long one."""
  turns = lambda text: [{"from": "human", "value": "what?"}, {"from": "gpt", "value": text}]  # noqa: E731
  texts = ["red", "blue", "green"] * 4 + ["red " * 40]
  (tmp_path / "lines.jsonl").write_text(
    "".join(json.dumps({"conversations": turns(text)}) + "\n" for text in texts)
  )
  (tmp_path / "meta.json").write_text(
    json.dumps({"texts": {"root": "", "annotation": str(tmp_path / "lines.jsonl")}})
  )
  opened = []

  def make(*, shuffle=False, **settings):
    usual = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "disable_tqdm": True}
    data = DataTrainingArguments(
      meta_path=str(tmp_path / "meta.json"), conv_style="internvl2_5", max_seq_length=512
    )
    opened.append(
      TrainLoader(
        data,
        TrainingArguments(**usual | settings),
        LoaderConfig(shuffle=shuffle, cache_dir=str(tmp_path / "cache")),
        ChatTokenizer(load_tokenizer(ASSETS / "tokenizer"), "internvl2_5"),
        tokens_per_tile=4,
        shards=Shards(count=2 if settings.get("group_by_length") else 1),
      )
    )
    return opened[-1]

  yield make
  for loader in opened:
    loader.close()


def order_of(loader):
  found = []
  for step, _ in enumerate(loader):
    found.append(loader.batch_samples(step).rpartition(":")[2])
  return found


def test_per_device_train_batch_size(loader_of):
  assert next(loader_of(per_device_train_batch_size=3)).input_ids.shape[:2] == (1, 3)


def test_gradient_accumulation_steps(loader_of):
  loader = loader_of(gradient_accumulation_steps=4)
  assert next(loader).input_ids.shape[:2] == (4, 1) and loader.total_steps == 4


def test_num_train_epochs(loader_of):
  assert [loader_of(num_train_epochs=epochs).total_steps for epochs in (1, 1.5, 2)] == [13, 20, 26]


def test_max_steps(loader_of):
  loader = loader_of(max_steps=5)
  assert loader.total_steps == 5 and len(order_of(loader)) == 5


def test_seed(loader_of):
  assert set_up(seed=7).step.seed == 7
  orders = [order_of(loader_of(shuffle=True, seed=seed)) for seed in (1, 1, 2)]
  assert orders[0] == orders[1] != orders[2]


def test_data_seed(loader_of):
  orders = [order_of(loader_of(shuffle=True, seed=1, data_seed=seed)) for seed in (None, 1, 2)]
  assert orders[0] == orders[1] != orders[2]


def test_dataloader_num_workers(loader_of, monkeypatch):
  asked = []
  monkeypatch.setattr(
    prefetch.DecodedAhead, "__init__", lambda self, source, workers, ahead: asked.append(workers)
  )
  monkeypatch.setattr(prefetch.DecodedAhead, "close", lambda self: None)
  loader_of(dataloader_num_workers=3)._start()
  assert asked == [3]


def test_group_by_length(loader_of):
  plain, grouped = (loader_of(group_by_length=flag) for flag in (False, True))
  assert type(grouped.schedule.order) is not type(plain.schedule.order)


def test_remove_unused_columns():
  assert "training.remove_unused_columns" in ACCEPTED
  assert refusals(remove_unused_columns=False) == idle_settings(configured(remove_unused_columns=False)) == []


# --- How it is computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [False, True])
def test_bf16(flag):
  setup = set_up(bf16=flag)
  assert setup.how.dtype == (jnp.bfloat16 if flag else jnp.float32)
  assert {leaf.dtype for path, leaf in setup.shapes.items() if path in setup.trainable} == {
    jnp.dtype("float32")
  }


def test_fp16():
  assert refusals(fp16=False) == []
  (line,) = refusals(fp16=True)
  assert "loss scaling; use training.bf16=True" in line


def test_gradient_checkpointing():
  for flag, expected in ((True, "full"), (False, None)):
    config = configured(gradient_checkpointing=flag)
    config.model.grad_checkpoint = False
    assert execution(config, source_of().config).remat == expected


def test_deepspeed(tmp_path):
  path = tmp_path / "zero.json"
  for stage, parts in ((1, 1), (3, 2)):
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    mesh = open_mesh(configured(deepspeed=str(path)), jax.devices()[:2])
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2 // parts, parts)


def test_do_train():
  assert "training.do_train" in ACCEPTED
  assert [refusals(do_train=flag) for flag in (False, True)] == [[], []]


# --- Where it goes ------------------------------------------------------------------------------------------


def test_output_dir(tmp_path):
  assert check_output_dir(TrainingArguments(output_dir=str(tmp_path / "new"))) == "new"


def test_overwrite_output_dir(tmp_path):
  (tmp_path / "checkpoints/3").mkdir(parents=True)
  (tmp_path / "checkpoints/3/_CHECKPOINT_METADATA").write_text("{}")
  for flag, expected in ((False, "resume"), (True, "overwrite")):
    assert (
      check_output_dir(TrainingArguments(output_dir=str(tmp_path), overwrite_output_dir=flag)) == expected
    )


def log_of(tmp_path, **settings):
  training = TrainingArguments(**settings)
  tracked = TrackedRun(training=training, output_dir=tmp_path)
  writers = open_writers(tracked, total_steps=4, terms={})
  return RunLog(
    training,
    tmp_path,
    total_steps=4,
    epoch_of=lambda step: step,
    gauges=SimpleNamespace(),
    writers=writers,
  )


def test_report_to(tmp_path):
  for name, there in (("none", False), ("tensorboard", True)):
    with log_of(tmp_path, report_to=name):
      pass
    assert (tmp_path / "tensorboard").exists() is there
  (line,) = refusals(report_to="wandbb")
  assert "'wandbb' is no tracker; one or several, with commas between, of tensorboard, wandb" in line
  (line,) = refusals(report_to="tensorboard,none")
  assert "'none' stands alone" in line


def test_report_to_what_is_not_installed(monkeypatch):
  monkeypatch.setattr(writers, "is_installed", lambda name: name == "tensorboard")
  (line,) = refusals(report_to="tensorboard,wandb")
  assert line.endswith("needs the package wandb, which is not installed: pip install 'internvl_jax[wandb]'")
  assert not refusals(report_to="all") and writers.trackers_named("all") == ["tensorboard"]


def test_run_name(tmp_path):
  for given, found in ((None, "out"), ("my run", "my run")):
    tracked = TrackedRun(training=TrainingArguments(run_name=given), output_dir=tmp_path / "out")
    assert tracked.name == found


def test_project(tmp_path, monkeypatch):
  def found(given):
    tracked = TrackedRun(training=TrainingArguments(project=given), output_dir=tmp_path)
    return tracked.project("MY_PROJECT")

  assert found(None) == "internvl_jax"
  monkeypatch.setenv("MY_PROJECT", "theirs")
  assert (found(None), found("ours")) == ("theirs", "ours")
  (line,) = idle_settings(configured(project="ours"))
  assert "training.project='ours' has no effect without a tracker that has it" in line


def test_logging_dir(tmp_path):
  with log_of(tmp_path, report_to="tensorboard", logging_dir=str(tmp_path / "board")):
    pass
  assert (tmp_path / "board").exists() and not (tmp_path / "tensorboard").exists()


def test_disable_tqdm(tmp_path):
  for flag in (False, True):
    with log_of(tmp_path, disable_tqdm=flag) as log:
      log.start(0)
      (bar,) = [writer.bar for writer in log._writers if isinstance(writer, ProgressBar)]
      assert bar.disable is flag


def test_save_total_limit(tmp_path):
  saved = {}
  for limit in (None, 2):
    folder = tmp_path / str(limit)
    checkpointer = Checkpointer(folder, keep=limit)
    for step in range(1, 5):
      checkpointer.save(TrainState(jnp.int32(step), {"w": jnp.zeros(1)}, {}), loader={}, trainer={})
    checkpointer.wait()
    saved[limit] = checkpointer.steps
    checkpointer.close()
  assert saved == {None: [1, 2, 3, 4], 2: [3, 4]}


# --- When ---------------------------------------------------------------------------------------------------


def due(kind, total=10, per_epoch=4, **settings):
  """The steps after which something is due, of ten with four to an epoch."""
  found = Due(
    training=TrainingArguments(**settings), total_steps=total, epoch_of=lambda step: step / per_epoch
  )
  return [step for step in range(1, total + 1) if getattr(found, kind)(step)]


def test_logging_strategy():
  assert due("logs", logging_strategy="epoch") == [4, 8, 10]
  assert due("logs", logging_strategy="no", logging_steps=2) == [10]
  assert due("logs", logging_strategy="steps", logging_steps=4) == [4, 8, 10]


def test_logging_steps():
  assert due("logs", logging_steps=3) == [3, 6, 9, 10]
  assert due("logs", logging_steps=0.25) == [3, 6, 9, 10]  # 2.5 steps, rounded up


def test_logging_first_step():
  assert due("logs", logging_first_step=True) == [1, 10] and due("logs") == [10]


def test_save_strategy():
  assert due("saves", save_strategy="no", save_steps=2) == []
  assert due("saves", save_strategy="epoch", save_steps=1) == [4, 8, 10]
  assert due("saves", save_strategy="epoch", per_epoch=0.5, total=3) == [1, 2, 3]  # several epochs a step
  (line,) = refusals(save_strategy="best")
  assert "load_best_model_at_end" in line


def test_save_steps():
  assert due("saves", save_steps=4.0) == [4, 8] and due("saves", save_steps=0.1) == list(range(1, 11))
  assert [steps_of(0.1, total) for total in (1, 10, 15, 1000)] == [1, 1, 2, 100]
  assert due("saves", save_steps=1) == list(range(1, 11))  # a whole 1 is a step, not all of them
  for value in (0, 2.5, -1.0):
    (line,) = refusals(save_steps=value)
    assert "must be a number of steps, or a share of all steps between 0 and 1" in line


def test_eval_strategy():
  assert due("scores", eval_strategy="no", eval_steps=1) == []
  assert due("scores", eval_strategy="epoch") == [4, 8, 10]
  (line,) = refusals(eval_strategy="epoch")
  assert "training.eval_strategy='epoch' has nothing to score" in line


def test_evaluation_strategy():
  assert due("scores", evaluation_strategy="steps", eval_steps=5) == [5, 10]


def test_eval_steps():
  assert due("scores", eval_strategy="steps", eval_steps=0.5) == [5, 10]
  assert due("scores", eval_strategy="steps", logging_steps=4) == [4, 8]


def test_eval_on_start():
  (line,) = refusals(eval_on_start=True)
  assert "eval_on_start=True has nothing to score" in line and not refusals(eval_on_start=False)


# --- The best ----------------------------------------------------------------------------------------------


HISTORY = [
  {"step": 2, "loss": 1.0, "learning_rate": 0.1},
  {"step": 2, "eval_accuracy": 0.5, "eval_accuracy_red": 0.1},
  {"step": 4, "eval_accuracy": 0.75, "eval_accuracy_red": math.nan},
  {"step": 6, "eval_accuracy": 0.75, "eval_accuracy_red": 0.0},
  {"step": 8, "eval_accuracy": 0.9, "eval_accuracy_red": 0.2},
]


def best(among=(2, 4, 6), **settings):
  found = best_of(TrainingArguments(**{"load_best_model_at_end": True} | settings), first="accuracy")
  return found and found.of(HISTORY, among)


def test_load_best_model_at_end(tmp_path):
  assert best(load_best_model_at_end=False) is None
  # The first of those that are saved.
  assert best() == (4, 0.75) and best(among=range(9)) == (8, 0.9) and best(among=(1, 3)) is None
  log = log_of(tmp_path)
  log._best, log.history = Best("eval_accuracy", True), HISTORY
  checkpointer = Checkpointer(tmp_path, keep=1, spare=log.best_step)
  for step in (2, 4, 6, 7):
    checkpointer.save(TrainState(jnp.int32(step), {"w": jnp.full(1, step)}, {}), loader={}, trainer={})
  checkpointer.wait()
  assert checkpointer.steps == [4, 7]
  like = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {"w": jax.ShapeDtypeStruct((1,), jnp.int32)}, {})
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda leaf: leaf.update(sharding=place), like)
  assert np.asarray(checkpointer.restore(like, step=4)[0].params["w"]) == [4]
  checkpointer.close()


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({}, "needs scores to go by; set training.eval_strategy"),
    ({"eval_strategy": "epoch"}, "save_strategy='steps' must be training.eval_strategy='epoch'"),
    (
      {"eval_strategy": "steps", "eval_steps": 300},
      "save_steps=500 must be a multiple of training.eval_steps=300",
    ),
    (
      {"eval_strategy": "steps", "metric_for_best_model": "loss"},
      "'loss' is no score of this run; it has accuracy",
    ),
    ({"eval_strategy": "steps", "metric_for_best_model": "rewards/margins"}, "is no score of this run"),
    ({"eval_strategy": "steps", "metric_for_best_model": "accuracy_red"}, "is no score of this run"),
    ({"eval_strategy": "steps", "save_steps": 0.3, "eval_steps": 0.1}, None),
    (
      {"evaluation_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "eval_accuracy"},
      None,
    ),
  ],
)
def test_the_best_model_can_be_known(settings, words):
  config = configured(load_best_model_at_end=True, **settings)
  config.eval.annotation = __file__
  found = [line for line in problems(config, "plan") if "best_model" in line]
  assert (found == []) if words is None else words in found[0]


def test_metric_for_best_model():
  assert (
    best(metric_for_best_model="accuracy_red") == best(metric_for_best_model="eval_accuracy_red") == (2, 0.1)
  )
  pairs = best_of(TrainingArguments(load_best_model_at_end=True), first=None)
  assert pairs == Best("eval_rewards/accuracies", True)


def test_greater_is_better():
  assert best(greater_is_better=False) == (2, 0.5)
  assert best_of(
    TrainingArguments(load_best_model_at_end=True, metric_for_best_model="loss"), first="accuracy"
  ) == Best("eval_loss", False)
