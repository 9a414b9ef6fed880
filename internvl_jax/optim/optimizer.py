"""The optimizer, as one optax transformation."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from internvl_jax.arguments import TrainingArguments
from internvl_jax.optim.labels import decays


def make_optimizer(
  training: TrainingArguments, names: Mapping[str, str], undecayed: str
) -> optax.GradientTransformation:
  """AdamW's direction, decay included, still to be scaled by minus the learning rate.

  The rate stays outside: it comes from the host at every step (`make_schedule`).

  Args:
    training: the optimizer's settings.
    names: the trainable parameters by path, under the reference's names (see `decays`).
    undecayed: which of these names do not decay.
  """
  return optax.chain(
    optax.scale_by_adam(b1=training.adam_beta1, b2=training.adam_beta2, eps=training.adam_epsilon),
    optax.add_decayed_weights(training.weight_decay, mask=decays(names, undecayed)),
  )


def clip_by_global_norm(
  grads: Mapping[str, jax.Array], max_norm: float
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Scales gradients down to a global norm, as `torch.nn.utils.clip_grad_norm_` does; 0 leaves them.

  Returns:
    The gradients, and their norm before scaling.
  """
  norm = optax.tree.norm(grads)
  if max_norm <= 0:
    return dict(grads), norm
  scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
  return {path: grad * scale.astype(grad.dtype) for path, grad in grads.items()}, norm
