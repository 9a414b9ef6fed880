"""Commands in the README and in docs/ are commands that there are, and some test runs each of their programs."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from internvl_jax.config import FIELDS
from internvl_jax.recipe_files import load_recipe, recipe_names
from tests.support import forked
from tests.support.scripts import load
from tests.support.toy import CURVE, REPOSITORY

PAGES = [
  REPOSITORY / "README.md",
  REPOSITORY / "CONTRIBUTING.md",
  *sorted((REPOSITORY / "docs").glob("*.md")),
]

RUN_BY = {
  "internvl_jax.train": "tests/runs/test_run.py",
  "internvl_jax.doctor": "tests/test_doctor.py",
  "internvl_jax.plan": "tests/aot/test_plan.py",
  "internvl_jax.evaluate": "tests/runs/test_evaluations.py",
  "internvl_jax.generate": "tests/test_docs.py",
  "internvl_jax.from_script": "tests/from_script/test_command.py",
  "internvl_jax.report": "tests/reporting/test_report.py",
  "internvl_jax.convert": "tests/hf/test_convert.py",
  "internvl_jax.verify": "tests/hf/test_parity.py",
  "internvl_jax.certify": "tests/certify/test_command.py",
  "internvl_jax.integrations.vlmevalkit": "tests/test_integrations.py",
  "benchmarks/bench_balance.py": "tests/benchmarks/test_bench_balance.py",
  "benchmarks/bench_forms.py": "tests/benchmarks/test_bench_forms.py",
  "benchmarks/bench_compile.py": "tests/test_docs.py",
  "benchmarks/bench_data.py": "tests/benchmarks/test_bench_data.py",
  "benchmarks/bench_host_memory.py": "tests/benchmarks/test_bench_host_memory.py",
  "benchmarks/decoding.py": "tests/benchmarks/test_bench_decoding.py",
  "benchmarks/forgetting.py": "tests/benchmarks/test_forgetting.py",
  "benchmarks/golden.py": "tests/test_docs.py",
  "benchmarks/gpu.py": "tests/benchmarks/test_bench_gpu.py",
  "benchmarks/memory.py": "tests/runs/test_memory.py",
  "benchmarks/mutants.py": "tests/test_docs.py",
  "benchmarks/scale.py": "tests/benchmarks/test_scale.py",
  "benchmarks/scale_programs.py": "tests/benchmarks/test_scale.py",
  "benchmarks/step.py": "tests/benchmarks/test_bench_step.py",
  "scripts/ask_server.py": "tests/test_ask_server.py",
  "scripts/count_flops.py": "tests/test_docs.py",
  "scripts/plan_recipes.py": "tests/aot/test_plan_recipes.py",
  "scripts/plan_table.py": "tests/aot/test_plan_table.py",
  "scripts/quickstart_data.py": "tests/test_docs.py",
  "scripts/quickstart_picture.py": "tests/test_docs.py",
  "scripts/record_families.py": "tests/test_docs.py",
  "scripts/record_hlo.py": "tests/test_docs.py",
  "scripts/served_table.py": "tests/hf/test_served.py",
  "scripts/server_toy.py": "tests/test_server_toy.py",
  "scripts/quickstart.sh": "tests/test_docs.py",
  "scripts/quickstart_mpo.sh": "tests/test_docs.py",
  "scripts/quickstart_distill.sh": "tests/test_docs.py",
  "scripts/quickstart_grpo.sh": "tests/test_docs.py",
  "scripts/quickstart_grpo_picture.py": "tests/test_docs.py",
  "scripts/quickstart_flash.sh": "tests/test_docs.py",
  "scripts/test.sh": "tests/test_docs.py",
  "scripts/launch/local.sh": "tests/runs/test_hosts.py",
  "scripts/launch/supervised.sh": "tests/runs/test_hosts.py",
  "scripts/launch/tpu_pod.sh": "tests/test_docs.py",
  "scripts/launch/slurm.sbatch": "tests/test_docs.py",
}
"""Program in a page -> the test that runs it; those by this file are run, imported or parsed below."""

ELSEWHERE = (
  "git",
  "cd",
  "export",
  "pip",
  "pre-commit",
  "pytest",
  "sphinx-build",
  "xpk",
  "docker",
  "vllm",
  "transformers",
  "lmdeploy",
  "sglang.launch_server",
  "lmms_eval",
  "python3",
  ".",
  "mpirun",
  "torchrun",
)
"""Programs of others, or that the gate itself runs."""

# In the pages' own examples: files that a reader has.
OWN = re.compile(r"(.*/)?(my_\w+|RECIPE|FILE)\.(py|json)|F|\.\.\.")

_FENCE = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(
  r"^ {4}((?:[A-Z_]+=\S+ )*(?:python|bash|scripts/|sbatch|pytest|torchrun|mpirun|xpk|pip)\b(?:.*\\\n)*.*)",
  re.M,
)
_INLINE = re.compile(
  r"`((?:python -m internvl_jax\.|python scripts/|python benchmarks/|pytest |bash scripts/)[^`]+)`"
)


class Command(NamedTuple):
  """A command line of a page, without the variables before it."""

  page: str
  words: tuple[str, ...]

  def __str__(self) -> str:
    return f"{self.page}: {' '.join(self.words)}"

  @property
  def program(self) -> str:
    words = self.words
    if words[0] in ("bash", "sbatch"):
      return next(word for word in words[1:] if not word.startswith("-"))
    if words[0] != "python":
      return words[0]
    return words[2] if words[1] == "-m" else words[1]


def commands_of(page: Path) -> list[Command]:
  text = page.read_text(encoding="utf-8")
  blocks = [*_FENCE.findall(text), *_INDENTED.findall(text), *_INLINE.findall(text)]
  found = []
  for block in blocks:
    for line in block.replace("\\\n", " ").splitlines():
      for part in re.split(r" && |; (?=do|done|break)", line.partition("   #")[0].partition("  # ")[0]):
        if words := shlex.split(
          part.replace("[", "").replace("]", "") if "|" in part else part, comments=True
        ):
          while "=" in words[0]:
            del words[0]
          found.append(Command(page.name, tuple(words)))
  return found


def file_of(program: str) -> Path:
  """The file that runs: of `python -m`, the module's or, of a package, its `__main__.py`."""
  if not program.startswith("internvl_jax."):
    return REPOSITORY / program
  path = REPOSITORY / program.replace(".", "/")
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


COMMANDS = [command for page in PAGES for command in commands_of(page)]
OURS = [command for command in COMMANDS if command.program not in ELSEWHERE]


def test_commands_are_found():
  assert len(OURS) > 60
  assert {command.page for command in COMMANDS} >= {"README.md", "CONTRIBUTING.md", "training.md", "data.md"}


@pytest.mark.parametrize("command", OURS, ids=str)
def test_the_program_is_there_and_run_by_a_test(command):
  program = command.program
  assert program in RUN_BY, "name the test that runs it"
  module = file_of(program)
  assert module.is_file()
  test = (REPOSITORY / RUN_BY[program]).read_text(encoding="utf-8")
  assert Path(program).stem.removeprefix("internvl_jax.") in test


@pytest.mark.parametrize(
  "command", [c for c in OURS if c.program.endswith((".py",)) or "internvl_jax" in c.program], ids=str
)
def test_flags_are_those_of_the_program(command):
  program = command.program
  module = file_of(program)
  source = module.read_text(encoding="utf-8")
  words = command.words[: command.words.index("--")] if "--" in command.words else command.words
  for word in words:
    if word.startswith("--config."):
      name = word.removeprefix("--config.").partition("=")[0]
      assert name in FIELDS, f"there is no field {name}"
    elif word.startswith("--"):
      name = word.removeprefix("--").partition("=")[0]
      known = {"help", "helpfull", "config", "print_config"}
      assert name in known or f'"{name}"' in source or f'"--{name}"' in source, f"there is no flag --{name}"


def test_recipes_are_there():
  named = [
    value
    for command in COMMANDS
    for word, after in zip(command.words, (*command.words[1:], ""), strict=True)
    for value in (
      [after] if word == "--config" else [word.partition("=")[2]] if word.startswith("--config=") else []
    )
  ]
  assert len(named) > 10
  for value in {value for value in named if not OWN.fullmatch(value)}:
    assert value.partition(":")[0] in recipe_names(), value
    load_recipe(value)


def test_tests_and_extras_are_there():
  extras = re.findall(r"^([\w-]+) = \[", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M)
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\btests/[\w/]+\.py\b", text):
      assert (REPOSITORY / path).is_file(), f"{page.name}: {path}"
    for listed in re.findall(r"(?:'\.|internvl_jax)\[([\w,-]+)\]", text):
      assert set(listed.split(",")) <= set(extras), f"{page.name}: {listed}"


def test_the_architecture_names_every_package():
  text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
  packages = sorted(path.parent.name for path in (REPOSITORY / "internvl_jax").glob("*/__init__.py"))
  assert len(packages) > 10
  assert [name for name in packages if f"`{name}/" not in text] == []


@pytest.mark.parametrize(
  "words",
  [
    "memory of a device",
    "largest temporaries at the peak",
    "operations of a device and step",
    "of a device and step",
    "a step takes",
  ],
)
def test_the_report_that_is_explained_is_the_one_that_plan_prints(words):
  for path in ("docs/scale.md", "internvl_jax/aot/report.py"):
    assert words in (REPOSITORY / path).read_text(encoding="utf-8"), path


# --- What no other test runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "script",
  [
    "count_flops.py",
    "quickstart_data.py",
    "quickstart_picture.py",
    "quickstart_grpo_picture.py",
    "record_families.py",
    "record_hlo.py",
    "record_decay.py",
    "record_policy_losses.py",
    "record_optimizers.py",
    "record_bitsandbytes.py",
  ],
)
def test_scripts_are_imported(script):
  """What they import is there; most need PyTorch, a package of data, or minutes to do their work."""
  if script in ("record_families.py", "record_decay.py"):
    pytest.importorskip("torch")
  if script == "record_policy_losses.py":
    pytest.importorskip("trl")
  if script == "record_bitsandbytes.py":
    pytest.importorskip("bitsandbytes")
  if script == "quickstart_data.py":
    pytest.importorskip("easy_vqa")
  assert callable(load(REPOSITORY / "scripts" / script).main)


def test_bench_compile_compiles_the_step():
  assert (
    len(jax.devices()) > 1
  )  # Before the benchmark asks for one, which other tests of this process would then get.
  benchmark = load(REPOSITORY / "benchmarks/bench_compile.py")
  assert benchmark.compile_seconds(depth=1, width=64) > 0


@pytest.mark.parametrize("benchmark", ["golden", "plan_revisions", "memory", "checkpoint", "mutants"])
def test_benchmarks_are_imported(benchmark):
  assert callable(load(REPOSITORY / "benchmarks" / f"{benchmark}.py").main)


@pytest.mark.parametrize(
  "script",
  sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "scripts").rglob("*.s[hb]*")),
)
def test_shell_scripts_are_parsed(script):
  """`quickstart.sh`, `tpu_pod.sh`, `slurm.sbatch` and others: installing, a pod and Slurm are not for the gate."""
  done = subprocess.run(["bash", "-n", str(REPOSITORY / script)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_generate_answers(tmp_path):
  image = next((CURVE / "data/images").iterdir())
  arguments = [f"--model={CURVE / 'init'}", f"--image={image}", "--question=what?", "--max_new_tokens=2"]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  done = forked.run(["-m", "internvl_jax.generate", *arguments], environment=environment, folder=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()
