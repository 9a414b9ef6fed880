"""ViCO's objectives against direct computation, sample by sample and with all logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.arguments import ModelArguments
from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.models import flash, functional
from internvl_jax.models.flash import FlashConfig
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.tasks.preference.policy import COPIES, ReferencePolicy
from internvl_jax.tasks.vico import objective as objectives
from internvl_jax.tasks.vico.batch import FlashBatch, FullRows
from internvl_jax.tasks.vico.objective import Consistency, Routing
from tests.support.harness import toy

P, Q, LENGTH = 4, 1, 24
CONFIG = dataclasses.replace(
  toy(vision_layers=1, text_layers=1), flash=FlashConfig(relative_threshold=0.3, absolute_threshold=0.5)
)
# Of each sample: its row, which of its tiles are compressed, tokens of its question and of its answer.
SAMPLES = ((0, (1, 0), 2, 3), (0, (), 2, 1), (1, (0,), 1, 4), (1, (1,), 3, 2))


@functools.cache
def model_and_params():
  model = functional.define(lambda rngs: InternVL(CONFIG, rngs=rngs))
  rng = np.random.default_rng(0)
  params = {
    path: jnp.asarray(
      rng.normal(size=leaf.shape, scale=0.3) + path.endswith(("scale", "ls1", "ls2")), jnp.float32
    )
    for path, leaf in model.shapes.items()
  }
  return model, params


@functools.cache
def samples():
  """Of each sample its tiles, and ids with and without compressed tiles; image tokens are 39."""
  rng, found = np.random.default_rng(1), []
  for row, compressed, asked, answered in SAMPLES:
    tiles = rng.integers(0, 256, (len(compressed), 16, 16, 3)).astype("u1")
    text, answer = rng.integers(0, 38, asked), rng.integers(0, 38, answered)
    forms = [
      np.concatenate([[38], np.full(sum(counts), 39), text, answer]).astype("i4")
      for counts in ([Q if c else P for c in compressed], [P] * len(compressed))
    ]
    found.append((row, tiles, np.array(compressed, bool), answered, *forms))
  return found


def batch_of():
  """The samples in two rows of one shard."""
  fields = {name: np.zeros((2, LENGTH), "i4") for name in ("input_ids", "positions", "segment_ids")}
  rows, full = ({name: value.copy() for name, value in fields.items()} for _ in range(2))
  for each in (rows, full):
    each["image_index"] = np.full((2, LENGTH), NO_IMAGE, "i4")
  targets, place = np.full((2, LENGTH), IGNORE_INDEX, "i4"), np.zeros((2, LENGTH), "i4")
  ends, segments, first = {}, {}, 0
  owners = []
  for row, tiles, compressed, answered, short, long in samples():
    segments[row] = segment = segments.get(row, 0) + 1
    spans = []
    for each, ids, width in ((rows, short, P + Q), (full, long, P)):
      start = ends.get((row, width), 0)
      span = slice(start, start + len(ids))
      ends[row, width] = span.stop
      each["input_ids"][row, span], each["segment_ids"][row, span] = ids, segment
      each["positions"][row, span] = np.arange(len(ids))
      used = compressed if width != P else np.zeros_like(compressed)
      index = [(first + t) * width + (P + np.arange(Q) if c else np.arange(P)) for t, c in enumerate(used)]
      each["image_index"][row, start + 1 : start + 1 + sum(map(len, index))] = np.concatenate([*index, []])
      spans.append(span)
    here, there = spans
    targets[row, here.stop - answered - 1 : here.stop - 1] = short[-answered:]
    tail = len(short) - 1 - int((short == 39).sum())
    place[row, here.stop - tail : here.stop] = there.stop - tail + np.arange(tail)
    owners += [(row, segment, bool(c)) for c in compressed]
    first += len(tiles)
  tiles = np.concatenate([tiles for _, tiles, *_ in samples()])
  row, segment, weight = zip(*owners, strict=True)
  batch = FlashBatch(
    rows=TokenBatch(
      **rows, targets=targets, loss_weight=(targets != IGNORE_INDEX).astype("f4"), tiles=tiles[None]
    ),
    full=FullRows(**full),
    place=place,
    tile_weight=np.array(weight, "f4")[None],
    tile_row=np.array(row, "i4")[None],
    tile_segment=np.array(segment, "i4")[None],
  )
  return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)


def logits_of(model, tiles, compressed, ids):
  """Logits [S, V] of one sample by itself."""
  features = []
  if len(tiles):
    hidden = model.encode(normalize_tiles(jnp.asarray(tiles), "imagenet"), Execution())
    usual, few = model.project(hidden), model.compress(hidden)
    features = [few[i] if c else usual[i] for i, c in enumerate(compressed)]
  x = model.language_model.model.embed_tokens(jnp.asarray(ids)[None], dtype=jnp.float32)
  if features:
    x = x.at[0, np.flatnonzero(ids == 39)].set(jnp.concatenate(features))
  hidden, _ = model.decode(x, Execution(), positions=jnp.arange(len(ids))[None], segment_ids=None)
  return model.logits(hidden)[0]


def divergences(model, teacher):
  """Of each sample, the divergences [answered] of its answer's tokens."""
  found = []
  for _, tiles, compressed, answered, short, long in samples():
    ours = logits_of(model, tiles, compressed, short)[-answered - 1 : -1]
    theirs = logits_of(teacher, tiles, np.zeros_like(compressed), long)[-answered - 1 : -1]
    p, q = (jax.nn.log_softmax(x) for x in (theirs, ours))
    found.append(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
  return found


def start_of(params):
  """A student that has moved from the teacher, which `COPIES` are of."""
  rng = np.random.default_rng(2)
  moved = {
    path: value + 0.05 * jnp.asarray(rng.normal(size=value.shape), jnp.float32)
    for path, value in params.items()
  }
  return {**moved, **{COPIES + path: value for path, value in params.items()}}


def consistency(model, **changes):
  settings = {
    "model": model,
    "how": Execution(),
    "normalize_type": "imagenet",
    "all_gather": True,
    "teacher": ReferencePolicy(model=model, shares_features=False),
    "shares_vision": False,
  }
  return Consistency(**settings | changes)


def loss_of(objective, params, batch, running=None):
  weights = objective.weights(batch)
  one = jax.tree.map(lambda leaf: leaf[0], (batch, weights))
  return objective.loss(params, *one, jax.random.key(0), running or objective.initial_running())


@pytest.mark.parametrize("fused", [True, False], ids=["chunks", "plain"])
def test_consistency_is_the_mean_divergence_from_the_start(fused):
  model, start = model_and_params()
  params, batch = start_of(start), batch_of()
  objective = consistency(model, fused_loss=fused)

  def direct(params):
    student, teacher = model.bind(params), model.bind(start)
    return jnp.mean(jnp.concatenate(divergences(student, teacher)))

  ours, theirs = (
    jax.jit(jax.value_and_grad(f))(params)
    for f in (lambda params: loss_of(objective, params, batch)[0], direct)
  )
  assert ours[0] > 0.01
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
  for path, value in theirs[1].items():
    np.testing.assert_allclose(ours[1][path], value, rtol=0, atol=2e-4, err_msg=path)
  assert all(not np.any(value) for path, value in ours[1].items() if path.startswith((COPIES, "gating")))
  assert np.any(ours[1]["mlp2.linear_1.kernel"])


def test_a_frozen_vit_runs_once_for_both():
  model, start = model_and_params()
  moved, batch = start_of(start), batch_of()
  params = {path: start[path] if path.startswith("vision_model") else value for path, value in moved.items()}
  one, other = (
    jax.jit(
      lambda params, shares=shares: loss_of(consistency(model, shares_vision=shares), params, batch)[0]
    )(params)
    for shares in (True, False)
  )
  np.testing.assert_allclose(one, other, rtol=1e-5)


def test_without_compressed_tiles_the_start_is_its_own_teacher():
  model, params = model_and_params()
  batch = batch_of()
  index = jnp.where(
    batch.full.image_index == NO_IMAGE,
    NO_IMAGE,
    batch.full.image_index // P * (P + Q) + batch.full.image_index % P,
  )
  plain = batch._replace(
    rows=batch.rows._replace(**batch.full._replace(image_index=index)._asdict()),
    place=jnp.broadcast_to(jnp.arange(LENGTH), batch.place.shape),
  )
  copies = {COPIES + path: value for path, value in params.items()}
  loss, outcome = jax.jit(lambda params: loss_of(consistency(model), params, plain))({**params, **copies})
  assert float(loss) == 0 and float(outcome.terms["kl"]) == 0


def test_routing_is_the_cross_entropy_of_what_compressing_a_tile_changes():
  model, params = model_and_params()
  batch, past = batch_of(), np.array([0.001, 0.02, 0.3], "f4")
  objective = Routing(
    model=model, how=Execution(), normalize_type="imagenet", all_gather=True, percentile=45.0, window=8
  )
  running = objective.initial_running()
  running = {"changes": running["changes"].at[:3].set(past), "next_change": jnp.float32(3)}

  def run(router):
    return loss_of(objective, {**params, **router}, batch, running)

  router = {path: value for path, value in params.items() if path.startswith(("gating", "pooling"))}
  (loss, outcome), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(router)
  bound = model.bind(params)
  changes = [float(jnp.mean(values)) for values in divergences(bound, bound)]
  changes = [changes[i] for i, (_, compressed, *_) in enumerate(SAMPLES) if any(compressed)]
  threshold = np.percentile([*past, *changes], 45.0)
  total = 0.0
  chosen = [(tiles[c], c) for _, tiles, c, *_ in samples() if c.any()]
  for change, (tiles, _) in zip(changes, chosen, strict=True):
    hidden = bound.encode(normalize_tiles(jnp.asarray(tiles), "imagenet"), Execution())
    total -= jax.nn.log_softmax(bound.gate(hidden))[0, int(change >= threshold)] / len(changes)
  np.testing.assert_allclose(loss, total, rtol=1e-4)
  np.testing.assert_allclose(outcome.running["changes"][: 3 + len(changes)], [*past, *changes], rtol=1e-3)
  assert int(outcome.running["next_change"]) == 3 + len(changes)
  used = trainable_paths(ModelArguments(), model.shapes, "router")
  assert {path for path, value in gradient.items() if np.any(value)} <= used
  assert used <= set(router) and not any("attn3" in path for path in used)


def test_the_window_keeps_the_last():
  rng, window, seen = np.random.default_rng(0), 5, []
  running = {"changes": jnp.full(window, jnp.inf), "next_change": jnp.float32(0)}
  assert objectives.percentile_of(running["changes"], 50) == jnp.inf
  step = jax.jit(objectives.remembered)
  for _ in range(6):
    values, real = rng.random((2, 4)).astype("f4"), rng.random((2, 4)) < 0.6
    values[0, 0] = np.nan
    running = step(running, values, real)
    seen += values[real & np.isfinite(values)].tolist()
    kept = seen[-window:]
    found = np.asarray(running["changes"])
    np.testing.assert_array_equal(np.sort(found[np.isfinite(found)]), np.sort(np.float32(kept)))
    for percent in (0, 30, 75, 100):
      np.testing.assert_allclose(
        objectives.percentile_of(running["changes"], percent), np.percentile(kept, percent), rtol=1e-5
      )
  assert len(seen) > 2 * window


def test_a_new_projector_gives_means_of_what_the_old_one_gives():
  """Exactly, where the four tokens that become one have the same patches; near it for the tokens of any tile."""
  model, params = model_and_params()
  filled = flash.fill_projector(params, [path for path in params if path.startswith("mlp2.")])
  bound = model.bind(filled)
  rng = np.random.default_rng(0)
  patch = rng.normal(size=(3, 2, 2, 16))
  tile = np.tile(patch, (1, 2, 2, 1)).reshape(3, 16, 16)
  hidden = jnp.asarray(np.concatenate([np.zeros((3, 1, 16)), tile], axis=1), jnp.float32)
  usual, few = bound.project(hidden), bound.compress(hidden)
  assert usual.shape == (3, P, 16) and few.shape == (3, Q, 16)
  np.testing.assert_allclose(few[:, 0], usual[:, 0], rtol=0, atol=1e-5)
  # What is read from a checkpoint stays.
  assert flash.fill_projector(params, ["gating.x"])["mlp2.linear_1.kernel"] is params["mlp2.linear_1.kernel"]
