"""Trains small models by several revisions and compares every loss, gradient norm and final weight to the bit.

  python benchmarks/golden.py BASE [REVISION ...] [--runs sft,lora] [--keep FOLDER]
  python benchmarks/golden.py BASE..REVISION

A change that is to leave the numbers alone is shown to do so here: each revision is checked out apart and trains the
same runs by its own code, on this machine. `BASE..REVISION` is every commit between the two, one by one. The working
tree is a revision, too, called `.`; it is compared with BASE where no other is named. What the package of a commit
computed is kept (--keep): commits that change nothing in it are not run again.

The runs are two recorded curves of the reference as they were recorded, and short ones of what else has numbers of
its own. Exits with 1 where any number differs, or a revision does not run.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags
from revisions import REPOSITORY, checkout, git, revisions

ASSETS = REPOSITORY / "tests" / "assets"
COMPARED = ("loss", "grad_norm", "learning_rate")

_RUNS = flags.DEFINE_list("runs", None, "Names of the runs; all by default.")
_KEEP = flags.DEFINE_string(
  "keep", str(Path.home() / ".cache" / "internvl_jax_golden"), "Folder of what commits computed."
)

RECIPE = """
from internvl_jax.config import TrainConfig

def get_config(arg=""):
  config = TrainConfig()
  config.data.conv_style = "internvl2_5"
  config.data.force_image_size = 56
  config.data.max_seq_length = 512
  config.data.max_dynamic_patch = 6
  config.data.dynamic_image_size = True
  config.data.use_thumbnail = True
  config.loader.shuffle = False
  config.training.logging_steps = 1
  config.training.per_device_train_batch_size = 4
  config.training.learning_rate = 2e-3
  config.training.weight_decay = 0.05
  config.training.warmup_ratio = 0.1
  config.training.lr_scheduler_type = "cosine"
  config.training.save_strategy = "no"
  return config
"""


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run.

  Attributes:
    settings: what it sets, beyond RECIPE.
    model: a folder of tests/assets with the weights in `init`, or a case of tests/support/families.py.
    data: "images", or "pairs" of answers.
    devices: simulated ones.
  """

  settings: Sequence[str]
  model: str = "curve"
  data: str = "images"
  devices: int = 1


_ADAPTERS = ("model.freeze_backbone=True", "model.freeze_llm=True", "model.freeze_mlp=True")
_PACKED = (
  "data.use_packed_ds=True",
  "data.max_packed_tokens=1024",
  "data.num_images_expected=24",
  "training.per_device_train_batch_size=1",
)
_PAIRS = (
  "preference.loss_type=sigmoid,bco_pair",
  "preference.sigmoid_loss_weight=0.8",
  "preference.bco_pair_loss_weight=0.2",
  "preference.rpo_alpha=1.0",
  "training.max_steps=4",
)

RUNS = {
  "sft": Run(("training.max_steps=24",)),
  "accumulation": Run(
    ("training.max_steps=24", "training.gradient_accumulation_steps=2"), model="curve_internlm2"
  ),
  "packed": Run((*_PACKED, "data.loss_reduction=square", "training.max_steps=6", "training.data_seed=3")),
  "packed-mesh": Run(
    (
      *_PACKED,
      "data.loss_reduction=square",
      "data.loss_reduction_all_gather=True",
      "mesh.data=2",
      "mesh.fsdp=2",
      "training.max_steps=4",
    ),
    devices=4,
  ),
  "tensor-sequence": Run(("mesh.sequence=2", "mesh.tensor=2", "training.max_steps=4"), devices=4),
  "lora": Run(
    (*_ADAPTERS, "model.use_llm_lora=4", "model.use_backbone_lora=4", "training.max_steps=6"),
    model="curve_internlm2",
  ),
  "half-frozen": Run(
    (
      "model.freeze_backbone=True",
      "model.unfreeze_vit_layers=-1",
      "model.freeze_llm=True",
      "model.unfreeze_lm_head=True",
      "model.drop_path_rate=0.3",
      "training.group_by_length=True",
      "training.bf16=True",
      "training.max_steps=6",
    )
  ),
  "experts": Run(("data.force_image_size=28", "training.max_steps=6"), model="qwen3_moe"),
  "pairs": Run(_PAIRS, data="pairs"),
  "pairs-lora": Run((*_PAIRS, *_ADAPTERS, "model.use_llm_lora=4"), data="pairs"),
  "pairs-stored-packed": Run(
    (*_PAIRS, *_PACKED, "preference.precompute_reference=True", "preference.share_prompts=True"), data="pairs"
  ),
}


def main(argv: Sequence[str]) -> int:
  if len(argv) < 2:
    raise app.UsageError("name a revision to compare with, or a range of them")
  names = _RUNS.value or list(RUNS)
  if unknown := set(names) - set(RUNS):
    raise app.UsageError(f"no runs: {sorted(unknown)}; there are {', '.join(RUNS)}")
  base, *others = revisions(argv[1:])
  differs = False
  with tempfile.TemporaryDirectory() as folder:
    inputs = write_inputs(Path(folder))
    expected = numbers_of(base, names, inputs)
    for revision in others:
      try:
        found = numbers_of(revision, names, inputs)
      except RuntimeError as error:
        print(f"{base[:7]} -> {revision[:7]}  DOES NOT RUN: {str(error).splitlines()[-1]}", flush=True)
        differs = True
        continue
      differs |= not report(base, revision, expected, found)
  return int(differs)


def numbers_of(revision: str, names: Sequence[str], inputs: Path) -> dict[str, dict]:
  """What a revision's runs computed, by their names; from where it is kept, if it is."""
  with checkout(revision) as tree:
    return {name: kept(revision, name, tree, inputs) for name in names}


def kept(revision: str, name: str, tree: Path, inputs: Path) -> dict:
  """A run's numbers; a commit's are kept, by its package's files and by all that they depend on beside these."""
  key = hashlib.sha256(
    json.dumps([dataclasses.asdict(RUNS[name]), RECIPE, sys.version, environment()]).encode()
  ).hexdigest()[:12]
  source = revision if revision == "." else git("rev-parse", f"{revision}:internvl_jax")
  file = Path(_KEEP.value) / f"{source}-{name}-{key}.json"
  if revision != "." and file.exists():
    return json.loads(file.read_text())
  found = train(name, tree, inputs)
  if revision != ".":
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
  return found


def environment() -> dict[str, str]:
  """What of the environment may change numbers."""
  from importlib.metadata import version

  names = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "transformers")
  return {name: version(name) for name in names} | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def train(name: str, tree: Path, inputs: Path) -> dict:
  """The log of a run, and a digest of the model that it ends with.

  Raises:
    RuntimeError: it fails.
  """
  run = RUNS[name]
  with tempfile.TemporaryDirectory() as out:
    settings = {
      "model.model_name_or_path": inputs / run.model,
      "data.meta_path": inputs / f"{run.data}.json",
      "training.output_dir": out,
      "runtime.compilation_cache_dir": inputs / "compiled",
    }
    command = [sys.executable, "-m", "internvl_jax.train", f"--config={inputs / 'recipe.py'}"]
    command += [f"--config.{field}={value}" for field, value in settings.items()]
    command += [f"--config.{setting}" for setting in run.settings]
    given = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(run.devices), "PYTHONPATH": str(tree)}
    ran = subprocess.run(
      command, env=os.environ | given, cwd=out, capture_output=True, text=True, check=False
    )
    if ran.returncode:
      raise RuntimeError(f"{name} at {tree}: {ran.stderr[-3000:].strip()}")
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    weights = hashlib.sha256((Path(out) / "model.safetensors").read_bytes()).hexdigest()
  steps = [{key: entry[key] for key in COMPARED} for entry in history if "loss" in entry]
  return {"steps": steps, "weights": weights}


def report(base: str, revision: str, expected: dict[str, dict], found: dict[str, dict]) -> bool:
  """Prints a line for each run; whether all are the same to the bit."""
  same = True
  for name, ours in found.items():
    theirs = expected[name]
    first = next(
      (i for i, (a, b) in enumerate(zip(ours["steps"], theirs["steps"], strict=False), 1) if a != b), None
    )
    if ours == theirs:
      word = f"{len(ours['steps'])} steps and the weights are the same"
    elif first is not None:
      word = f"DIFFERS at step {first}: {ours['steps'][first - 1]}, was {theirs['steps'][first - 1]}"
    else:
      word = f"DIFFERS: {len(ours['steps'])} steps, was {len(theirs['steps'])}, or only in the weights"
    same &= ours == theirs
    print(f"{base[:7]} -> {revision[:7]}  {name:20s} {word}", flush=True)
  return same


def write_inputs(folder: Path) -> Path:
  """Models and data of the runs; nothing in them depends on the revision that is tried."""
  sys.path.insert(0, str(REPOSITORY))
  from tests.support import families

  (folder / "recipe.py").write_text(RECIPE)
  for model in ("curve", "curve_internlm2"):
    (folder / model).symlink_to(ASSETS / model / "init")
  families.write_checkpoint("qwen3_moe", folder / "qwen3_moe", vocab_size=1000)
  images = ASSETS / "curve" / "data"
  (spec,) = json.loads((images / "meta.json").read_text()).values()
  (folder / "images.json").write_text(
    json.dumps({"images": {**spec, "root": str(images), "annotation": str(images / spec["annotation"])}})
  )
  lines = [json.loads(line) for line in (images / spec["annotation"]).read_text().splitlines()]
  (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs(lines)))
  meta = {"root": str(images), "annotation": str(folder / "pairs.jsonl"), "repeat_time": 1}
  (folder / "pairs.json").write_text(json.dumps({"pairs": meta}))
  return folder


def pairs(lines: list[dict]) -> Iterator[dict]:
  """Preference pairs about the images of lines, every fifth about none."""
  answers = ("red", "a small green square", "yes", "nothing at all", "blue and white", "no")
  questions = ("What color is it?", "What is this?", "Describe the image.", "Is it large?")
  named = [line["image"] for line in lines if isinstance(line.get("image"), str)]
  for i in range(24):
    pair = {"question": questions[i % 4], "chosen": answers[i % 6], "rejected": answers[(2 * i + 1) % 6]}
    if pair["chosen"] == pair["rejected"]:
      pair["rejected"] = answers[(2 * i + 2) % 6]
    yield {"image": named[i % len(named)], **pair} if i % 5 else pair


if __name__ == "__main__":
  app.run(main)
