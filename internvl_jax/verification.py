"""Runs a checkpoint on given arrays in float32, and compares what it computes with other numbers.

`internvl_jax.verify` is the command. Its docstring lists the arrays.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax.adapters import probe
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.errors import UserError
from internvl_jax.hf import vocabulary
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.model_config import HF
from internvl_jax.losses import lm
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL

_REQUIRED = ("pixel_values", "input_ids", "labels", "attention_mask", "image_token_id")
_OUTPUTS = (
  *("logits", "loss", "loss_square", "features", "vit_last_hidden", "grad_norm"),
  *("features_compressed", "gate"),
)


def compute(model: str, inputs: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
  """What a checkpoint computes on the arrays, or the logits of a fixed input without any."""
  source = open_source(model)
  vocabulary.check(model)
  if inputs is not None:
    check_inputs(source, inputs)
  params = load(source)
  if inputs is None:
    return {"logits": probe(source, params)}
  return run(source.model, params, with_positions(source, inputs))


def check_inputs(source: Source, inputs: Mapping[str, np.ndarray]) -> None:
  """Refuses arrays that are not for this model.

  Raises:
    UserError: ids outside the vocabulary, or tiles of another size.
  """
  config = source.config
  for name in ("input_ids", "labels"):
    found = inputs[name][inputs[name] != IGNORE_INDEX] if name == "labels" else inputs[name]
    if found.size and not 0 <= found.min() <= found.max() < config.text.vocab_size:
      raise UserError(
        f"--inputs: {name} has ids from {found.min()} to {found.max()}, but {source.folder} has a vocabulary of "
        f"{config.text.vocab_size}"
      )
  side = config.vision.image_size
  if inputs["pixel_values"].shape[1:] != (3, side, side):
    raise UserError(
      f"--inputs: pixel_values is {inputs['pixel_values'].shape}, but {source.folder} takes [T, 3, {side}, {side}]"
    )


def with_positions(source: Source, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays with the positions that the layout's own program takes where they are not given."""
  mask = inputs["attention_mask"].astype(np.int64)
  if source.layout is HF:
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
  else:
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 1)
  return {"position_ids": positions, **inputs}


def load(source: Source) -> dict[str, jax.Array]:
  """All parameters in float32 on the first device."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, device))


def report(outputs: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> None:
  """Prints the largest difference of every array that both have."""
  for name in _OUTPUTS:
    if name in others and name in outputs:
      if outputs[name].shape != others[name].shape:
        print(f"{name:<16} shapes differ: {outputs[name].shape} and {others[name].shape}")
      else:
        print(f"{name:<16} largest difference {np.abs(outputs[name] - others[name]).max():.3e}")


def agrees(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> bool:
  """Whether logits are of one shape and differ by at most `tolerance` times the largest of them."""
  if ours.shape != theirs.shape:
    return False
  return bool(np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max())


def read_inputs(path: str) -> dict[str, np.ndarray]:
  """The arrays of an .npz file.

  Raises:
    UserError: the file is not there or not an .npz, or an array is missing.
  """
  if not Path(path).is_file():
    raise UserError(f"--inputs={path}: no such file")
  try:
    with np.load(path, allow_pickle=False) as file:
      inputs = dict(file)
  except (ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
    raise UserError(f"--inputs={path}: not an .npz of arrays ({error})") from None
  missing = [name for name in _REQUIRED if name not in inputs]
  if missing:
    raise UserError(f"--inputs={path}: lacks {', '.join(missing)}; needed are {', '.join(_REQUIRED)}")
  return {"image_flags": np.ones(len(inputs["pixel_values"]), np.int32), **inputs}


def run(
  model: ModelDef[InternVL], params: Mapping[str, jax.Array], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """What the model computes on the arrays (with their positions), in float32, and the norm of all its parameters' gradients."""
  outputs, grads = run_with_gradients(model, params, inputs)
  return {**outputs, "grad_norm": np.asarray(optax.tree.norm(grads))}


def run_with_gradients(
  model: ModelDef[InternVL], params: Mapping[str, jax.Array], inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
  """What the model computes on the arrays, in float32, and the gradient of the mean loss by parameter."""
  targets = jnp.asarray(_shifted_targets(inputs))
  weights = [_mean_weights(inputs)]
  if "loss_weight_square" in inputs:
    square = np.pad(inputs["loss_weight_square"][:, 1:], ((0, 0), (0, 1))).astype(np.float32)
    weights.append(square / square.sum())

  def forward(params):
    outputs = _forward(model, params, inputs)
    losses = [lm.cross_entropy(outputs["logits"], targets, jnp.asarray(w)) for w in weights]
    return losses[0], {**outputs, **dict(zip(("loss", "loss_square"), losses, strict=False))}

  (_, outputs), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(dict(params))
  return {name: np.asarray(value) for name, value in outputs.items()}, grads


def _forward(model: ModelDef[InternVL], params, inputs: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  module, how = model.bind(params), Execution()
  hidden = module.vision_model(jnp.asarray(inputs["pixel_values"]).transpose(0, 2, 3, 1), **how.scan_options)
  features = module.project(hidden)
  pool = features[np.flatnonzero(inputs["image_flags"])].reshape(1, -1, features.shape[-1])
  index = _image_index(inputs, pool.shape[1])
  x = module.embed(jnp.asarray(inputs["input_ids"]), jnp.asarray(index), pool, how)
  mask = inputs["attention_mask"].astype(np.int32)
  # PyTorch's mask hides padded keys from everyone but lets padded queries look: so queries are all of one
  # segment, and hidden keys of another.
  states, _ = module.decode(
    x,
    how,
    positions=jnp.asarray(inputs["position_ids"]),
    segment_ids=jnp.ones_like(mask),
    kv_segment_ids=jnp.asarray(mask),
  )
  found = {"vit_last_hidden": hidden, "features": features, "logits": module.logits(states)}
  if module.gating is None:
    return found
  gate = jax.nn.softmax(module.gate(hidden), axis=-1)
  return {**found, "features_compressed": module.compress(hidden), "gate": gate}


def _image_index(inputs: Mapping[str, np.ndarray], num_features: int) -> np.ndarray:
  is_image = inputs["input_ids"] == int(inputs["image_token_id"])
  if is_image.sum() != num_features:
    raise UserError(
      f"--inputs: {is_image.sum()} image tokens in input_ids, but the tiles with image_flags=1 give {num_features}"
    )
  order = np.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
  return np.where(is_image, order, NO_IMAGE)


def _shifted_targets(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  return np.pad(inputs["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def _mean_weights(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  supervised = (_shifted_targets(inputs) != IGNORE_INDEX).astype(np.float32)
  return supervised / max(supervised.sum(), 1.0)
