"""Attention alone: its kernels' numbers against plain attention in float32, their times, and the times of other tilings.

Letters: B rows, T tokens, N query heads, K key-value heads, H head width.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_rows
from gpu_report import first_line
from gpu_results import Results
from gpu_timing import time_calls
from internvl_jax.models.attention import Mask, attention, triton


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A call of attention.

  Attributes:
    name: what a table calls it.
    B, T, N, K, H: see above.
    kind: "packed" (causal, in segments), "causal", "full", or "pairs" (two answers with a shared prompt).
    window: of a packed row; None: all before.
    sinks: whether heads have a sink.
  """

  name: str
  T: int
  N: int
  K: int
  H: int
  B: int = 1
  kind: str = "packed"
  window: int | None = None
  sinks: bool = False

  @property
  def over(self) -> Any:
    """What B counts."""
    return "tiles" if self.kind == "full" else "rows"

  def mask(self) -> Mask:
    """Which keys a query sees."""
    if self.kind in ("full", "causal"):
      return Mask(causal=self.kind == "causal")
    if self.kind == "pairs":
      ids, parents = pairs(self.T)
      return Mask(causal=True, segments=ids, parent=parents)
    ids = jnp.asarray(gpu_rows.segment_ids(self.T))[None].repeat(self.B, axis=0)
    return Mask(causal=True, segments=ids, windows=() if self.window is None else (self.window,))

  def inputs(self, dtype: Any = jnp.bfloat16) -> dict[str, jax.Array]:
    """Random q, k, v, and sinks where there are some."""
    shapes: dict[str, tuple[int, ...]] = {"q": (self.B, self.T, self.N, self.H)}
    shapes |= dict.fromkeys("kv", (self.B, self.T, self.K, self.H))
    if self.sinks:
      shapes["sinks"] = (self.N,)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
      name: jax.random.normal(key, shape, dtype)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def useful_flops(self) -> int:
    """Forward, of the pairs that see each other alone; forward and backward need three times that."""
    seen = {"full": self.T**2, "causal": self.T * (self.T + 1) // 2}.get(self.kind)
    seen = gpu_rows.causal_pairs(self.T, self.window) if seen is None else seen
    return 4 * self.B * self.N * self.H * seen


def pairs(T: int) -> tuple[jax.Array, jax.Array]:
  """A row of two preference pairs and padding: segments [1, T], and the segments whose prompts they see."""
  parts = [
    (1, 0.35, 1),
    (1, 0.08, 0),
    (2, 0.1, 1),
    (3, 0.25, 3),
    (3, 0.1, 0),
    (4, 0.1, 3),
  ]
  lengths = [max(1, int(share * T)) for _, share, _ in parts]
  ids = np.repeat([segment for segment, _, _ in parts], lengths)
  parents = np.repeat([parent for _, _, parent in parts], lengths)
  fill = (0, T - len(ids))
  return jnp.asarray(np.pad(ids, fill))[None], jnp.asarray(np.pad(parents, fill))[None]


def compared_shapes(toy: bool) -> list[Shape]:
  """What numbers are compared on."""
  T, patches = (96, 65) if toy else (2048, 1025)
  heads = (4, 2) if toy else (16, 8)
  return [
    Shape(name="packed causal", T=T, N=heads[0], K=heads[1], H=16 if toy else 128),
    Shape(name="packed causal", T=T, N=3 if toy else 14, K=1 if toy else 2, H=16 if toy else 64),
    Shape(name="ViT", B=2, T=patches, N=heads[0], K=heads[0], H=16 if toy else 64, kind="full"),
    Shape(
      name="window and sinks",
      T=T,
      N=heads[0],
      K=heads[1],
      H=16 if toy else 64,
      window=24 if toy else 128,
      sinks=True,
    ),
    Shape(name="shared prompts", T=T, N=heads[0], K=heads[1], H=16 if toy else 128, kind="pairs"),
  ]


def timed_shapes(toy: bool) -> list[Shape]:
  """What is timed: the attention of published sizes, rows of 8,192 tokens and the ViT over 24 tiles."""
  if toy:
    return [
      Shape(name="toy decoder", T=64, N=4, K=2, H=16),
      Shape(name="toy ViT", B=2, T=17, N=2, K=2, H=16, kind="full"),
    ]
  return [
    Shape(name="InternVL3-1B", T=8192, N=14, K=2, H=64),
    Shape(name="InternVL3-2B", T=8192, N=12, K=2, H=128),
    Shape(name="InternVL3-8B", T=8192, N=28, K=4, H=128),
    Shape(name="InternVL3-8B, one segment", T=8192, N=28, K=4, H=128, kind="causal"),
    Shape(name="gpt-oss-20B, window", T=8192, N=64, K=8, H=64, window=128, sinks=True),
    Shape(name="InternViT-300M", B=24, T=1025, N=16, K=16, H=64, kind="full"),
  ]


REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, RuntimeError)
"""What a compiler or a card raises where it cannot do what it is asked for."""


# --- Numbers ------------------------------------------------------------------------------------------------


def outputs_and_gradients(
  shape: Shape, backend: str
) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
  """The jitted function of inputs -> the outputs, and the gradients of a number that all of them change."""
  mask = shape.mask()
  counted = 1 if mask.segments is None else (mask.segments > 0)[..., None, None]

  def run(inputs):
    q, k, v = (inputs[name] for name in "qkv")
    out = attention(q, k, v, mask, sinks=inputs.get("sinks"), over=shape.over, backend=backend) * counted
    return jnp.sum(jnp.sin(out.astype(jnp.float32)) * jnp.arange(1, shape.H + 1) / shape.H), out

  def both(inputs):
    (_, out), gradients = jax.value_and_grad(run, has_aux=True)(inputs)
    return {"out": out, **{f"d{name}": value for name, value in gradients.items()}}

  return jax.jit(both)


def relative_errors(found: dict[str, jax.Array], exact: dict[str, jax.Array]) -> dict[str, dict[str, float]]:
  """Of each array, the largest and the mean error over the largest magnitude of what is exact."""
  errors = {}
  for name, expected in exact.items():
    error = np.abs(np.asarray(found[name], np.float32) - np.asarray(expected, np.float32))
    most = float(np.abs(np.asarray(expected, np.float32)).max())
    errors[name] = {"max": float(error.max()) / most, "mean": float(error.mean()) / most}
  return errors


def compare(results: Results, unit: str, *, toy: bool) -> None:
  """The kernels in bfloat16 against plain attention in float32 of the same numbers, and XLA's beside them."""
  for shape in compared_shapes(toy):
    inputs = shape.inputs()
    with jax.default_matmul_precision("highest"):
      wide = {name: value.astype(jnp.float32) for name, value in inputs.items()}
      exact = jax.device_get(outputs_and_gradients(shape, "plain")(wide))
    for backend in ("triton_interpret" if toy else "triton", "xla"):
      case = f"{shape.name}, N {shape.N}, H {shape.H}"
      add_errors(results, unit, case, backend, exact, outputs_and_gradients(shape, backend), inputs)


def add_errors(
  results: Results,
  unit: str,
  case: str,
  backend: str,
  exact: dict[str, jax.Array],
  function: Callable[..., dict[str, jax.Array]],
  *args: Any,
) -> None:
  """Adds a row of the errors of what a function computes, or why it cannot."""
  try:
    found = jax.device_get(function(*args))
  except REFUSALS as error:
    results.add(unit, case=case, backend=backend, refused=first_line(error))
    return
  errors = relative_errors(found, exact)
  columns = {}
  for kind in ("max", "mean"):
    columns[f"forward_{kind}"] = errors["out"][kind]
    columns[f"backward_{kind}"] = max(error[kind] for name, error in errors.items() if name != "out")
  results.add(unit, case=case, backend=backend, **columns, errors=errors)


# --- Times --------------------------------------------------------------------------------------------------


def cudnn(q, k, v, mask: Mask, sinks, over) -> jax.Array:
  """cuDNN's attention, where its mask is one that it knows without an array."""
  assert mask.segments is None and sinks is None
  del over
  return jax.nn.dot_product_attention(q, k, v, is_causal=mask.causal, implementation="cudnn")


def passes(shape: Shape, attend: Callable) -> dict[str, tuple[Callable, int]]:
  """The jitted functions to time, forward, and forward and backward, with the operations that each needs."""
  mask = shape.mask()

  def forward(inputs):
    q, k, v = (inputs[name] for name in "qkv")
    return attend(q, k, v, mask, sinks=inputs.get("sinks"), over=shape.over)

  def total(inputs):
    # A random cotangent: a card draws less power, and runs faster, where all numbers are alike.
    return jnp.sum(forward(inputs).astype(jnp.float32) * jax.lax.stop_gradient(inputs["q"]))

  flops = shape.useful_flops()
  return {
    "forward": (jax.jit(forward), flops),
    "forward and backward": (jax.jit(jax.value_and_grad(total)), 3 * flops),
  }


def attempt(
  results: Results, unit: str, row: dict[str, Any], function: Callable, flops: int, *args: Any
) -> None:
  """Times a function and adds the row; what a compiler or the card refuses is a row, too."""
  try:
    timing = time_calls(function, *args)
  except REFUSALS as error:
    results.add(unit, **row, refused=first_line(error))
    return
  results.add(unit, **row, **timing.as_ms(), tflops=flops / timing.median / 1e12)


def measure(results: Results, unit: str, *, toy: bool) -> None:
  """Times of attention alone at the shapes of published sizes, by each backend."""
  for shape in timed_shapes(toy):
    inputs = shape.inputs()
    contenders: dict[str, Callable] = {
      name: functools.partial(attention, backend=name)
      for name in ("triton_interpret" if toy else "triton", "xla")
    }
    if shape.kind in ("full", "causal") and not toy:
      contenders["cudnn"] = cudnn
    for name, attend in contenders.items():
      for which, (function, flops) in passes(shape, attend).items():
        row: dict[str, Any] = {
          "case": shape.name,
          "heads": f"{shape.N}/{shape.K} x {shape.H}",
          "backend": name,
          "pass": which,
        }
        row["mib"] = round(sum(value.nbytes for value in inputs.values()) / 2**20, 1)
        attempt(results, unit, row, function, flops, inputs)


# --- Tilings ------------------------------------------------------------------------------------------------

_FORWARD = [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3)]
_BACKWARD_Q = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)]
_BACKWARD_KV = [(64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2)]
CANDIDATES = {"forward": _FORWARD, "q": _BACKWARD_Q, "kv": _BACKWARD_KV}
"""Tilings (TB, SB, warps, stages) that are tried in the place of the table's, one kernel at a time."""


@contextlib.contextmanager
def tiled(field: str, tiling: Any) -> Iterator[list[int]]:
  """Attention's kernels with another tiling for one of them; yields a list that grows when the table is asked."""
  own, asked = triton._tilings, []

  def tilings(dtype, H):
    asked.append(H)
    return own(dtype, H)._replace(**{field: tiling})

  triton._tilings = tilings
  # What was traced before would be taken for this.
  jax.clear_caches()
  try:
    yield asked
  finally:
    triton._tilings = own
    jax.clear_caches()


def sweep(results: Results, unit: str, *, toy: bool) -> None:
  """Times of the kernels by tiling, of which the table's own is marked."""
  backend = "triton_interpret" if toy else "triton"
  shapes = timed_shapes(toy)[:1] if toy else timed_shapes(toy)[:2]
  for shape in shapes:
    inputs = shape.inputs()
    own = triton._tilings(jnp.dtype(jnp.bfloat16), shape.H)
    for field, candidates in CANDIDATES.items():
      table = getattr(own, field)
      which = "forward" if field == "forward" else "forward and backward"
      for candidate in [table, *(type(table)(*c) for c in candidates if c != table)][: 2 if toy else None]:
        with tiled(field, candidate) as asked:
          function, flops = passes(shape, functools.partial(attention, backend=backend))[which]
          row = {"case": shape.name, "kernel": field, "tiling": list(candidate), "own": candidate == table}
          attempt(results, unit, row, function, flops, inputs)
          assert asked, "the kernels were not traced anew"
