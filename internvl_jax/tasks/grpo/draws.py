"""How tokens of sampled answers are drawn: a function of their logits, and of seed, step, prompt, answer and place.

Letters: B prompts, G answers of a prompt, N tokens, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from internvl_jax.eval.sampling import Draw, processed

_STREAM = 0x67727
"""Folded into the key of the seed, so that nothing else is drawn by the same numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
  """How tokens are drawn: by no state, so that a step that is taken again has the same answers, whatever came before it.

  Attributes:
    generations: G.
    top_p, top_k: which tokens are drawn from; see `task_arguments.GrpoConfig`.
    seed: of the run.
  """

  generations: int
  top_p: float = 1.0
  top_k: int = 0
  seed: int = 0

  def keys(self, index: Int[Array, "*B"], step: Int[Array, ""]) -> Key[Array, "*B G"]:
    """The randomness of each answer to prompts of these indices."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _STREAM), step)
    by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.maximum(index.reshape(-1), 0))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(by_prompt, jnp.arange(self.generations)).reshape(*index.shape, self.generations)

  def token(
    self, logits: Float[Array, "*N V"], keys: Key[Array, "*N"], place: Int[Array, ""]
  ) -> Int[Array, "*N"]:
    """The token at a place of each answer, counted from 0, by its logits at the temperature."""
    V = logits.shape[-1]
    how = Draw(
      keys=keys,
      step=place,
      seen=None,
      penalty=None,
      temperature=None,
      top_k=jnp.int32(min(self.top_k, V)) if self.top_k else None,
      top_p=None if self.top_p == 1 else jnp.float32(self.top_p),
    )
    left = processed(logits.reshape(-1, V), how)
    each = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), place)
    return jax.vmap(jax.random.categorical)(each, left).astype(jnp.int32).reshape(keys.shape)
