"""Opens a checkpoint as a Source: the model's definition and the origin of every parameter, before any is read."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from internvl_jax.errors import UserError
from internvl_jax.hf import (
  adapted,
  dtypes,
  embeddings,
  flash,
  hub,
  peft,
  quantized_base,
  tables,
  towers,
  weights,
)
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.changes import UNCHANGED, Changes, changed
from internvl_jax.hf.embeddings import EMBEDDING, HEAD
from internvl_jax.hf.model_config import Layout
from internvl_jax.hf.weights import Checkpoint, LazyParameter, Rename
from internvl_jax.models import functional, lora
from internvl_jax.models.base_weights import as_kernels
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.flash import PARTS, fill_projector
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.lora import LoRASpec
from internvl_jax.storage.paths import is_bucket
from internvl_jax.trees import select, submodule_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Source:
  """An opened checkpoint, of which no weights are read yet.

  Attributes:
    folder: with its tokenizer and further files.
    raw: its config.json.
    config: the model it describes, the run's changes included.
    model: the model's definition.
    table: names of its tensors.
    checkpoint: its tensors; None where the parameters are to be drawn.
    fresh: the parameters that it lacks and that are drawn: adapters just attached, a projector not given.
    new_rows: the last rows of the embeddings that it lacks or has to spare, and that are made for tokens.
  """

  folder: Path
  raw: Mapping[str, Any]
  config: InternVLConfig
  model: functional.ModelDef[InternVL]
  table: Sequence[Row]
  checkpoint: Checkpoint | None
  fresh: frozenset[str]
  new_rows: int = 0

  @property
  def layout(self) -> Layout:
    """The checkpoint's layout."""
    return config_io.layout_of(self.raw)

  @property
  def specs(self) -> dict[str, LoRASpec]:
    """The adapters by part of the model, of the parts that have some."""
    specs = {"vision_model": self.config.vision.lora, "language_model": self.config.text.lora}
    return {part: spec for part, spec in specs.items() if spec is not None}

  @property
  def reference_names(self) -> dict[str, str]:
    """What the reference calls the parameters (the first layer's, of a stack), whatever the checkpoint's layout."""
    table = config_io.INTERNVL.table(config_io.family_of(self.raw), self.config)
    return {
      path: weights.names_of(path, leaf.shape, table).keys.flat[0]
      for path, leaf in as_kernels(self.model.shapes).items()
    }

  @property
  def undecayed(self) -> str:
    """What weight decay spares, as a regular expression over the reference's names; see `families.Family`."""
    return config_io.family_of(self.raw).undecayed

  def build(self, rngs: nnx.Rngs) -> InternVL:
    """The module with fresh parameters."""
    return InternVL(self.config, rngs=rngs)

  @property
  def stored_config(self) -> InternVLConfig:
    """The model as the checkpoint has it: only with adapters that it brings."""
    fresh = {submodule_of(path) for path in lora.adapter_paths(self.fresh)}
    vision, text = self.config.vision, self.config.text
    return dataclasses.replace(
      self.config,
      vision=dataclasses.replace(vision, lora=None if "vision_model" in fresh else vision.lora),
      text=dataclasses.replace(text, lora=None if "language_model" in fresh else text.lora),
    )

  def without_fresh_adapters(self) -> functional.ModelDef[InternVL]:
    """The model of `stored_config`. The others of its parameters keep their paths."""
    config = self.stored_config
    return (
      self.model if config == self.config else functional.define(lambda rngs: InternVL(config, rngs=rngs))
    )

  def load(
    self,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    place: Mapping[str, jax.sharding.Sharding],
    *,
    seed: int = 0,
    paths: Set[str] | None = None,
  ) -> dict[str, jax.Array]:
    """Reads the parameters, each straight to its sharding in `place`, and initializes those that are fresh.

    Args:
      shapes: shape and dtype of every parameter.
      place: the sharding of every parameter.
      seed: of those that are drawn.
      paths: the parameters wanted; None: all.

    Raises:
      UserError: tensors are missing, left over or mis-shaped.
    """
    wanted = shapes.keys() if paths is None else paths
    fresh = wanted & (shapes.keys() if self.checkpoint is None else self.fresh)
    params = {}
    if self.checkpoint is not None:
      stored = {path: leaf for path, leaf in shapes.items() if path not in self.fresh}
      params = quantized_base.load(self.checkpoint, self.table, stored, place, paths=wanted - fresh)
    if fresh:
      params = lora.fill_magnitudes({**params, **self._draw(select(shapes, fresh), place, seed)}, fresh)
      params = fill_projector(params, fresh)
    return {path: params[path] for path in shapes if path in wanted}

  def lazy(self, dtype: jnp.dtype, paths: Iterable[str] | None = None) -> dict[str, LazyParameter]:
    """The parameters (those at `paths`, if given) as they are in the checkpoint, each layer read when asked for.

    Raises:
      UserError: tensors are missing, left over or mis-shaped.
    """
    assert self.checkpoint is not None and not self.fresh, "only what is stored can be read later"
    return weights.lazy(self.checkpoint, self.table, self.model.shapes, dtype, paths)

  def _draw(
    self, shapes: Mapping[str, jax.ShapeDtypeStruct], place: Mapping[str, jax.sharding.Sharding], seed: int
  ) -> dict[str, jax.Array]:
    """Initializes fresh parameters, each with its sharding in `place`; others are not computed."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
      params = functional.initialize(self.build, key)
      return {path: params[path].astype(leaf.dtype) for path, leaf in shapes.items()}

    # The hardware's generator compiles in a moment; the default one is unrolled for every parameter.
    shardings = {path: place[path] for path in shapes}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed, impl="rbg"))


def base_folder(name: str | Path, *, with_weights: bool = True) -> Path:
  """The folder of a checkpoint that has its config and tokenizer: of an adapter, its base model's.

  Args:
    name: see `open_source`.
    with_weights: False does not fetch the weights.

  Raises:
    UserError: no such checkpoint.
  """
  folder = hub.local_folder(str(name), with_weights=with_weights)
  return hub.local_folder(_base_of(folder), with_weights=with_weights) if peft.is_adapter(folder) else folder


def base_name(name: str | Path) -> str:
  """What names the checkpoint with the config: `name`, or of an adapter what names its base model.

  Raises:
    UserError: no such checkpoint, or an adapter whose base is not there.
  """
  folder = hub.local_folder(str(name))
  return _base_of(folder) if peft.is_adapter(folder) else str(name)


def _base_of(folder: Path) -> str:
  """What names the base model of an adapter's folder."""
  base = peft.base_of(folder)
  if not hub.is_elsewhere(base) and not Path(base).is_dir():
    raise UserError(
      f"{folder / peft.CONFIG}: base_model_name_or_path={base!r} is no folder here; set it to where the base model is"
    )
  if (Path(base).is_dir() or is_bucket(base)) and peft.is_adapter(hub.local_folder(base)):
    raise UserError(
      f"{folder / peft.CONFIG}: base_model_name_or_path={base!r} is an adapter itself; merge that one first (python -m "
      "internvl_jax.convert --lora merge), and name the result"
    )
  return base


def open_source(name: str | Path, changes: Changes = UNCHANGED, *, with_weights: bool = True) -> Source:
  """Opens a checkpoint: a folder in either layout, a PEFT adapter's folder, the URL of one in a bucket, or a hub id.

  Args:
    name: what to open.
    changes: what is to be different about the model.
    with_weights: False takes the description alone; the parameters are then drawn.

  Raises:
    UserError: no such checkpoint, or one that this program cannot run.
  """
  given = hub.local_folder(str(name), with_weights=with_weights)
  is_adapter = peft.is_adapter(given)
  folder = hub.local_folder(_base_of(given), with_weights=with_weights) if is_adapter else given
  raw = config_io.read_config(folder)
  layout = config_io.layout_of(raw)
  checkpoint = weights.open_checkpoint(folder, Rename(layout.renames)) if with_weights else None
  if checkpoint is not None:
    _check_kind(checkpoint, raw)
  config = config_io.model_config(raw)
  stored = adapted.recorded(raw, checkpoint)
  if given != folder and checkpoint is not None:
    table = layout.table(config_io.family_of(raw), config)
    stored |= peft.add_adapter(given, checkpoint, layout, table)
  return _make_source(
    _Stored(folder=folder, raw=raw, config=config, checkpoint=checkpoint, adapters=stored), changes
  )


def _check_kind(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> None:
  """Refuses tensors that no table could name: those of quantized weights.

  Raises:
    UserError: it names one of them.
  """
  said = config_io.quantization(raw) if raw else None
  dtypes.refuse_quantized(checkpoint.types, checkpoint.key, checkpoint.where, said)


def source_of_config(raw: Mapping[str, Any], changes: Changes = UNCHANGED) -> Source:
  """The model that a config.json describes, of which there is no folder.

  Raises:
    UserError: a model that this program cannot run.
  """
  config = config_io.model_config(raw)
  adapters = adapted.recorded(raw, None)
  return _make_source(
    _Stored(folder=Path(), raw=raw, config=config, checkpoint=None, adapters=adapters), changes
  )


def open_parts(
  *,
  vision_path: str,
  llm_path: str,
  mlp_path: str | None,
  changes: Changes,
  with_weights: bool = True,
) -> Source:
  """Opens a separate ViT and language model, to make an InternVL of them (stage 1).

  The projector is read from `mlp_path` or drawn. Embeddings that a language model shares with its output are
  untied, as in all checkpoints of the internvl layout.

  Raises:
    UserError: a part is missing or of an unknown kind.
  """
  assert changes.image_size and changes.downsample_ratio and changes.ps_version
  vision, llm = (hub.local_folder(path, with_weights=with_weights) for path in (vision_path, llm_path))
  parts = {"vision_config": vision, "llm_config": llm}
  raw: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": config_io.INTERNVL.model_type,
    "downsample_ratio": changes.downsample_ratio,
    "ps_version": changes.ps_version,
    "select_layer": -1,
    **{entry: config_io.read_json(folder / "config.json") for entry, folder in parts.items()},
  }
  for entry, folder in parts.items():
    if raw[entry].get("model_type") in config_io.LAYOUTS:
      raise UserError(f"{folder}: a whole InternVL checkpoint; name it as model.model_name_or_path")
  known = towers.model_types("internvl")
  if (found := raw["vision_config"].get("model_type")) not in known:
    raise UserError(
      f"{vision}/config.json: model_type is {found!r}, expected {' or '.join(f'{key!r} ({name})' for key, name in known.items())}"
    )
  lacking, checkpoint = frozenset[str](), None
  if with_weights:
    checkpoint = weights.open_checkpoint(vision, Rename(prefix="vision_model."))
    checkpoint.replace(weights.open_checkpoint(llm, Rename(prefix="language_model.")))
    _check_kind(checkpoint, raw)
  config = config_io.model_config(raw)
  if checkpoint is not None:
    if mlp_path is None:
      lacking = frozenset({"mlp1"})
    else:
      add_projector(checkpoint, config_io.INTERNVL, mlp_path)
  stored = _Stored(folder=llm, raw=raw, config=config, checkpoint=checkpoint, adapters={}, lacking=lacking)
  return _make_source(stored, changes, untie=True)


def add_projector(checkpoint: Checkpoint, layout: Layout, path: str) -> None:
  """Puts the projector of a file or folder in the place of a checkpoint's.

  Its keys are those of the bare module ("0.weight", ...) or have the prefix `mlp1.`.
  """
  names = [
    row.theirs[0].rsplit(".", 1)[0] for row in layout.projector if row.ours.endswith(("scale", "kernel"))
  ]
  patterns = [(r"^(?!mlp1\.)", "mlp1.")]
  patterns += [(rf"^mlp1\.{old}\.", f"{new}.") for old, new in zip("013", names, strict=True)]
  projector = weights.open_checkpoint(hub.local_weights(path), Rename(tuple(patterns)), pickles=True)
  _check_kind(projector, {})
  prefix = names[0].split(".", 1)[0] + "."
  checkpoint.drop([name for name in checkpoint.shapes if name.startswith(prefix)])
  checkpoint.replace(projector)


def with_projector(source: Source, path: str) -> Source:
  """The same source with the projector of `path`."""
  if source.checkpoint is not None:
    add_projector(source.checkpoint, source.layout, path)
  return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
  """What a checkpoint holds.

  Attributes:
    folder, raw, checkpoint: see `Source`.
    config: the model, without changes.
    adapters: by part of the model.
    lacking: the parts that it lacks.
  """

  folder: Path
  raw: Mapping[str, Any]
  config: InternVLConfig
  checkpoint: Checkpoint | None
  adapters: Mapping[str, LoRASpec]
  lacking: frozenset[str] = frozenset()


def _make_source(stored: _Stored, changes: Changes, *, untie: bool = False) -> Source:
  """The source of what is stored, with the changes; `untie` gives the output embedding a table of its own."""
  raw, config, checkpoint = stored.raw, stored.config, stored.checkpoint
  lacking, layout = set(stored.lacking), config_io.layout_of(raw)
  if changes.flash is not None and config.flash is None:
    config, lacking = dataclasses.replace(config, flash=changes.flash), lacking | {*PARTS}
  table = layout.table(config_io.family_of(raw), config)
  if checkpoint is not None:
    _drop_buffers(checkpoint)
    flash.check_tensors(checkpoint, stored.config)
    table = tables.packed(table, checkpoint.shapes)
  tied = embeddings.is_tied(raw, checkpoint, table)
  if tied and untie:
    table = embeddings.with_row(table, HEAD, theirs=embeddings.row_of(table, EMBEDDING).theirs)
    tied = False
  requested = {"vision_model": changes.vision_lora, "language_model": changes.text_lora}
  specs = {
    part: adapted.combined_spec(part, requested[part], stored.adapters.get(part)) for part in requested
  }
  config = changed(config, changes, specs, tied=tied)
  if changes.new_tokens:
    table = embeddings.with_row(
      table, EMBEDDING, transform=embeddings.grown(changes.new_tokens, is_output=False)
    )
    table = embeddings.with_row(table, HEAD, transform=embeddings.grown(changes.new_tokens, is_output=True))
  model = functional.define(lambda rngs: InternVL(config, rngs=rngs))
  drawn = {path for path in model.shapes if submodule_of(path) in lacking}
  drawn |= {path for path in lora.adapter_paths(model.shapes) if submodule_of(path) not in stored.adapters}
  if checkpoint is not None:
    if config.flash is not None:
      flash.check_fit(checkpoint, table, model.shapes, drawn)
    placed = select(model.shapes, lora.adapter_paths(model.shapes) - drawn)
    adapted.check_places(checkpoint, {path: leaf.shape for path, leaf in placed.items()}, table)
  adapted.check_targets(model, {part: spec for part, spec in specs.items() if spec is not None})
  return Source(
    folder=stored.folder,
    raw=raw,
    config=config,
    model=model,
    table=table,
    checkpoint=checkpoint,
    fresh=frozenset(drawn),
    new_rows=changes.new_tokens,
  )


def _drop_buffers(checkpoint: Checkpoint) -> None:
  """Forgets what old checkpoints store and every program computes: the frequencies of rotary embeddings."""
  buffers = [name for name in checkpoint.shapes if name.endswith(".rotary_emb.inv_freq")]
  if buffers:
    logging.info("Not used: %d tensors named like %s, which the config fixes", len(buffers), buffers[0])
  checkpoint.drop(buffers)
