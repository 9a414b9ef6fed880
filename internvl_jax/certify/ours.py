"""What this program makes of the recorded lines, and computes on the recorded arrays, in float32.

Letters: R rows, S tokens, T tiles, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import compiler, verification
from internvl_jax.arguments import DataTrainingArguments, TrainingArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE
from internvl_jax.certify.taps import Kept, watch
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.data.sample.sample import Sample, SampleMaker
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.meta import DatasetSpec, read_meta
from internvl_jax.data.source.records import first_read, open_records
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.hf.weights import Rename, names_of
from internvl_jax.inference_settings import read_stated
from internvl_jax.losses import lm
from internvl_jax.models.functional import define
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig
from internvl_jax.optim.labels import decays
from internvl_jax.optim.optimizer import make_optimizer
from internvl_jax.trees import LAYER_RANGE

HOW = Execution()

_PICKS = 16
"""Rows of activations are kept by so many, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
  """Rows for the model.

  Attributes:
    pixels: float32 [T, side, side, 3], normalized.
    ids: int32 [R, S].
    labels: int32 [R, S], not shifted.
    positions: int32 [R, S].
    segments: int32 [R, S], from 1; 0 is padding.
  """

  pixels: np.ndarray
  ids: np.ndarray
  labels: np.ndarray
  positions: np.ndarray
  segments: np.ndarray

  @property
  def num_tiles(self) -> int:
    """T."""
    return len(self.pixels)

  @classmethod
  def packed(cls, row: Mapping[str, np.ndarray], samples: Sequence[Mapping[str, np.ndarray]]) -> "Rows":
    """A recorded row of segments, and the samples in it."""
    more = (0, _rounded(len(row["input_ids"])) - len(row["input_ids"]))

    def padded(name: str, fill: int) -> np.ndarray:
      return np.pad(row[name], more, constant_values=fill)[None].astype(np.int32)

    return cls(
      pixels=pixels_of(samples),
      ids=padded("input_ids", 0),
      labels=padded("labels", IGNORE_INDEX),
      positions=padded("position_ids", 0),
      segments=padded("segments", 0),
    )

  @classmethod
  def of(cls, samples: Sequence[Mapping[str, np.ndarray]]) -> "Rows":
    """Recorded samples as rows, padded at their ends, so that few programs are compiled."""
    length = _rounded(max(len(sample["input_ids"]) for sample in samples))

    def padded(values: Sequence[np.ndarray], fill: int) -> np.ndarray:
      rows = [np.pad(value, (0, length - len(value)), constant_values=fill) for value in values]
      return np.stack(rows).astype(np.int32)

    ids = [sample["input_ids"] for sample in samples]
    return cls(
      pixels=pixels_of(samples),
      ids=padded(ids, 0),
      labels=padded([sample["labels"] for sample in samples], IGNORE_INDEX),
      positions=np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)),
      segments=padded([np.ones(len(row), np.int32) for row in ids], 0),
    )


_STEP = 256
"""Rows are padded to a multiple of so many tokens."""


def _rounded(length: int) -> int:
  return -(-length // _STEP) * _STEP


def pixels_of(samples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
  """The tiles of recorded samples, one after another [T, side, side, 3]; T may be 0."""
  found = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
  return np.concatenate(found).transpose(0, 2, 3, 1) if found else np.zeros((0, 0, 0, 3), np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Ours:
  """A checkpoint and a mixture as this program has them.

  Attributes:
    source: the checkpoint.
    params: its parameters, float32.
    tokenizer: of conversations.
    data: settings of samples: the checkpoint's own, changed by those that the recording states.
    meta: the mixture's meta file.
  """

  source: Source
  params: dict[str, jax.Array]
  tokenizer: ChatTokenizer
  data: DataTrainingArguments
  meta: str

  def sample(self, dataset: str, line: int) -> Sample:
    """The sample of a line (from 0), without augmentation.

    Raises:
      UserError: there is no such line, or it cannot be made a sample.
    """
    spec = next((spec for spec in read_meta(self.meta) if spec.name == dataset), None)
    if spec is None:
      raise UserError(f"--meta={self.meta}: has no dataset {dataset!r}, of which a line is recorded")
    records = open_records(spec.annotation, spec.name, key=spec.key)
    if line >= len(records):
      raise UserError(f"{spec.annotation}: has {len(records)} lines, but line {line + 1} is recorded")
    lines = CONVERSATION_LINES.recognized(first_read(records))
    return self.make(records.read(line), records.where(line), spec, lines)

  def make(
    self, record: Any, where: Where, spec: DatasetSpec, lines: LineSchema = CONVERSATION_LINES
  ) -> Sample:
    """The sample of a parsed line of a dataset, whose lines are in the reference's form or in that of `lines`."""
    maker = SampleMaker(
      spec=spec,
      data=self.data,
      tokenizer=self.tokenizer,
      tokens_per_tile=self.source.config.tokens_per_tile,
      limits=Limits(self.data.max_seq_length, policy="error"),
      lines=lines,
    )
    return maker.make(record, where)

  def run(
    self, rows: Rows, picks: Mapping[str, np.ndarray] | None = None, config: InternVLConfig | None = None
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [R, S, V], and norms and rows of every part by the recorder's names.

    Args:
      rows: what the model runs on.
      picks: places of rows in the flattened tokens, by "vision", "projector" and "text".
      config: another model of the same parameters; None: the checkpoint's.
    """
    given = {"vision": (), "projector": (), "text": (), **(picks or {})}
    room = _PICKS * max(1, *(-(-len(chosen) // _PICKS) for chosen in given.values()))
    places = {
      kind: np.resize([*chosen, *[0] * room], room).astype(np.int32) for kind, chosen in given.items()
    }
    logits, found = self._program(config or self.source.config)(self.params, self._arrays(rows), places)
    return np.asarray(logits), {
      name: np.asarray(value)[: len(given[_kind_of(name)])] if name.startswith("rows:") else np.asarray(value)
      for name, value in found.items()
    }

  def gradients(self, rows: Rows) -> dict[str, np.ndarray]:
    """Gradients of the mean loss of all supervised tokens, by the checkpoint's names of its tensors."""
    targets = np.pad(rows.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    weights = (targets != IGNORE_INDEX).astype(np.float32)
    weights /= max(weights.sum(), 1)
    grads = self._grad(self.params, self._arrays(rows), jnp.asarray(targets), jnp.asarray(weights))
    return self.by_tensor(grads)

  def by_tensor(self, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays that are shaped as parameters are, by path, under the names of the checkpoint's tensors."""
    found = {}
    for path, array in arrays.items():
      names = names_of(path, array.shape, self.source.table)
      for cell in np.ndindex(*names.keys.shape[:-1]):
        parts = names.row.transform.save(np.asarray(array[cell]))
        found.update(zip(names.keys[cell], parts, strict=True))
    return found

  def tensor_name(self, name: str) -> str:
    """A name of PyTorch's as the tables of names have it."""
    return Rename(self.source.layout.renames)(name)

  def decays(self, undecayed: str | None = None, *, own_names: bool = False) -> dict[str, bool]:
    """Which tensors of the checkpoint weight decay applies to.

    Args:
      undecayed: names that are spared, as a regular expression; None: the run's (`Source.undecayed`).
      own_names: it is one over the checkpoint's names; else over the reference's.
    """
    shapes, table = self.source.model.shapes, self.source.table
    names = {path: names_of(path, leaf.shape, table).keys for path, leaf in shapes.items()}
    asked = self.source.reference_names
    if own_names:
      asked = {path: self.source.layout.module(keys.flat[0]) for path, keys in names.items()}
    applies = decays(asked, self.source.undecayed if undecayed is None else undecayed)
    return {key: applies[path] for path, keys in names.items() for key in keys.ravel()}

  def layer(self, part: str, number: int) -> dict[str, np.ndarray]:
    """The parameters of a layer of "vision" or "text", by their names in it."""
    prefix = {"vision": "vision_model.encoder", "text": "language_model.model"}[part]
    found = {}
    for path, array in self.params.items():
      span = LAYER_RANGE.search(path)
      if span and path.startswith(prefix) and int(span[1]) <= number < int(span[2]):
        found[path[span.end() :]] = np.asarray(array[number - int(span[1])])
    return found

  @functools.cache  # noqa: B019 (a checkpoint lives as long as the command)
  def update(self, learning_rate: float, weight_decay: float) -> dict[str, np.ndarray]:
    """What the run's AdamW adds to every tensor at the first step, for gradients equal to the parameters."""
    labels = dict.fromkeys(self.params, "all")
    applies = decays(self.source.reference_names, self.source.undecayed)
    training = TrainingArguments(weight_decay=weight_decay, max_grad_norm=0.0)
    optimizer = make_optimizer(training, labels=labels, decay=applies)
    given = {"grad_norm": jnp.float32(1), "learning_rate": jnp.float32(learning_rate)}

    def step(params: dict[str, jax.Array]) -> Any:
      return optimizer.update(params, optimizer.init(params), params, **given)[0]

    return self.by_tensor(jax.jit(step)(self.params))

  def _arrays(self, rows: Rows) -> dict[str, jax.Array]:
    is_image = rows.ids == self.tokenizer.image_token_id
    wanted = rows.num_tiles * self.source.config.tokens_per_tile
    if is_image.sum() != wanted:
      raise UserError(
        f"the recording has {is_image.sum()} image tokens for {rows.num_tiles} tiles, which are {wanted} tokens here"
      )
    room = 1 << (rows.num_tiles - 1).bit_length() if rows.num_tiles else 0
    pixels = np.pad(rows.pixels, ((0, room - rows.num_tiles), (0, 0), (0, 0), (0, 0)))
    order = np.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
    index = np.where(is_image, order, NO_IMAGE).astype(np.int32)
    names = {"pixels": pixels, "ids": rows.ids, "index": index}
    return {
      name: jnp.asarray(value)
      for name, value in {**names, "positions": rows.positions, "segments": rows.segments}.items()
    }

  @functools.cache  # noqa: B019 (a checkpoint lives as long as the command)
  def _program(self, config: InternVLConfig) -> Any:
    same = config == self.source.config
    model = self.source.model if same else define(lambda rngs: InternVL(config, rngs=rngs))

    def run(params: Any, arrays: Any, picks: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
      module, kept = model.bind(params), Kept(picks)
      watch(module, kept)
      logits = _forward(module, arrays)
      kept.keep("logits", logits)
      return logits, kept.found

    return jax.jit(run)

  @functools.cached_property
  def _grad(self) -> Any:
    def loss(params: Any, arrays: Any, targets: jax.Array, weights: jax.Array) -> jax.Array:
      return lm.cross_entropy(_forward(self.source.model.bind(params), arrays), targets, weights)

    return jax.jit(jax.grad(loss))


def _kind_of(name: str) -> str:
  """What of the picks an array of rows was taken by."""
  kind = name.partition(":")[2].split(".")[0]
  return "text" if kind == "logits" else kind


def _forward(module: InternVL, arrays: Mapping[str, jax.Array]) -> jax.Array:
  pixels = arrays["pixels"]
  if len(pixels):
    features = module.project(module.vision_model(pixels, **HOW.scan_options))
    pool = features.reshape(1, -1, features.shape[-1])
  else:
    pool = jnp.zeros((1, 0, 1), jnp.float32)
  x = module.embed(arrays["ids"], arrays["index"], pool, HOW)
  segments = arrays["segments"]
  states, _ = module.decode(x, HOW, positions=arrays["positions"], segment_ids=segments)
  return module.logits(states)


def open_ours(model: str, meta: str, settings: Mapping[str, Any]) -> Ours:
  """Opens a checkpoint and a mixture.

  Args:
    model: see `open_source`.
    meta: the mixture's meta file.
    settings: of `DataTrainingArguments`, where they are not the checkpoint's own.

  Raises:
    UserError: one of them cannot be used.
  """
  compiler.use_full_precision()
  source = open_source(model)
  files = open_tokenizer(model)
  stated = read_stated(source, files)
  data = dataclasses.replace(stated.data, **settings)
  template = stated.template if data.conv_style == stated.template.name else get_template(data.conv_style)
  return Ours(
    source=source,
    params=verification.load(source),
    tokenizer=ChatTokenizer(files, template, rows=source.config.text.vocab_size),
    data=data,
    meta=meta,
  )
