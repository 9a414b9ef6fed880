"""Runs a checkpoint on given arrays in float32 and writes what it computes, to compare with another program.

  python -m internvl_jax.verify --model DIR --inputs io.npz --outputs out.npz

Inputs (.npz): pixel_values [T, 3, H, W] normalised float, image_flags [T], input_ids, labels and
attention_mask [R, S], image_token_id; optionally position_ids and loss_weight_square [R, S].
Outputs (.npz): logits [R, S, V], loss, loss_square (where its weights are given), features [T, P, E],
vit_last_hidden [T, 1+patches, C], grad_norm. Arrays that the inputs hold under an output's name are compared,
and the largest difference of each is printed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.errors import UserError
from internvl_jax.frontdoor import run_app
from internvl_jax.hf import model as hf_model
from internvl_jax.losses import lm
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL

_REQUIRED = ("pixel_values", "image_flags", "input_ids", "labels", "attention_mask", "image_token_id")
_OUTPUTS = ("logits", "loss", "loss_square", "features", "vit_last_hidden", "grad_norm")

_MODEL = flags.DEFINE_string("model", None, "Checkpoint folder.", required=True)
_INPUTS = flags.DEFINE_string("inputs", None, "The .npz of arrays to run on.", required=True)
_OUTPUTS_FILE = flags.DEFINE_string("outputs", None, "The .npz to write.", required=True)


def main(argv: Sequence[str]) -> None:
  """Reads the flags, runs, writes and compares."""
  del argv
  jax.config.update("jax_default_matmul_precision", "highest")
  inputs = read_inputs(_INPUTS.value)
  source = hf_model.open_source(_MODEL.value)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, device))
  outputs = run(source.model, params, inputs)
  np.savez(_OUTPUTS_FILE.value, allow_pickle=False, **outputs)
  for name in _OUTPUTS:
    if name in inputs and name in outputs:
      print(f"{name:<16} largest difference {np.abs(outputs[name] - inputs[name]).max():.3e}")


def read_inputs(path: str) -> dict[str, np.ndarray]:
  """The arrays of an .npz file.

  Raises:
    UserError: the file is not there or not an .npz, an array is missing, or image tokens and features differ
      in number.
  """
  if not Path(path).is_file():
    raise UserError(f"--inputs={path}: no such file")
  try:
    with np.load(path, allow_pickle=False) as file:
      inputs = dict(file)
  except (ValueError, OSError) as error:
    raise UserError(f"--inputs={path}: not an .npz of arrays ({error})") from None
  missing = [name for name in _REQUIRED if name not in inputs]
  if missing:
    raise UserError(f"--inputs={path}: lacks {', '.join(missing)}; needed are {', '.join(_REQUIRED)}")
  return inputs


def run(
  model: ModelDef[InternVL], params: Mapping[str, jax.Array], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """What the model computes on the arrays, in float32, and the norm of all its parameters' gradients."""

  def forward(params, weights):
    outputs = _forward(model, params, inputs)
    return lm.cross_entropy(outputs["logits"], jnp.asarray(_shifted_targets(inputs)), weights), outputs

  mean = _mean_weights(inputs)
  (loss, outputs), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(params, mean)
  outputs |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  if "loss_weight_square" in inputs:
    weights = np.pad(inputs["loss_weight_square"][:, 1:], ((0, 0), (0, 1))).astype(np.float32)
    outputs["loss_square"] = jax.jit(forward)(params, weights / weights.sum())[0]
  return {name: np.asarray(value) for name, value in outputs.items()}


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
  states = module.decode(
    x,
    how,
    positions=jnp.asarray(_positions(inputs)),
    segment_ids=jnp.ones_like(mask),
    kv_segment_ids=jnp.asarray(mask),
  )
  return {"vit_last_hidden": hidden, "features": features, "logits": module.logits(states)}


def _image_index(inputs: Mapping[str, np.ndarray], num_features: int) -> np.ndarray:
  is_image = inputs["input_ids"] == int(inputs["image_token_id"])
  if is_image.sum() != num_features:
    raise UserError(
      f"--inputs: {is_image.sum()} image tokens in input_ids, but the tiles with image_flags=1 give {num_features}"
    )
  order = np.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
  return np.where(is_image, order, NO_IMAGE)


def _positions(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  if "position_ids" in inputs:
    return inputs["position_ids"]
  mask = inputs["attention_mask"].astype(np.int64)
  return np.where(mask, np.cumsum(mask, axis=1) - 1, 1)


def _shifted_targets(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  return np.pad(inputs["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def _mean_weights(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  supervised = (_shifted_targets(inputs) != IGNORE_INDEX).astype(np.float32)
  return supervised / max(supervised.sum(), 1.0)


if __name__ == "__main__":
  run_app(main)
