"""Devices by the words of launchers."""

import pytest

from internvl_jax.from_script.devices import devices_of
from internvl_jax.from_script.stand_ins import Call

PROGRAM = "train.py --meta_path m"


@pytest.mark.parametrize(
  ("command", "devices"),
  [
    ("torchrun --nnodes=2 --nproc_per_node=8 {}", 16),
    ("torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 {}", 16),
    ("torchrun {}", 1),
    ("torchrun --nproc_per_node=gpu {}", None),
    ("torchrun --nnodes=1:4 --nproc_per_node=8 {}", None),
    ("python -m torch.distributed.launch --nproc_per_node=4 {}", 4),
    ("srun -p x -n 16 --ntasks-per-node=8 python -u {}", 16),
    ("srun -n16 python -u {}", 16),
    ("srun --nodes=2 --ntasks-per-node=8 python -u {}", 16),
    ("srun -N 2 --ntasks-per-node 8 python -u {}", 16),
    ("srun python {}", 1),
    ("srun --ntasks=2 torchrun --nnodes=2 --nproc_per_node=8 {}", 16),
    ("mpirun -np 8 python {}", 8),
    ("mpirun --hostfile h python {}", None),
    ("deepspeed --num_gpus 4 {}", 4),
    ("deepspeed --num_gpus=4 --num_nodes=2 {}", 8),
    ("deepspeed --include localhost:0,2,5 {}", 3),
    ("deepspeed --include=a:0,1@b:0,1 {}", 4),
    ("deepspeed --include a@b {}", None),
    ("deepspeed {}", None),
    ("accelerate launch --num_processes 4 {}", 4),
    ("accelerate launch {}", None),
    ("python {}", 1),
  ],
)
def test_devices(command, devices):
  *before, words = command.format(PROGRAM).partition("torchrun" if "torchrun" in command else "python")
  if not words:
    before, words = ["", command.split()[0]], command.format(PROGRAM).partition(" ")[2]
  call = Call(
    program=before[1],
    found=True,
    place="x.sh:1",
    folder="/",
    before=tuple(before[0].split()),
    cards="",
    words=tuple(words.split()),
  )
  assert devices_of(call) == devices
  if "srun python" in command:
    assert devices_of(call, tasks="16") == 16


def test_deepspeed_takes_the_cards_that_it_sees():
  call = Call(
    program="deepspeed", found=True, place="", folder="/", before=(), cards="0,1", words=("train.py",)
  )
  assert devices_of(call) == 2
