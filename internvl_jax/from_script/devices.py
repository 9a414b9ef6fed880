"""How many devices a launch takes, by the words of torchrun, srun, mpirun, deepspeed or accelerate."""

from collections.abc import Sequence

from internvl_jax.from_script.stand_ins import Call


def devices_of(call: Call, *, tasks: str | None = None) -> int | None:
  """The devices of a launch; None if its words leave them open.

  Args:
    call: of the launcher, with the program's own arguments, none of which has the name of a launcher's.
    tasks: how many the batch job has, of a script with #SBATCH lines.
  """
  words = call.words
  if call.program == "torchrun" or {"torch.distributed.run", "torch.distributed.launch"} & set(words):
    nodes, each = _number(words, "nnodes"), _number(words, "nproc_per_node")
    return _product(1 if nodes == _ABSENT else nodes, 1 if each == _ABSENT else each)
  if call.program == "deepspeed":
    return _of_deepspeed(words, call.cards)
  if call.program == "accelerate":
    number = _number(words, "num_processes")
    return None if number == _ABSENT else number
  return _of_wrappers(call.before, tasks)


_ABSENT = -1


def _number(words: Sequence[str], *names: str) -> int | None:
  """The number that an option has; None if it is another word, `_ABSENT` if it is not there."""
  found: int | None = _ABSENT
  for word, after in zip(words, [*words[1:], ""], strict=True):
    option, equals, value = word.partition("=")
    if option.startswith("-") and option.lstrip("-").replace("-", "_") in names:
      value = value if equals else after
      found = int(value) if value.isdigit() else None
    elif len(names) > 1 and word.startswith(f"-{names[1]}") and word[2:].isdigit():
      found = int(word[2:])
  return found


def _product(*numbers: int | None) -> int | None:
  result = 1
  for number in numbers:
    if number is None:
      return None
    result *= number
  return result


def _of_deepspeed(words: Sequence[str], cards: str) -> int | None:
  for word, after in zip(words, [*words[1:], ""], strict=True):
    option, equals, value = word.partition("=")
    if option in ("--include", "-i"):
      hosts = (value if equals else after).split("@")
      return sum(len(host.partition(":")[2].split(",")) for host in hosts) if ":" in hosts[0] else None
  each, nodes = _number(words, "num_gpus"), _number(words, "num_nodes")
  if each == _ABSENT:
    return len(cards.split(",")) if cards and nodes == _ABSENT else None
  return _product(each, 1 if nodes == _ABSENT else nodes)


def _of_wrappers(before: Sequence[str], job: str | None) -> int | None:
  """Tasks of srun, processes of mpirun; 1 where Python is started alone."""
  if "srun" in before:
    tasks, nodes, each = (
      _number(before, *names) for names in (("ntasks", "n"), ("nodes", "N"), ("ntasks_per_node",))
    )
    if tasks != _ABSENT:
      return tasks
    if nodes == each == _ABSENT and job is not None:
      return int(job) if job.isdigit() else None
    return _product(1 if nodes == _ABSENT else nodes, 1 if each == _ABSENT else each)
  number = _number(before, "np", "n") if {"mpirun", "mpiexec"} & set(before) else 1
  return None if number == _ABSENT else number
