"""Every backend of attention computes what the plain one does, by blocks or by kernels, which are interpreted here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.arguments import MeshConfig
from internvl_jax.metrics.flops import count_flops
from internvl_jax.models.attention import BACKENDS, Mask, attention, cpu, triton, xla
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules

FAST = ["xla", "cpu", "splash_interpret", "triton_interpret"]
WITH_PLACES = ["xla", "cpu", "triton_interpret"]
"""Those that take queries from any place of a row."""


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
  """Blocks that short rows have several of."""
  monkeypatch.setattr(xla, "BLOCK", 64)
  monkeypatch.setattr(cpu, "CORES", cpu.ONE_CORE)


def arrays(length, *, sinks=False, heads=(4, 2), width=16, rows=2, dtype="f4"):
  rng = np.random.default_rng(0)
  (N, K), shape = heads, (rows, length)
  found = {
    "q": rng.normal(size=(*shape, N, width)),
    "k": rng.normal(size=(*shape, K, width)),
    "v": rng.normal(size=(*shape, K, width)),
  }
  if sinks:
    found["sinks"] = rng.normal(size=N)
  return {name: jnp.asarray(value, dtype) for name, value in found.items()}


def segments(length, rows=2):
  """Three samples a row and padding, cut elsewhere in each row."""
  cuts = np.array([[length // 4 + 3 * row, length // 2, length - 7] for row in range(rows)])
  return jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1) + 1) % 4


@functools.partial(jax.jit, static_argnames=("backend", "over"))
def outputs_and_gradients(inputs, mask, backend, over="rows"):
  """Attention, and the gradients of a number that all outputs change, but for those of padding."""
  counted = 1 if mask.segments is None else (mask.segments > 0)[..., None, None]

  def run(inputs):
    q, k, v = (inputs[name] for name in "qkv")
    out = attention(q, k, v, mask, sinks=inputs.get("sinks"), over=over, backend=backend) * counted
    return jnp.sum(jnp.sin(out.astype("f4")) * jnp.arange(1, q.shape[-1] + 1)), out

  (_, out), gradients = jax.value_and_grad(run, has_aux=True)(inputs)
  return {"out": out, **gradients}


def assert_near(ours, theirs, relative=1e-5):
  for name, expected in theirs.items():
    expected = np.asarray(expected, "f8")
    np.testing.assert_allclose(
      np.asarray(ours[name], "f8"), expected, rtol=0, atol=relative * np.abs(expected).max(), err_msg=name
    )


MASKS = {
  "causal": (128, {"causal": True}),
  "packed": (256, {"causal": True, "segments": segments(256)}),
  "packed, no whole blocks": (200, {"causal": True, "segments": segments(200)}),
  "tiles": (145, {"causal": False}),
  "tiles, whole blocks": (128, {"causal": False}),
  "full segments": (150, {"causal": False, "segments": segments(150)}),
  "window": (256, {"causal": True, "segments": segments(256), "windows": (40,)}),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_agree(name, backend):
  length, mask = MASKS[name]
  over = "tiles" if name.startswith("tiles") else "rows"
  inputs, mask = arrays(length), Mask(**mask)
  assert_near(
    outputs_and_gradients(inputs, mask, backend, over), outputs_and_gradients(inputs, mask, "plain", over)
  )


@pytest.mark.parametrize("backend", WITH_PLACES)
@pytest.mark.parametrize(("heads", "width"), [((3, 3), 64), ((6, 1), 48), ((8, 2), 128)])
def test_heads_and_their_widths(heads, width, backend):
  inputs, mask = arrays(136, heads=heads, width=width, rows=1), Mask(causal=True, segments=segments(136, 1))
  assert_near(outputs_and_gradients(inputs, mask, backend), outputs_and_gradients(inputs, mask, "plain"))


@pytest.mark.parametrize("backend", FAST)
def test_half_precision_to_rounding(backend):
  """No further from float32 than what the plain backend rounds to, where both get the same numbers."""
  mask = Mask(causal=True, segments=segments(200))
  inputs = arrays(200, width=64, dtype=jnp.bfloat16)
  exact = outputs_and_gradients({name: x.astype("f4") for name, x in inputs.items()}, mask, "plain")
  ours, plain = (outputs_and_gradients(inputs, mask, name) for name in (backend, "plain"))
  for name, expected in exact.items():
    error, allowed = (np.abs(np.asarray(found[name], "f4") - expected) for found in (ours, plain))
    assert error.max() <= 1.5 * allowed.max(), name
    assert error.mean() <= 1.1 * allowed.mean(), name


@pytest.mark.parametrize("backend", FAST)
def test_sinks_and_windows_that_differ_by_layer(backend):
  """As in gpt-oss, whose layers are scanned: which window it is, only the running program knows."""
  for length, window in ((256, 40), (131, 131)):
    inputs, windows = arrays(length, sinks=True), (40, length)
    mask = Mask(causal=True, segments=segments(length), windows=windows, window=jnp.asarray(window))
    assert_near(outputs_and_gradients(inputs, mask, backend), outputs_and_gradients(inputs, mask, "plain"))


# Segments of a row, their tokens, and the segment whose prompt they see: two pairs; a prompt of three answers.
SHARING = {
  2: [(1, 70, 1), (1, 20, 0), (2, 38, 1), (3, 30, 3), (3, 25, 0), (4, 60, 3)],
  3: [(1, 70, 1), (1, 20, 0), (2, 38, 1), (3, 55, 1), (4, 60, 0)],
}


def answers(most=2):
  """A row of answers that see the prompts of others before them: segments, and their parents."""
  lengths = [tokens for _, tokens, _ in SHARING[most]]
  ids, parents = (np.repeat([part[i] for part in SHARING[most]], lengths) for i in (0, 2))
  return tuple(jnp.pad(jnp.asarray(x)[None], ((0, 0), (0, 13))) for x in (ids, parents))


@pytest.mark.parametrize("most", SHARING)
@pytest.mark.parametrize("backend", FAST)
def test_a_shared_prompt_is_seen_by_all_its_answers(backend, most):
  """As if every answer stood behind a prompt of its own."""
  ids, parents = answers(most)
  inputs = arrays(ids.shape[1], rows=1)
  mask = Mask(causal=True, segments=ids, parent=parents, answers=most)
  found = outputs_and_gradients(inputs, mask, backend)["out"]
  q, k, v = (inputs[name] for name in "qkv")
  ids, parents = np.asarray(ids[0]), np.asarray(parents[0])
  for segment in set(ids[(parents > 0) & (parents != ids)].tolist()):
    (first,) = set(parents[ids == segment].tolist())
    sees = np.flatnonzero((ids == first) & (parents == first) | (ids == segment))
    alone = attention(q[:, sees], k[:, sees], v[:, sees], Mask(causal=True), backend="plain")
    answer = ids[sees] == segment
    np.testing.assert_allclose(found[:, sees[answer]], alone[:, answer], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "triton_interpret"])
def test_shared_prompts_at_once_and_in_turns(backend):
  """Also beside a row in which nothing is shared."""
  ids, parents = (jnp.concatenate([x, x]) for x in answers())
  parents = parents.at[1].set(0)
  inputs, mask = arrays(ids.shape[1]), Mask(causal=True, segments=ids, parent=parents)
  assert_near(outputs_and_gradients(inputs, mask, backend), outputs_and_gradients(inputs, mask, "plain"))


@pytest.mark.parametrize("backend", WITH_PLACES)
def test_queries_from_any_place(backend):
  """As against a cache: 70 queries of the middle of a row."""
  inputs, ids = arrays(200), segments(200)
  q, mask = (
    inputs["q"][:, 90:160],
    Mask(causal=True, segments=ids[:, 90:160], kv_segments=ids, q_index=jnp.arange(90, 160)),
  )
  whole = attention(*(inputs[name] for name in "qkv"), Mask(causal=True, segments=ids), backend="plain")
  found = attention(q, inputs["k"], inputs["v"], mask, backend=backend)
  np.testing.assert_allclose(found, whole[:, 90:160], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["plain", *FAST])
def test_a_segment_never_sees_another(backend):
  """What other segments hold changes no bit of a segment's outputs and gradients."""
  ids = segments(200, rows=1)
  mine = np.asarray(ids[0]) == 2
  inputs, mask = arrays(200, rows=1), Mask(causal=True, segments=ids)
  found = outputs_and_gradients(inputs, mask, backend)
  changed = {name: x.at[:, ~mine].multiply(-7.0) for name, x in inputs.items()}
  after = outputs_and_gradients(changed, mask, backend)
  for name in found:
    np.testing.assert_array_equal(found[name][:, mine], after[name][:, mine], err_msg=name)
    assert np.abs(found[name][:, ~mine] - after[name][:, ~mine]).max() > 1e-3


def test_a_query_that_sees_nothing_gets_finite_numbers():
  inputs, ids = arrays(128, rows=1), jnp.where(jnp.arange(128) < 100, 1, 0)[None]
  mask = Mask(causal=True, segments=ids, kv_segments=jnp.where(ids > 0, 1, 5))
  for backend in ("plain", *WITH_PLACES):
    found = outputs_and_gradients(inputs, mask, backend)
    assert all(np.isfinite(x).all() for x in found.values()), backend


# --- On a mesh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "splash_interpret", "triton_interpret"])
@pytest.mark.parametrize(
  ("axes", "heads"),
  [
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, 4),  # Heads over both; of keys, one for two devices.
    ({"sequence": 4, "data": 2}, 6),  # Four do not divide the heads, so queries are split.
  ],
)
def test_on_a_mesh_under_scan_and_rematerialisation(axes, heads, backend):
  """Layers are scanned and rematerialised around the kernels, which see a device's heads and queries."""
  length, rows = 512, 2
  mesh = meshes.make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[: np.prod(list(axes.values()))])
  inputs = arrays(length, heads=(heads, 2), rows=rows)
  mask = Mask(causal=True, segments=segments(length, rows))

  def layers(inputs, backend):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, scale):
      q = rules.constrain(x * scale, "rows", "tokens", None, None)
      return x + attention(q, inputs["k"], inputs["v"], mask, backend=backend), None

    out, _ = jax.lax.scan(layer, inputs["q"], jnp.array([1.0, 0.5]))
    return jnp.sum(jnp.sin(out))

  _, expected = jax.jit(jax.value_and_grad(functools.partial(layers, backend="plain")))(inputs)
  placed = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec()))
  with rules.scope(mesh):
    _, found = jax.jit(jax.value_and_grad(functools.partial(layers, backend=backend)))(placed)
  assert_near(found, expected)


# --- What is not computed -----------------------------------------------------------------------------------


def test_blocks_cost_what_the_mask_leaves(monkeypatch):
  """Of a causal square little more than half, of 1,025 patches little more than these."""
  monkeypatch.setattr(xla, "BLOCK", 512)

  def flops(T, N, K, H, causal, backend):
    shapes = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]

    def run(q, k, v):
      return jnp.sum(attention(q, k, v, Mask(causal=causal), backend=backend).astype("f4"))

    return count_flops(jax.grad(run, argnums=(0, 1, 2)), *shapes)

  # Two products forward, and five on the way back, of which one computes the scores again.
  triangle = 7 * (2 * 8192**2 * 128 * 28) / 2
  assert triangle == pytest.approx(1.7e12, rel=0.02)
  assert flops(8192, 28, 4, 128, True, "xla") == pytest.approx(triangle * 17 / 16, rel=1e-6)
  square = 7 * 2 * 1025**2 * 64 * 16
  assert square < flops(1025, 16, 16, 64, False, "xla") < 1.02 * square


def brute_force(mask, T, S, TB, SB):
  """Which pairs of blocks have something visible, and which nothing hidden, element by element."""
  i, j = np.arange(T)[:, None], np.arange(S)
  ids = np.asarray(mask.segments)
  visible = ids[:, :, None] == np.asarray(mask.kv_segments)[:, None]
  if mask.parent is not None:
    parents = np.asarray(mask.parent)
    visible |= (parents[:, :, None] == ids[:, None]) & ((parents == ids) & (ids > 0))[:, None]
  if mask.causal:
    visible &= (i >= j) & (i - j < (mask.windows[0] if mask.windows else S))
  I, J = -(-T // TB), -(-S // SB)
  some, every = (np.zeros((len(ids), I, J), bool) for _ in range(2))
  for b, x, y in np.ndindex(*some.shape):
    block = visible[b, x * TB : (x + 1) * TB, y * SB : (y + 1) * SB]
    some[b, x, y], every[b, x, y] = block.any(), block.all() and (y + 1) * SB <= S
  return some, every


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["packed", "packed, no whole blocks", "window", "full segments", "pairs"])
def test_kernels_meet_the_blocks_that_the_mask_leaves(name, transposed):
  """All of those with something visible, no others where segments are alone, and nothing is left uncompared."""
  if name == "pairs":
    ids, parents = answers()
    mask = Mask(causal=True, segments=ids, parent=parents)
  else:
    mask = Mask(**MASKS[name][1])
  T = mask.segments.shape[1]
  some, every = brute_force(mask, T, T, 32, 16)
  shape = triton.Shape(T=T, S=T, G=1, H=16, TB=32, SB=16, scale=1.0, causal=mask.causal)
  found = triton._meetings(triton._known(mask, 256, 256), shape)
  if transposed:
    some, every, *found = (pairs.swapaxes(1, 2) for pairs in (some, every, *found))
  spans = triton._spans(*found)
  for b, block in np.ndindex(*some.shape[:2]):
    first, whole, until, last = (int(np.broadcast_to(x, some.shape[:2])[b, block]) for x in spans)
    met = np.flatnonzero(some[b, block])
    if met.size:
      assert first <= met[0] and met[-1] < last, "a block is missing"
      if name != "pairs":
        assert (first, last) == (met[0], met[-1] + 1), "a block of nothing"
    assert first <= whole <= until <= last
    assert every[b, block, whole:until].all(), "what is hidden is not compared"


@pytest.mark.parametrize("name", ["causal", "packed", "packed, no whole blocks", "window", "full segments"])
def test_blocks_on_cpus_are_those_that_the_mask_leaves(name):
  """From the first to the last of which something is visible, in each row for itself."""
  length, options = MASKS[name]
  mask = Mask(**({"segments": jnp.ones((1, length), int)} | options))
  q, k = (jax.ShapeDtypeStruct((len(mask.segments), length, heads, 16), "f4") for heads in (8, 1))
  shape = cpu._Shape.of(q, k, mask)
  assert min(shape.query_blocks, shape.key_blocks) >= 2
  some, _ = brute_force(mask, length, length, shape.TB, shape.SB)
  first, last = cpu._spans(*cpu._tokens(mask, shape), mask, shape)
  for b, block in np.ndindex(*some.shape[:2]):
    met = np.flatnonzero(some[b, block])
    assert (first[b, block], last[b, block]) == (met[0], met[-1] + 1)


# --- The table ----------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_named():
  q = jnp.zeros((1, 2, 2, 4))
  with pytest.raises(ValueError, match="'flash'"):
    attention(q, q, q, Mask(causal=True), backend="flash")


def test_what_a_backend_does_not_have_is_refused():
  q, mask = jnp.zeros((1, 2, 2, 4)), Mask(causal=True, q_index=jnp.arange(2))
  with pytest.raises(ValueError, match="'splash_interpret' has no index of queries: use 'xla'"):
    attention(q, q, q, mask, backend="splash_interpret")


def test_every_row_of_the_table_can_be_loaded_and_has_a_reason():
  for row in BACKENDS:
    assert callable(row.load()) and row.reason, row.name
