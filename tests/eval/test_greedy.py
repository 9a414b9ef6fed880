"""Greedy answers: their logits, where they end, and that a mesh changes neither them nor the size of its cache."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.batch import NO_IMAGE
from internvl_jax.errors import UserError
from internvl_jax.eval import greedy
from internvl_jax.eval.greedy import GreedyDecoder, Prompt, rounded_up
from internvl_jax.inference import open_for_inference
from internvl_jax.models.functional import define
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from tests.parallel.test_parallel import VOCAB, model
from tests.support.toy import CURVE

IMAGE = VOCAB - 1
NEW, ROWS = 6, 4


def prompts():
  """Of different lengths; every other one begins with a tile of four tokens."""
  rng = np.random.default_rng(0)
  found = []
  for row in range(ROWS):
    ids = rng.integers(0, IMAGE, 9 + 2 * row).astype("i4")
    tiles = row % 2
    ids[: 4 * tiles] = IMAGE
    found.append(Prompt(ids, rng.integers(0, 256, (tiles, 16, 16, 3)).astype("u1")))
  return found


@functools.cache
def parts(name):
  """A model and its parameters: large enough that what a token sees decides about the next."""
  config = model(name)
  definition = define(lambda rngs: InternVL(config, rngs=rngs))
  rng = np.random.default_rng(1)
  params = {path: rng.normal(size=leaf.shape).astype("f4") / 4 for path, leaf in definition.shapes.items()}
  return definition, params


def make_decoder(definition, kind=GreedyDecoder, stop_ids=(VOCAB,)):
  return kind(
    model=definition,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=IMAGE,
    stop_ids=stop_ids,
    max_new_tokens=NEW,
    batch_size=ROWS,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording(GreedyDecoder):
  """Keeps the logits that each token was chosen by."""

  logits: ClassVar[list] = []

  def choose(self, logits, draw):
    jax.debug.callback(lambda value: self.logits.append(np.asarray(value)), logits, ordered=True)
    return super().choose(logits, draw)


def all_logits(definition, params, rows):
  """Logits [B, S, V] of whole rows of ids, padded on the right, and their tiles in order: what training computes."""
  longest = max(map(len, rows))
  ids = jnp.stack([jnp.pad(row, (0, longest - len(row))) for row in rows])
  valid = jnp.arange(longest) < jnp.array([[len(row)] for row in rows])
  is_image = (ids == IMAGE) & valid
  index = jnp.where(is_image, (jnp.cumsum(is_image) - 1).reshape(ids.shape), NO_IMAGE)
  tiles = jnp.concatenate([prompt.tiles for prompt in prompts()])

  @jax.jit
  def run(params):
    model = definition.bind(params)
    features = model.extract_features(normalize_tiles(tiles, "imagenet"), Execution())
    x = model.embed(ids, index, features.reshape(1, -1, features.shape[-1]), Execution())
    positions = jnp.broadcast_to(jnp.arange(longest), ids.shape)
    hidden, _ = model.decode(x, Execution(), positions=positions, segment_ids=valid.astype("i4"))
    return model.logits(hidden)

  return np.asarray(run(params))


def test_logits_are_those_of_the_whole_row_and_answers_end_at_their_stop_token():
  """A cache, padding on the left and rows of other lengths beside it change no logit; each row is computed at once."""
  definition, params = parts("dense")
  params = jax.device_put(params, jax.devices()[0])
  Recording.logits.clear()
  answers = make_decoder(definition, Recording)(params, prompts())
  found = np.stack(Recording.logits, axis=1)  # And those behind the last token.
  assert {len(answer) for answer in answers} == {NEW} and found.shape == (ROWS, NEW + 1, VOCAB)
  rows = [
    np.concatenate([prompt.input_ids, answer]) for prompt, answer in zip(prompts(), answers, strict=True)
  ]
  for logits, expected, prompt in zip(found, all_logits(definition, params, rows), prompts(), strict=True):
    expected = expected[len(prompt.input_ids) - 1 :][: NEW + 1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

  stop = int(answers[1][2])
  stopped = make_decoder(definition, stop_ids=(VOCAB, stop))(params, prompts())
  for answer, before in zip(stopped, answers, strict=True):
    ends = np.flatnonzero(before == stop)
    np.testing.assert_array_equal(answer, before[: ends[0]] if len(ends) else before)
  assert len(stopped[1]) < NEW


def test_a_stream_and_a_cache_that_grows_give_the_same_tokens(monkeypatch):
  """Layers by themselves, chunks of a few tokens and a cache without room for the answer change no token."""
  definition, params = parts("dense")
  params = jax.device_put(params, jax.devices()[0])
  long = dataclasses.replace(make_decoder(definition), max_new_tokens=40, batch_size=2)
  expected = long(params, prompts()[:2])
  config = model("dense")
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, stacked=False))
  split = define(lambda rngs: InternVL(config, rngs=rngs))
  name, count = "language_model.model.layers.", config.text.num_layers
  by_layer = {path: value for path, value in params.items() if not path.startswith(name)}
  for path in params.keys() - by_layer.keys():
    rest = path.removeprefix(f"{name}0:{count}")
    by_layer |= {f"{name}{i}:{i + 1}{rest}": params[path][i : i + 1] for i in range(count)}
  assert by_layer.keys() == split.shapes.keys()
  monkeypatch.setattr(greedy, "ROOM", 2)
  streamed = dataclasses.replace(long, model=split, batch_size=1)
  for prompt, answer in zip(prompts(), expected, strict=False):
    parts_of = list(streamed.stream(by_layer, prompt))
    assert {len(part) for part in parts_of} == {greedy.STREAMED}
    np.testing.assert_array_equal(np.concatenate(parts_of), answer)


def test_lengths_are_rounded_up_by_little():
  for length in range(1, 5000):
    assert length <= greedy.rounded_up(length) <= max(length * 1.125, length + 31)
  assert len({greedy.rounded_up(length) for length in range(4097, 8193)}) == 8


def test_what_is_said_of_answers():
  decoder = make_decoder(None, stop_ids=(7, 9))
  assert decoder.cut(np.array([3, 9, 4, 7])).tolist() == [3] and decoder.cut(np.array([3, 4])).tolist() == [
    3,
    4,
  ]
  lines = decoder.unusual_ends([np.zeros(0), np.ones(NEW), np.ones(NEW), np.ones(NEW - 1)])
  assert [line[:6] for line in lines] == ["1 of 4", "2 of 4"]
  assert decoder.unusual_ends([np.ones(2)]) == []


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    ("dense", {"fsdp": 2, "tensor": 2}),
    # Fewer heads of keys than devices.
    pytest.param("qwen3_moe", {"expert": 2, "tensor": 4}, marks=pytest.mark.slow),
  ],
)
def test_answers_on_a_mesh(name, axes):
  config = model(name)
  definition, params = parts(name)
  decoder = make_decoder(definition)
  expected = decoder(jax.device_put(params, jax.devices()[0]), prompts())
  mesh = meshes.make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[: np.prod(list(axes.values()))])
  placed = jax.device_put(params, rules.weight_shardings(definition.axes, definition.shapes, mesh))
  for ours, theirs in zip(decoder(placed, prompts()), expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert len({tuple(answer) for answer in expected}) == ROWS

  if name != "dense":
    return  # A program is not compiled twice for what the other shows.
  with rules.scope(mesh):
    length, state = decoder._read(placed, prompts())
    slots = rounded_up(length + NEW)
    program = GreedyDecoder._proceed.lower(decoder, placed, state, np.int32(NEW)).compile().as_text()
  layers, heads, width = config.text.num_layers, config.text.num_kv_heads, config.text.head_dim
  rows = ROWS // 2
  spread, whole = (f"f32[{layers},{r},{k},{slots},{width}]" for r, k in ((rows, heads // 2), (ROWS, heads)))
  assert spread in program and whole not in program


def test_more_devices_than_there_are(tmp_path):
  with pytest.raises(UserError, match="--devices=9: there are 8"):
    open_for_inference(CURVE / "init", bf16=False, devices=9)
