"""The batch, the objective and the task."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import IGNORE_INDEX, Array, Axes, TokenBatch
from internvl_jax.data.load import batching
from internvl_jax.objectives import ForwardPass, Outcome
from internvl_jax.tasks.task import Task
from tests.support.text_task.lines import TextLines


class TextBatch(NamedTuple):
  """Tokens, and for each row whether it is long."""

  rows: TokenBatch
  is_long: Annotated[Array, Axes("float32", "A", "R")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData:
  lines: TextLines
  conversations = 1

  def assemble(self, micro_batches, padding):
    rows = batching.assemble(micro_batches, padding)
    lengths = (rows.segment_ids > 0).sum(-1)
    return TextBatch(rows, (lengths > np.median(lengths)).astype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(ForwardPass):
  penalty: float = 1e-3

  def weights(self, batch):
    return self.normalized(batch.rows.loss_weight)

  def loss(self, params, batch, weights, key, running, *, share=1.0):
    model, rows = self.model.bind(params), batch.rows
    hidden, _ = self.hidden(model, rows, self.features(model, rows.tiles, None), None)
    logits = model.logits(hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    targets = jnp.where(rows.targets == IGNORE_INDEX, 0, rows.targets)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = log_z - picked + self.penalty * log_z**2
    terms = {"long_rows": share * jnp.mean(batch.is_long)}
    return jnp.sum(losses * weights), Outcome(running, terms)


def open_task(config, source):
  return Task(name="text", data=TextData(lines=TextLines()), make_objective=LanguageModeling, batch=TextBatch)
