"""Launch scripts in the shape of the published ones, written from the arguments that were recorded of those."""

import gzip
import json
import shlex
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"

# The 117 launch scripts of OpenGVLab/InternVL at 2410d1d as data: path under shell/ -> the numbers of the launch, and
# the arguments as the script writes them. `output_dir` has the script's variables filled in.
SCRIPTS = json.loads(gzip.decompress((ASSETS / "launch_scripts.json.gz").read_bytes()))

LORA = "internvl2.5/2nd_finetune/internvl2_5_8b_dynamic_res_2nd_finetune_lora"
FULL = "internvl2.5/2nd_finetune/internvl2_5_8b_dynamic_res_2nd_finetune_full"
SFT_3_5 = "internvl3_5_qwen3/internvl3_5_8b_sft"

_SRUN = """\
srun -p ${PARTITION:-"INTERN"} \\
  --nodes=$((GPUS / 8)) \\
  --ntasks=${GPUS} \\
  --ntasks-per-node=8 \\
  python -u internvl/train/PROGRAM.py \\
"""
_TORCHRUN = """\
torchrun \\
  --nnodes=NODES \\
  --nproc_per_node=${GPUS} \\
  --master_port=${MASTER_PORT} \\
  internvl/train/PROGRAM.py \\
"""


def script_of(name, launcher=""):
  """A launch script that says what a published one says.

  Args:
    name: of the published one, in `SCRIPTS`.
    launcher: the lines that start the program, which `PROGRAM` stands for; torchrun's or srun's if empty.
  """
  script = SCRIPTS[name]
  numbers = dict(script["launch"])
  over_nodes = "NPROC_PER_NODE" in numbers
  if over_nodes:
    numbers["GPUS"] = numbers.pop("NPROC_PER_NODE")
  launcher = launcher or (_SRUN if numbers.get("GPUS", 8) > 8 else _TORCHRUN)
  program = "internvl_chat_mpo" if "mpo" in name else "internvl_chat_finetune"
  arguments = dict(script["arguments"]) | {"output_dir": "${OUTPUT_DIR}"}
  divisor = "GPUS / WORLD_SIZE" if over_nodes else "GPUS"
  lines = ["set -x", ""]
  lines += [f"{key}=${{{key}:-{value}}}" for key, value in numbers.items()]
  if arguments["gradient_accumulation_steps"].startswith("BATCH_SIZE"):
    lines.append(f"GRADIENT_ACC=$((BATCH_SIZE / PER_DEVICE_BATCH_SIZE / {divisor}))")
    arguments["gradient_accumulation_steps"] = "${GRADIENT_ACC}"
    arguments["per_device_train_batch_size"] = "${PER_DEVICE_BATCH_SIZE}"
  lines += ["", 'export PYTHONPATH="${PYTHONPATH}:$(pwd)"', "export MASTER_PORT=34229", ""]
  lines += [f"OUTPUT_DIR={shlex.quote(script['arguments']['output_dir'])}", ""]
  lines += ['if [ ! -d "$OUTPUT_DIR" ]; then', '  mkdir -p "$OUTPUT_DIR"', "fi", ""]
  start = launcher.replace("PROGRAM", program).replace("NODES", "${WORLD_SIZE}" if over_nodes else "1")
  given = [
    f'  --{key} "{value}" \\' if value[:1] != "$" else f"  --{key} {value} \\"
    for key, value in arguments.items()
  ]
  return "\n".join(
    [*lines, start.rstrip("\n"), *given, '  2>&1 | tee -a "${OUTPUT_DIR}/training_log.txt"', ""]
  )
