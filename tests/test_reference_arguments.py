"""Arguments are read by HfArgumentParser's rules."""

import argparse

import pytest

from internvl_jax.config import FIELDS
from internvl_jax.foreign import FOREIGN, SAME_AS
from internvl_jax.reference_arguments import PATHS, Foreign, is_argument, left_out_of, parse


def test_values_have_the_types_of_their_fields():
  words = """--model_name_or_path m --freeze_llm True --freeze_mlp no --freeze_backbone --use_llm_lora=16 --learning_rate 1e-5
    --num_train_epochs 1 --max_steps -1 --vision_select_layer=-1 --save_total_limit 3 --ps_version v1 --lr-scheduler-type cosine
    --no_grad_checkpoint --report_to tensorboard wandb --loss_weights 0.8 0.2 --rpo_alpha None --save_strategy ''"""
  given = parse([word.strip("'") for word in words.split()])
  assert given.problems == [] and given.foreign == []
  assert {path.partition(".")[2]: value for path, value in given.values.items()} == {
    "model_name_or_path": "m",
    "freeze_llm": True,
    "freeze_mlp": False,
    "freeze_backbone": True,
    "use_llm_lora": 16,
    "learning_rate": 1e-5,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "vision_select_layer": -1,
    "save_total_limit": 3,
    "ps_version": "v1",
    "lr_scheduler_type": "cosine",
    "grad_checkpoint": False,
    "report_to": "tensorboard,wandb",
    "loss_weights": (0.8, 0.2),
    "rpo_alpha": None,
    "save_strategy": "",
  }
  assert all(type(given.values[PATHS[name]]) is float for name in ("learning_rate", "num_train_epochs"))


def test_the_last_of_several_values_counts_and_beginnings_are_enough():
  assert parse(["--seed", "1", "--seed", "2", "--learning_r", "1"]).values == {
    "training.seed": 2,
    "training.learning_rate": 1.0,
  }
  (problem,) = parse(["--save", "1"]).problems  # save_steps, save_strategy and others begin so.
  assert problem[1].startswith("--save is no argument of the reference's programs")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--seed x", "--seed x must be int"),
    ("--seed 1.5", "--seed 1.5 must be int"),
    ("--seed", "--seed has no value; it must be int"),
    ("--learning_rate 1e-5,", "--learning_rate 1e-5, must be float"),
    ("--freeze_llm maybe", "--freeze_llm maybe must be bool"),
    ("--freeze_llm True False", "--freeze_llm has one value, but there are True False"),
    ("--ps_version v3", "--ps_version v3 must be 'v1' or 'v2'"),
    ("stray --seed 1", "'stray' is no argument, and the value of none"),
    ("-x 1", "'-x' is no argument"),
    ("--frieze_llm True", "--frieze_llm is no argument of the reference's programs; did you mean freeze_llm?"),
    ("nowhere.json", "nowhere.json: cannot be read as JSON"),
  ],
)  # fmt: skip
def test_what_a_program_would_refuse(words, message):
  assert parse(words.split()).problems[0][1].startswith(message)


def test_all_problems_are_told():
  assert len(parse(["--seed", "x", "--frieze_llm", "True", "--learning_rate"]).problems) == 3


def test_booleans_are_argparses_own():
  """Nothing that argparse takes for the value of an option is taken for another option here, and the reverse."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--max_steps", type=int)
  parser.add_argument("--bf16", nargs="?", const=True)
  assert vars(parser.parse_args(["--max_steps", "-1", "--bf16"])) == {"max_steps": -1, "bf16": True}
  assert parse(["--max_steps", "-1", "--bf16"]).values == {"training.max_steps": -1, "training.bf16": True}


def test_a_json_file(tmp_path):
  file = tmp_path / "arguments.json"
  file.write_text(
    '{"freeze_llm": true, "seed": 7, "meta_path": "m", "report_to": ["none"], "rpo_alpha": null, "sed": 1}'
  )
  given = parse([str(file)])
  assert given.values == {
    "model.freeze_llm": True,
    "training.seed": 7,
    "data.meta_path": "m",
    "training.report_to": "none",
    "preference.rpo_alpha": None,
  }
  assert [name for name, _ in given.problems] == ["sed"]
  file.write_text("[1]")
  assert "must hold a JSON object" in parse([str(file)]).problems[0][1]


def test_what_no_field_has_is_said_or_lost():
  given = parse(
    [
      "--log_level",
      "info",
      "--tf32",
      "False",
      "--neftune_noise_alpha",
      "5",
      "--hub_token",
      "hf_x",
      "--deepspeed",
      "z.json",
    ]
  )
  assert given.foreign[0] == Foreign(
    name="log_level", value="info", changes_nothing=True, why="--verbosity=1 tells more, --verbosity=-1 less"
  )
  left, lost = left_out_of(given)
  assert list(left) == ["--log_level info", "--deepspeed z.json"]
  assert list(lost) == ["--neftune_noise_alpha 5", "--hub_token ***"]


def test_every_argument_is_known():
  assert all(is_argument(name) for name in ("meta_path", "split_annotations", "rpo_alpha", "fsdp"))
  assert not any(map(is_argument, ("fsdb", "scan_unroll", "expert")))
  own = {name: path for name, path in PATHS.items() if name not in SAME_AS}
  assert len(own) == len(set(own.values())) < len(FIELDS)


def test_other_trainers_names_are_those_of_fields():
  given = parse(["--vit_lr", "1e-5", "--mm_projector_lr=2e-4"])
  assert given.values == {"training.vision_lr": 1e-5, "training.projector_lr": 2e-4} and not given.problems
  assert set(SAME_AS.values()) <= set(FIELDS) and not SAME_AS.keys() & FOREIGN.keys()
