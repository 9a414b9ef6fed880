"""Agreement of the processes of a run: what must be equal on all of them is compared before it matters.

Hosts that were started with another learning rate, or that see another file, would train together without a word. Each
process writes what it has to the coordinator's store, the first one compares, and all of them end if there is a difference.
"""

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from internvl_jax.parallel.distributed import DisagreementError, barrier, is_first, key_value_store

VERDICT_SECONDS = 60
"""How long processes wait for the first one to compare: it has what all have said at hand."""

_SHOWN = 3
_SHOWN_PROCESSES = 4
_SHOWN_CHARACTERS = 80


class Said(NamedTuple):
  """What a process has.

  Attributes:
    host: its name.
    facts: JSON values by what names them in messages.
  """

  host: str
  facts: Mapping[str, Any]


def agree(what: str, facts: Callable[[], Mapping[str, Any]], *, seconds: int) -> None:
  """Compares facts over all processes, each of which calls this; a barrier at the same time.

  Args:
    what: names this comparison; used once in a run.
    facts: makes the JSON values to be compared, by their names. A process that is alone is not asked. What must not be
      printed must not be among them.
    seconds: how long to wait for the last process.

  Raises:
    DisagreementError: they differ; in all processes, with the same words.
    UserError: not all processes came in time.
  """
  if jax.process_count() == 1:
    return
  store = key_value_store()
  said = json.dumps([socket.gethostname(), dict(facts())], sort_keys=True)
  store.key_value_set(f"internvl_jax:{what}:{jax.process_index()}", said)
  barrier(what, seconds=seconds)
  verdict = f"internvl_jax:{what}:verdict"
  if is_first():
    texts = [
      store.blocking_key_value_get(f"internvl_jax:{what}:{process}", VERDICT_SECONDS * 1000)
      for process in range(jax.process_count())
    ]
    store.key_value_set(verdict, json.dumps(difference([Said(*json.loads(text)) for text in texts])))
  line = json.loads(store.blocking_key_value_get(verdict, VERDICT_SECONDS * 1000))
  if line is not None:
    raise DisagreementError(line)


def difference(everyone: Sequence[Said]) -> str | None:
  """One line that names what differs, the values and who has them; None if nothing does.

      >>> difference([Said("a", {"training.seed": 1}), Said("b", {"training.seed": 2})])
      'the processes of this run have different settings or files: training.seed is 1 on a (process 0), 2 on b ...'

  Args:
    everyone: what each process has, in their order.
  """
  names = dict.fromkeys(name for said in everyone for name in said.facts)
  differing = [
    name for name in names if len({json.dumps(said.facts.get(name), sort_keys=True) for said in everyone}) > 1
  ]
  if not differing:
    return None
  parts = [f"{name} is {_values(name, everyone)}" for name in differing[:_SHOWN]]
  if rest := differing[_SHOWN:]:
    named = ", ".join(rest[:20]) + (", ..." if len(rest) > 20 else "")
    parts.append(f"and {len(rest)} more differ ({named})")
  return (
    f"the processes of this run have different settings or files: {'; '.join(parts)}; start the same command, with the "
    "same files and versions, on all hosts"
  )


def _values(name: str, everyone: Sequence[Said]) -> str:
  """Each value with the processes that have it, the most frequent first."""
  groups: dict[str, list[str]] = {}
  for process, said in enumerate(everyone):
    value = json.dumps(said.facts[name], ensure_ascii=False) if name in said.facts else "missing"
    groups.setdefault(value, []).append(f"{said.host} (process {process})")
  ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
  shown = [f"{_short(value)} on {_listed(processes)}" for value, processes in ranked[:_SHOWN]]
  return ", ".join(shown) + (f", and {len(ranked) - _SHOWN} more values" if len(ranked) > _SHOWN else "")


def _listed(processes: list[str]) -> str:
  rest = len(processes) - _SHOWN_PROCESSES
  return ", ".join(processes[:_SHOWN_PROCESSES]) + (f" and {rest} more" if rest > 0 else "")


def _short(value: str) -> str:
  return value if len(value) <= _SHOWN_CHARACTERS else value[:_SHOWN_CHARACTERS] + "..."
