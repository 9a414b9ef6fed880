"""Writes a checkpoint in another layout, with its LoRA adapters merged or apart, or interpolated with another one.

`internvl_jax.convert` is the command.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import serving, signals
from internvl_jax.adapters import merge_and_check, without_adapters
from internvl_jax.arguments import MeshConfig
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.hf import export, peft
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.interpolated import InterpolatedParameter, check_same_model
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.model_config import Layout
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.inference_settings import Stated, read_stated, recorded_settings
from internvl_jax.models.lora import adapter_paths, merge
from internvl_jax.parallel import rules
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.storage.paths import AnyPath


def convert(
  src: str, dst: AnyPath, layout: Layout, *, lora: str, dtype: Any = None, code: str | None = None
) -> None:
  """Writes the checkpoint `src` to `dst`.

  Args:
    src: a folder, a hub id or a bucket's URL.
    dst: a folder that is new or empty, here or of a bucket.
    layout: of what is written.
    lora: "merge" or "peft".
    dtype: of the weights written; None is bfloat16 where all of the source is, else float32.
    code: a folder with the Python files of the internvl layout; None: the source's.

  Raises:
    UserError: the source cannot be read, the layout has no form for it, or `dst` is not empty.
  """
  _check_new(dst)
  source = open_source(src)
  files = model_files(source, open_tokenizer(src), layout, code)
  files = dataclasses.replace(files, weights_from=source.raw.get(export.WEIGHTS_FROM))
  if dtype is None:
    dtype = _stored_dtype(source)
  if lora == "peft":
    _check_adapters(source, layout)
  base, params = _weights(source, lora, dtype)
  again = f"remove {dst}, which is not complete, and start the same command again"
  signals.set_last_line(f"Stopped; {again}")
  if lora == "peft":
    _save_adapters(dst / "adapter", source, layout, base=str(dst.absolute()))
  files = dataclasses.replace(files, dtype=dtype)
  export.save_model(dst, base, params, files, remedy=f"make room, {again}")
  logging.info("Wrote %s in the layout %s", dst, layout.name)


def interpolate(
  src: str,
  start: str,
  dst: AnyPath,
  layout: Layout,
  weights: Sequence[float],
  *,
  dtype: Any = None,
  code: str | None = None,
) -> None:
  """Writes models between a fine-tuned one and the one that it was trained from (WiSE-FT, arXiv:2109.01903).

  Adapters are merged first. Parameters are interpolated in float32 as they are written, layer by layer, so that neither
  model is ever in memory; only the check of a merge holds one.

  Args:
    src: the fine-tuned checkpoint: a folder, a hub id or a bucket's URL.
    start: the one that it was trained from.
    dst: a folder that is new or empty: of the model, or of several, each in a folder that is named by its weight.
    layout: of what is written.
    weights: of `src`, in [0, 1]: 0 is `start`, 1 is `src`.
    dtype: of the weights written; None is bfloat16 where both have that alone, else float32.
    code: a folder with the Python files of the internvl layout; None: those of `src`.

  Raises:
    UserError: one cannot be read, they are of different models or tokenizers, or `dst` is not empty.
  """
  _check_new(dst)
  end_source, start_source = open_source(src), open_source(start)
  tokenizer = open_tokenizer(src)
  if tokenizer.get_vocab() != open_tokenizer(start).get_vocab():
    raise UserError(
      f"--interpolate={start}: its tokenizer has other tokens than that of {src}; name the checkpoint that was trained from"
    )
  check_same_model(without_adapters(start_source), without_adapters(end_source))
  files = model_files(end_source, tokenizer, layout, code)
  dtype = dtype or np.promote_types(*map(_stored_dtype, (end_source, start_source)))
  source, ends = _merged_lazily(end_source)
  _, starts = _merged_lazily(start_source)
  again = f"remove {dst}, which is not complete, and start the same command again"
  signals.set_last_line(f"Stopped; {again}")
  for weight in weights:
    params = {path: InterpolatedParameter(starts[path], ends[path], weight) for path in source.model.shapes}
    said = f"an interpolation: {weight:g} of {src}, {1 - weight:g} of {start}"
    folder = dst / f"{weight:g}" if len(weights) > 1 else dst
    of_weight = dataclasses.replace(files, dtype=dtype, weights_from=said)
    export.save_model(folder, source, params, of_weight, remedy=f"make room, {again}")
    logging.info("Wrote %s: %s", folder, said)


def _merged_lazily(source: Source) -> tuple[Source, Mapping[str, Any]]:
  """A model without adapters and its parameters in float32, merged where there are adapters; read when they are asked for."""
  if not source.specs:
    return source, source.lazy(jnp.float32)
  _weights(source, "merge", jnp.float32)  # Checks that the logits stay the same; the weights are let go of.
  scales = {part: spec.scale for part, spec in source.specs.items()}
  return without_adapters(source), merge(source.lazy(jnp.float32), scales)


def _check_new(dst: AnyPath) -> None:
  """Refuses a folder that has something in it."""
  if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
    raise UserError(f"--dst={dst} is there and not empty; name a new folder")


def model_files(
  source: Source, tokenizer: PreTrainedTokenizerBase, layout: Layout, code: str | None
) -> export.ModelFiles:
  """What is written beside the weights, by what the source says of itself; logs what the layout has no form for.

  Args:
    source: the checkpoint that is converted.
    tokenizer: its tokenizer.
    layout: of what is written.
    code: see `convert`.

  Raises:
    UserError: the layout cannot hold the model, or `code` has no code.
  """
  stated = read_stated(source, tokenizer)
  stated.log()
  chat = ChatTokenizer(tokenizer, stated.template)
  wanted = serving.ExportSettings(layout=layout, code=code, layout_flag="--layout", code_flag="--code")
  prepared = serving.prepare(source, stated.data, tokenizer, chat, wanted)
  for line in prepared.notes:
    logging.warning("%s", line)
  settings = recorded_settings(stated.data, stated.template)
  if layout is layouts.INTERNVL and settings["system_message"] is None:
    settings.pop("system_message")
    logging.warning(
      "Without a system message %s has no system turn; the internvl layout has no form for that, so the one of "
      "template %r will be written",
      *(source.folder, stated.template.name),
    )
  return export.ModelFiles(
    layout=layout,
    dtype=jnp.float32,
    tokenizer=tokenizer,
    normalize_type=stated.data.normalize_type,
    serving=prepared.serving,
    eos_token_id=_stop_ids(stated, chat),
    settings=settings,
    code=prepared.code,
  )


def _stored_dtype(source: Source) -> Any:
  """bfloat16 where all of the source's weights are, else float32."""
  assert source.checkpoint is not None
  # Packed experts (U8) unpack to numbers that bfloat16 holds exactly.
  dtype = jnp.bfloat16 if source.checkpoint.dtypes <= {"BF16", "U8"} else jnp.float32
  found = ", ".join(sorted(source.checkpoint.dtypes))
  logging.info("Writing %s: the source has %s", np.dtype(dtype), found)
  return dtype


def _stop_ids(stated: Stated, chat: ChatTokenizer) -> int | list[int]:
  """What ends an answer: what the source says, and the template's token."""
  ids = list(dict.fromkeys([*stated.generation.stop_ids, chat.stop_token_id]))
  return ids if ids[1:] else ids[0]


def _weights(source: Source, lora: str, dtype: Any) -> tuple[Source, Mapping[str, Any]]:
  """The model without adapters and its parameters: read only when they are written, if nothing is computed."""
  if source.specs and lora == "merge":
    # The check computes, so the weights must be in memory; they are as small there as in the checkpoint.
    adapters = adapter_paths(source.model.shapes)
    shapes = {
      path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if path in adapters else dtype)
      for path, leaf in source.model.shapes.items()
    }
    place = rules.weight_shardings(source.model.axes, shapes, make_mesh(MeshConfig(data=1, fsdp=-1)))
    return merge_and_check(source, source.load(shapes, place))
  base = without_adapters(source)
  return base, source.lazy(dtype, base.model.shapes)


def _check_adapters(source: Source, layout: Layout) -> None:
  """Refuses adapters that are not there, or that the layout has no form for."""
  if not source.specs:
    raise UserError(f"--lora=peft, but {source.folder} has no adapters; use --lora=merge")
  table = layout.table(layouts.family_of(source.raw), source.config)
  if lacking := peft.formless(source.model.shapes, table):
    raise UserError(
      f"--lora=peft: the {layout.name} layout has no form for adapters of {', '.join(lacking)}, which it splits; use "
      "--lora=merge or --layout=internvl"
    )


def _save_adapters(folder: AnyPath, source: Source, layout: Layout, *, base: str) -> None:
  adapters = source.lazy(jnp.float32, adapter_paths(source.model.shapes))
  table = layout.table(layouts.family_of(source.raw), source.config)
  peft.save_adapter(folder, adapters, source.specs, layout, table, base=base)
