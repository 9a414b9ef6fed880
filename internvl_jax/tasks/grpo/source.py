"""Where batches come from: prompts of the data, answers that the policy gives them, and what these are worth.

    loader -> prompts -> answers (on the devices) -> rewards (on the host that has the rows) -> advantages -> rows

Letters: A micro-batches, R rows, S tokens of a row, G answers of a prompt, L the longest answer, F rewards.
"""

import base64
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.media import described
from internvl_jax.errors import UserError
from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.eval.questions import question_of, right_answers
from internvl_jax.eval.shown import Shown
from internvl_jax.losses import policy
from internvl_jax.parallel import batches
from internvl_jax.parallel.host_arrays import fetch
from internvl_jax.task_arguments import GrpoConfig
from internvl_jax.tasks.grpo import rewards as reward_functions
from internvl_jax.tasks.grpo.answering import Answering, Sampled
from internvl_jax.tasks.grpo.batch import GrpoBatch, PromptBatch, RewardBatch
from internvl_jax.tasks.grpo.rewards import Completion, Reward
from internvl_jax.tasks.grpo.rows import Answers, longest_row, row_lengths

_REMEMBERED = 8
"""Steps whose answers can still be shown: devices are a step or two behind."""


class _Rollout(NamedTuple):
  """The answers of a step, and what was found out about them.

  Attributes:
    batch: this host's.
    metrics: of all hosts, by their names in the log.
    shown: answers to be looked at.
    sampled: of all hosts, by which a checkpoint makes the batch again without the weights that sampled it.
  """

  batch: GrpoBatch
  metrics: dict[str, float]
  shown: list[Shown]
  sampled: Sampled


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
  """What a source of rollouts is made of.

  Attributes:
    grpo: the settings.
    chat: the tokenizer.
    answering: answers prompts.
    rewards: score answers.
  """

  grpo: GrpoConfig
  chat: ChatTokenizer
  answering: Answering
  rewards: tuple[Reward, ...]


class RolloutSource:
  """Samples answers to the prompts of a loader; a `trainer.BatchSource`, and in all else its loader.

  Each batch is learned from in `grpo.num_iterations` steps. A step's answers depend on the weights before the first of
  these, on the prompts, and on seed and step: they are sampled again after a restart, bit for bit. A checkpoint between
  these steps holds the answers, since the weights that sampled them are gone.

  Attributes:
    prompts: the loader.
  """

  def __init__(self, prompts: TrainLoader, parts: Parts, max_steps: int):
    """Opens it.

    Args:
      prompts: at the first batch.
      parts: what it samples and scores with.
      max_steps: the run's, or -1 where epochs say how long it is.
    """
    self.prompts, self._parts, self._max_steps = prompts, parts, max_steps
    self._iterations = parts.grpo.num_iterations
    self._taken, self._left = 0, 0
    self._rollout: _Rollout | None = None
    self._before: dict[str, Any] | None = None
    self._restored: Sampled | None = None
    self._shown: dict[int, list[Shown]] = {}

  def __getattr__(self, name: str) -> Any:
    """All else is the loader's."""
    return getattr(self.prompts, name)

  @property
  def total_steps(self) -> int:
    """Optimizer steps of the run."""
    return self._max_steps if self._max_steps > 0 else self.prompts.total_steps * self._iterations

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps that see all prompts, rounded up."""
    return self.prompts.steps_per_epoch * self._iterations

  @property
  def sequence_sizes(self) -> tuple[int, ...]:
    """Lengths of the rows that batches may have, and of prompts."""
    grpo = self._parts.grpo
    sizes = self.prompts.sequence_sizes
    rows = {n for size in sizes for n in row_lengths(size, grpo.num_generations, grpo.max_completion_length)}
    return tuple(sorted({*sizes, *rows}))

  def next_sizes(self) -> dict[str, int]:
    """Sizes of the next batch's axes, by their letters, if its answers are long."""
    sizes, grpo = self.prompts.next_sizes(), self._parts.grpo
    return {**sizes, "S": longest_row(sizes["S"], grpo.num_generations, grpo.max_completion_length)}

  def epoch_of(self, step: int) -> float:
    """How many times the prompts have been seen after `step` optimizer steps."""
    return self.prompts.epoch_of(-(-step // self._iterations))

  def batch_samples(self, step: int) -> str:
    """The prompts of the batch that took the run from `step` to the next."""
    return self.prompts.batch_samples(step // self._iterations)

  # --- Batches ----------------------------------------------------------------------------------------------

  def next(self, params: Mapping[str, jax.Array]) -> GrpoBatch:
    """The next step's batch: new answers, or those of the step before once more."""
    if not self._left:
      # Asked of all hosts together, and only where a checkpoint may have to go back to it.
      self._before = self.prompts.get_state() if self._iterations > 1 else None
      self._rollout = self._roll_out(params, self.prompts.next(params))
      self._left = self._iterations
    assert self._rollout is not None
    self._left, self._taken = self._left - 1, self._taken + 1
    self._shown = {**self._shown, self._taken: self._rollout.shown}
    self._shown.pop(self._taken - _REMEMBERED, None)
    return self._rollout.batch

  def prefetch(self) -> None:
    """Decodes the next prompts."""
    if not self._left:
      self.prompts.prefetch()

  def metrics(self) -> dict[str, float]:
    """What there is to tell of the answers that were handed out last, under TRL's names."""
    return {} if self._rollout is None else self._rollout.metrics

  def shown(self, step: int) -> list[Shown]:
    """Answers to the first prompts of a step, counted from 1; empty where that was too long ago."""
    return self._shown.get(step, [])

  def _roll_out(self, params: Mapping[str, jax.Array], prompts: PromptBatch) -> _Rollout:
    """Samples answers, or takes those of a checkpoint; scores them and makes rows."""
    start, sampled = time.perf_counter(), self._restored
    self._restored = None
    if sampled is None:
      sampled = self._parts.answering(params, prompts, self._taken)
    elif not np.array_equal(
      sampled.prompts, fetch(batches.place_batch(prompts, self._parts.answering.mesh).index)
    ):
      raise UserError("the newest checkpoint has answers to other prompts; begin anew")
    sampled_in = time.perf_counter() - start
    rollout = self._judge(prompts, sampled)
    return rollout._replace(metrics={**rollout.metrics, **sampled.counts, "rollout/seconds": sampled_in})

  def _judge(self, prompts: PromptBatch, sampled: Sampled) -> _Rollout:
    """Scores the answers and makes rows of them."""
    grpo, answering = self._parts.grpo, self._parts.answering
    answers, mine = answering.answers(sampled), answering.own(prompts)
    scored = self._rewarded(prompts, Answers(*(field[:, mine] for field in answers)))
    values = fetch(batches.place_batch(RewardBatch(scored.values), answering.mesh).rewards)
    rewards = reward_functions.weighted_sum(values.reshape(-1, values.shape[-1]), grpo.reward_weights)
    rewards = rewards.reshape(values.shape[:-1])
    real = sampled.prompts >= 0
    groups = policy.group_advantages(rewards[real], grpo.scale_rewards)
    advantages = np.zeros(rewards.shape, np.float32)
    advantages[real] = groups.values
    present = np.broadcast_to(real[..., None], rewards.shape)
    kept = present & (answers.ended | (not grpo.mask_truncated_completions))
    batch = answering.rows(prompts, answers)._replace(
      advantages=advantages[:, mine],
      present=present[:, mine].astype(np.float32),
      kept=kept[:, mine].astype(np.float32),
    )
    if self._iterations > 1:
      assert sampled.old is not None
      old = answering.rows(prompts, answers._replace(logps=sampled.old)).sampled
      batch = batch._replace(old=old)
    metrics = self._metrics(values[real], rewards[real], groups.degenerate, answers, real)
    return _Rollout(batch, metrics, scored.shown, sampled)

  def _rewarded(self, prompts: PromptBatch, answers: Answers) -> "_Scored":
    """The rewards [A, R, G, F] of this host's answers, and some of the answers to be looked at."""
    places = [(a, r) for a, r in np.argwhere(prompts.index >= 0).tolist()]
    completions = [
      one for a, r in places for one in self._completions(int(prompts.index[a, r]), answers, a, r)
    ]
    values = np.full((*answers.lengths.shape, len(self._parts.rewards)), np.nan, np.float32)
    if completions:
      found = reward_functions.rewards_of(self._parts.rewards, completions)
      for (a, r), group in zip(places, np.split(found, len(places)), strict=True):
        values[a, r] = group
    most = self._parts.grpo.num_completions_to_print * self._parts.grpo.num_generations
    labels = [reward.label for reward in self._parts.rewards]
    flat = values[tuple(np.array(places).T)].reshape(-1, len(labels)) if places else values[:0]
    shown = [_shown(one, labels, scores) for one, scores in zip(completions[:most], flat, strict=False)]
    return _Scored(values, shown)

  def _completions(self, index: int, answers: Answers, a: int, r: int) -> list[Completion]:
    """The answers to a prompt, with what its line says is right."""
    chat, where = self._parts.chat, self.prompts.where(index)
    record, plain = self.prompts.record(index)
    *before, last = plain["conversations"]
    found = []
    for tokens, length, ended in zip(
      answers.tokens[a, r], answers.lengths[a, r], answers.ended[a, r], strict=True
    ):
      ids = tokens[: length - int(ended)]
      answered = Answered(
        prediction=chat.decode_answer(ids).strip(),
        answers=right_answers(record, last["value"], where),
        question=question_of(before),
        record=described(record),
        spellings=(last["value"],),
      )
      found.append(Completion(answered=answered, ids=tuple(tokens[:length].tolist())))
    return found

  def _metrics(
    self, values: np.ndarray, rewards: np.ndarray, degenerate: np.ndarray, answers: Answers, real: np.ndarray
  ) -> dict[str, float]:
    """What TRL logs of answers, under its names.

    Args:
      values: float [N, G, F], of all hosts' prompts.
      rewards: float [N, G], their weighted sums.
      degenerate: bool [N].
      answers: of all hosts.
      real: bool [A, R], rows that have a prompt.
    """
    lengths, ended = answers.lengths[real], answers.ended[real]
    told = {
      "reward": _mean(rewards),
      "reward_std": _mean(np.std(rewards, axis=1, ddof=1)),
      "frac_reward_zero_std": _mean(degenerate),
      "completions/mean_length": _mean(lengths),
      "completions/clipped_ratio": _mean(~ended),
    }
    for reward, of_one in zip(self._parts.rewards, np.moveaxis(values, -1, 0), strict=True):
      known = of_one[~np.isnan(of_one)]
      told[f"rewards/{reward.label}/mean"] = _mean(known)
      told[f"rewards/{reward.label}/std"] = float(np.std(known, ddof=1)) if known.size > 1 else 0.0
    return told

  # --- State ------------------------------------------------------------------------------------------------

  def get_state(self) -> dict[str, Any]:
    """What a later source needs to go on after the last batch handed out; JSON-able. All hosts call it together."""
    if not self._left:
      return {**self.prompts.get_state(), "steps": self._taken}
    assert self._before is not None and self._rollout is not None
    arrays = self._rollout.sampled._asdict()
    told = {"counts": dict(arrays.pop("counts"))}
    saved = {name: _packed(array) for name, array in arrays.items()}
    return {**self._before, "steps": self._taken, "left": self._left, "answers": saved, **told}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where an earlier source said `get_state`; before the first batch.

    Raises:
      DataError: the state is of other data or settings.
      UserError: it holds answers of other settings.
    """
    self.prompts.set_state(state)
    self._taken = int(state.get("steps", state["next_step"] * self._iterations))
    if left := state.get("left", 0):
      arrays = {name: _unpacked(array) for name, array in state["answers"].items()}
      saved = Sampled(**arrays, counts=state["counts"])
      *_, G, L = saved.tokens.shape
      grpo = self._parts.grpo
      if (grpo.num_generations, grpo.max_completion_length) != (G, L) or left >= self._iterations:
        raise UserError(
          f"the newest checkpoint is amid steps that learn from {G} answers of at most {L} tokens to each prompt; go on with "
          f"grpo.num_generations={G}, grpo.max_completion_length={L} and the same grpo.num_iterations, or begin anew with "
          "training.overwrite_output_dir=True"
        )
      # Prompts are read once more; answers and what they were worth follow from what was saved.
      self._before, self._restored = dict(state), saved
      self._rollout = self._roll_out({}, self.prompts.next({}))
      self._left = int(left)


class _Scored(NamedTuple):
  """Rewards float32 [A, R, G, F], and answers to be looked at."""

  values: np.ndarray
  shown: list[Shown]


def _shown(completion: Completion, labels: Sequence[str], scores: np.ndarray) -> Shown:
  answered, right = completion.answered, completion.answered.answers
  return Shown(
    question=answered.question,
    answer=right[0] if len(right) == 1 else list(right),
    prediction=answered.prediction,
    scores={label: float(score) for label, score in zip(labels, scores, strict=True) if not np.isnan(score)},
  )


def _mean(values: np.ndarray) -> float:
  known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
  return float(known.mean()) if known.size else 0.0


def _packed(array: np.ndarray) -> dict[str, Any]:
  data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
  return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
  data = np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"])
  return data.reshape(packed["shape"]).copy()
