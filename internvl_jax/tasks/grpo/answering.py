"""The answers of a step: proposed by a decoder with a cache, and decided by the step's own forward pass.

    sampler -> tokens -> forward pass -> what it would have drawn -> the same: done
       ^                                              |
       +--- answers begin as the forward pass says ---+

Both draw by the same random numbers, so that they part only where rounding decides: in float32 hardly ever. Answers that
are decided so are samples of the model that trains, and their log-probabilities are the numbers of its step.

Letters: A micro-batches, R rows, S tokens of a row, G answers of a prompt, L the longest answer.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from internvl_jax.config import TrainConfig
from internvl_jax.parallel import batches
from internvl_jax.parallel.host_arrays import fetch
from internvl_jax.parallel.mesh import data_parallel_size, data_parts
from internvl_jax.tasks.grpo.batch import GrpoBatch, PromptBatch
from internvl_jax.tasks.grpo.draws import Draws
from internvl_jax.tasks.grpo.forward import AnswerForward, Told
from internvl_jax.tasks.grpo.objective import GroupRelativePolicy
from internvl_jax.tasks.grpo.rows import Answers, answer_rows, fitting_length
from internvl_jax.tasks.grpo.sampler import Given, Sampler, answered_at_once


class Sampled(NamedTuple):
  """The answers of all hosts to the prompts of a step, and what a checkpoint needs to have them again.

  Attributes:
    tokens: int32 [A, R, G, L].
    logps: float32 [A, R, G, L], log-probabilities of the tokens when they were sampled.
    old: float32 [A, R, G, L], the same by the step's forward pass; None where nobody asks.
    prompts: int32 [A, R], their indices; -1 where there is none.
    counts: what the log is told of how they came about.
  """

  tokens: np.ndarray
  logps: np.ndarray
  old: np.ndarray | None
  prompts: np.ndarray
  counts: Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Answering:
  """Answers prompts.

  Attributes:
    sampler: proposes.
    forward: decides, where it draws; else it only says how probable the answers are.
    scored: whether the latter is asked for.
    at_once: prompts that each device answers at once; None: all of a step's.
  """

  sampler: Sampler
  forward: AnswerForward
  scored: bool = False
  at_once: int | None = None

  @property
  def asks_forward(self) -> bool:
    """Whether the forward pass is asked at all."""
    return self.scored or self.forward.draws is not None

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices."""
    assert self.sampler.mesh is not None
    return self.sampler.mesh

  def __call__(self, params: Mapping[str, jax.Array], prompts: PromptBatch, step: int) -> Sampled:
    """The answers to this host's prompts and the others'.

    Args:
      params: all parameters by path.
      prompts: of this host.
      step: whose answers they are.
    """
    placed = batches.place_batch(prompts, self.mesh)
    propose = functools.partial(self._propose, params, placed, step)
    tell = functools.partial(self._tell, params, prompts, placed.index, step)
    sampled = propose(
      Given.nothing(*placed.index.shape, self.sampler.draws.generations, self.sampler.longest)
    )
    if not self.asks_forward:
      return sampled
    told = tell(sampled)
    if self.forward.draws is None:
      return sampled._replace(old=told.logps)
    given, parted = _decided(self.answers(sampled), told)
    redrawn, rounds = 0, 0
    # In each round, an answer that is not decided gets one more token that is.
    while parted and rounds < self.sampler.longest:
      redrawn, rounds = redrawn + parted, rounds + 1
      sampled = propose(given)
      told = tell(sampled)
      given, parted = _decided(self.answers(sampled), told)
    apart = np.abs(told.logps - sampled.logps)[_within(self.answers(sampled))]
    counts = {
      "rollout/decoder_difference": float(apart.mean()) if apart.size else 0.0,
      "rollout/redrawn_tokens": float(redrawn),
      "rollout/undecided_answers": float(parted),
    }
    return sampled._replace(logps=told.logps, old=told.logps, counts=counts)

  def answers(self, sampled: Sampled) -> Answers:
    """Where the answers of all hosts end."""
    return Answers.of(sampled.tokens, sampled.logps, sampled.prompts >= 0, self.sampler.stop_ids)

  def rows(self, prompts: PromptBatch, answers: Answers) -> GrpoBatch:
    """This host's rows, whose answers nothing is known of yet but their tokens.

    Args:
      prompts: of this host.
      answers: of all hosts.
    """
    length = fitting_length(prompts.rows.input_ids.shape[-1], answers.lengths, self.sampler.longest)
    own = Answers(*(field[:, self.own(prompts)] for field in answers))
    rows, nothing = answer_rows(prompts.rows, own, length), np.zeros(own.lengths.shape, np.float32)
    old = np.zeros_like(rows.sampled)
    return GrpoBatch(**rows._asdict(), advantages=nothing, present=nothing, kept=nothing, old=old)

  def own(self, prompts: PromptBatch) -> slice:
    """This host's rows among those of all."""
    fed, part = prompts.index.shape[1], data_parts(self.mesh)[jax.process_index()]
    return slice(part * fed, (part + 1) * fed)

  def _propose(
    self, params: Mapping[str, jax.Array], placed: PromptBatch, step: int, given: Given
  ) -> Sampled:
    """Answers by the sampler."""
    A, R = placed.index.shape
    each = answered_at_once(self.at_once, A, R // data_parallel_size(self.mesh))
    found = []
    for a in range(0, A, each):
      chosen = placed if each == A else jax.tree.map(lambda leaf, a=a: leaf[a : a + each], placed)
      found.append(self.sampler(params, chosen, step, Given(*(x[a : a + each] for x in given))))
    tokens, logps = (np.concatenate([fetch(part) for part in parts]) for parts in zip(*found, strict=True))
    return Sampled(tokens=tokens, logps=logps, old=None, prompts=fetch(placed.index), counts={})

  def _tell(
    self,
    params: Mapping[str, jax.Array],
    prompts: PromptBatch,
    index: jax.Array,
    step: int,
    sampled: Sampled,
  ) -> Told:
    """What the forward pass tells of all hosts' answers, as numpy arrays."""
    batch = batches.place_batch(self.rows(prompts, self.answers(sampled)), self.mesh)
    return Told(*map(fetch, self.forward(params, batch, index, step)))


def make_answering(
  config: TrainConfig,
  objective: GroupRelativePolicy,
  mesh: jax.sharding.Mesh | None,
  *,
  stop_ids: tuple[int, ...],
) -> Answering:
  """How a run answers prompts.

  Args:
    config: the run's.
    objective: what it minimizes.
    mesh: the devices.
    stop_ids: tokens that end an answer.
  """
  grpo = config.grpo
  draws = Draws(
    generations=grpo.num_generations, top_p=grpo.top_p, top_k=grpo.top_k, seed=config.training.seed
  )
  return Answering(
    sampler=Sampler(
      objective=objective,
      mesh=mesh,
      stop_ids=stop_ids,
      longest=grpo.max_completion_length,
      draws=draws,
      temperature=grpo.temperature,
    ),
    forward=AnswerForward(objective=objective, mesh=mesh, draws=draws if objective.exact else None),
    scored=grpo.num_iterations > 1,
    at_once=grpo.rollout_batch_size,
  )


def _decided(answers: Answers, told: Told) -> tuple[Given, int]:
  """How answers begin that the forward pass has looked at, and in how many it would have drawn another token.

  Of those, the first such token is the forward pass's, and what came after it is to be sampled anew.
  """
  apart = (answers.tokens != told.tokens) & _within(answers)
  first = np.where(apart.any(-1), apart.argmax(-1), answers.lengths - 1)
  L = answers.tokens.shape[-1]
  tokens = np.where(np.arange(L) == first[..., None], told.tokens, answers.tokens)
  return Given(tokens.astype(np.int32), (first + 1).astype(np.int32)), int(apart.any(-1).sum())


def _within(answers: Answers) -> np.ndarray:
  """Tokens [A, R, G, L] that are not behind their answer's end."""
  return np.arange(answers.tokens.shape[-1]) < answers.lengths[..., None]
