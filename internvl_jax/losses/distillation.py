"""Distillation: the divergence of a student's next-token distribution from a teacher's, of which the top k are known.

The teacher's k likeliest tokens are a class each, and all others together are one more: the tail. The divergence of
these k + 1 probabilities is at most that of the whole distributions, equals it where k is the vocabulary, and is 0 only
where the student agrees in each. Renormalizing the k to a sum of 1 instead teaches more confidence than the teacher has
(arXiv:2503.16870 measures it, and calls the tail a ghost token).

At a temperature T both distributions are softmax(logits / T), and the divergence is multiplied by T^2, which keeps the size
of its gradient (arXiv:1503.02531, section 2).

Letters: R rows, S tokens of a row, E width, V vocabulary, K the teacher's top k; on a device: M tokens, n chunks of C entries.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.losses import lm
from internvl_jax.losses.vocab_parallel import all_gathered, logits_of, over_vocabulary
from internvl_jax.parallel.rules import MeshAxes

LEAST_TAIL = 1e-7
"""The least probability that a teacher's tail has: what float32 leaves of 1 less the others."""

_MIN = float(jnp.finfo(jnp.float32).min)


class TopK(NamedTuple):
  """A teacher's distribution of the next token of each token, as far as it is kept.

  Attributes:
    ids: int32 [..., K], the likeliest tokens.
    logps: floating [..., K], their log-probabilities.
    tail: floating [...], the log of the probability of all others together.
  """

  ids: Int[Array, "... K"]
  logps: Float[Array, "... K"]
  tail: Float[Array, "..."]


class Divergence(NamedTuple):
  """What is measured between teacher and student.

  Attributes:
    kind: "forward" is KL(teacher, student), "reverse" KL(student, teacher).
    temperature: T, what the logits of both are divided by.
  """

  kind: Literal["forward", "reverse"] = "forward"
  temperature: float = 1.0


class Losses(NamedTuple):
  """Losses of tokens, float32 [...], 0 where there is no target.

  Attributes:
    cross_entropy: of the targets, at temperature 1.
    divergence: from the teacher, times T^2.
  """

  cross_entropy: Float[Array, "..."]
  divergence: Float[Array, "..."]


# --- The teacher --------------------------------------------------------------------------------------------


def top_log_probs(
  hidden: Float[Array, "R S E"], kernel: Float[Array, "E V"], *, k: int, size: int, temperature: float
) -> TopK:
  """The k likeliest next tokens of softmax(hidden @ kernel / T), in chunks, on a mesh or without one.

  Args:
    hidden: [R, S, E] in the compute dtype.
    kernel: [E, V], cast to the dtype of `hidden`.
    k: how many.
    size: tokens of the tokenizer; rows of the vocabulary from there on are padding, and get no probability.
    temperature: T.

  Returns:
    [R, S, ...] in float32, sharded like the tokens; the likeliest first.
  """
  return over_vocabulary(functools.partial(_top, k, size, temperature), hidden, kernel)


def _top(
  k: int,
  size: int,
  temperature: float,
  gathered: MeshAxes,
  vocab: MeshAxes,
  *arrays: jax.Array,
) -> TopK:
  """A device's part of `top_log_probs`: arrays are x [M, E], chunks and entries, as `over_vocabulary` gives them."""
  x, chunks, entries = arrays

  def add(carry: tuple[Any, ...], chunk: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, ...], None]:
    best, ids, total = carry
    real = (chunk[1] >= 0) & (chunk[1] < size)
    logits = jnp.where(real, logits_of(gathered, x, *chunk) / temperature, _MIN)
    more = jnp.broadcast_to(chunk[1], logits.shape)
    best, ids = _best(k, jnp.concatenate([best, logits], 1), jnp.concatenate([ids, more], 1))
    return (best, ids, total.add(logits)), None

  none = jnp.full((x.shape[0], k), _MIN, jnp.float32)
  start = (none, jnp.full(none.shape, -1, jnp.int32), _LogSum.of_nothing(x.shape[0]))
  (best, ids, total), _ = jax.lax.scan(add, start, (chunks, entries))
  if vocab:
    best, ids = (jax.lax.all_gather(found, vocab, axis=1, tiled=True) for found in (best, ids))
    best, ids = _best(k, best, ids)
  logps = best - total.over(vocab)[:, None]
  rest = 1 - jnp.sum(jnp.exp(logps), axis=-1)
  return TopK(ids, logps, jnp.log(jnp.maximum(rest, LEAST_TAIL)))


def _best(k: int, logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  best, places = jax.lax.top_k(logits, k)
  return best, jnp.take_along_axis(ids, places, axis=1)


class _LogSum(NamedTuple):
  """A log of a sum of exponentials that grows chunk by chunk: the largest so far, and the sum relative to it, [M]."""

  top: jax.Array
  scaled: jax.Array

  @classmethod
  def of_nothing(cls, tokens: int) -> "_LogSum":
    zero = jnp.zeros(tokens, jnp.float32)
    return cls(jnp.full_like(zero, _MIN), zero)

  def add(self, logits: jax.Array) -> "_LogSum":
    """With those of logits [M, C]."""
    top = jnp.maximum(self.top, jnp.max(logits, axis=-1))
    more = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    return _LogSum(top, self.scaled * jnp.exp(self.top - top) + more)

  def over(self, vocab: MeshAxes) -> jax.Array:
    """The logarithm [M], of the parts of all devices that split the vocabulary."""
    if not vocab:
      return self.top + jnp.log(self.scaled)
    top = jax.lax.pmax(self.top, vocab)
    return top + jnp.log(jax.lax.psum(self.scaled * jnp.exp(self.top - top), vocab))


# --- The student --------------------------------------------------------------------------------------------


def linear_token_losses(
  hidden: Float[Array, "R S E"],
  kernel: Float[Array, "E V"],
  targets: Int[Array, "R S"],
  teacher: TopK,
  how: Divergence,
) -> Losses:
  """Losses [R, S] of the logits hidden @ kernel, in chunks of the vocabulary, on a mesh or without one.

  Args:
    hidden: [R, S, E] in the compute dtype.
    kernel: [E, V], cast to the dtype of `hidden`.
    targets: int [R, S]; IGNORE_INDEX has no losses.
    teacher: [R, S, ...], at the same temperature.
    how: the divergence.
  """
  complete = teacher.ids.shape[-1] >= kernel.shape[1]
  compute = functools.partial(_with_known, how, complete)
  return over_vocabulary(compute, hidden, kernel, targets, *_normalized(teacher, complete))


def token_losses(
  logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], teacher: TopK, how: Divergence
) -> Losses:
  """The same of whole logits, the plain way."""
  complete = teacher.ids.shape[-1] >= logits.shape[-1]
  teacher = _normalized(teacher, complete)
  scaled = logits / how.temperature
  whole = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
  classes = jnp.take_along_axis(scaled, teacher.ids, axis=-1)
  if not complete:
    nowhere = jnp.zeros(logits.shape, bool)
    is_class = jnp.put_along_axis(nowhere, teacher.ids, jnp.bool_(True), axis=-1, inplace=False)
    tail = jax.nn.logsumexp(scaled, axis=-1, keepdims=True, where=~is_class)
    classes = jnp.concatenate([classes, tail], axis=-1)
  found = _divergence(how.kind, _classes(teacher, complete), classes - whole)
  divergence = jnp.where(targets != IGNORE_INDEX, found, 0.0) * how.temperature**2
  return Losses(lm.token_losses(logits, targets), divergence)


def _normalized(teacher: TopK, complete: bool) -> TopK:
  """In float32, as probabilities that sum to 1 whatever the dtype that they were kept in."""
  ids, logps, tail = teacher.ids, teacher.logps.astype(jnp.float32), teacher.tail.astype(jnp.float32)
  total = jax.nn.logsumexp(_classes(TopK(ids, logps, tail), complete), axis=-1)
  return TopK(ids, logps - total[..., None], tail - total)


def _classes(teacher: TopK, complete: bool) -> jax.Array:
  """Log-probabilities [..., K + 1] of the teacher's classes; [..., K] where the K are complete, so that none is left."""
  return teacher.logps if complete else jnp.concatenate([teacher.logps, teacher.tail[..., None]], axis=-1)


def _divergence(kind: str, teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL [...] of two distributions over classes, from their log-probabilities [..., classes]."""
  if kind == "forward":
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
  return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


class _Known(NamedTuple):
  """What is known of tokens beside their logits: targets [M], and the teacher's [M, ...]."""

  targets: jax.Array
  teacher: TopK


class _Student(NamedTuple):
  """What the student says of tokens, in logarithms.

  Attributes:
    label_sum: of its softmax's denominator at temperature 1, [M].
    whole_sum: at temperature T.
    tail_sum: at T, of the tokens of the tail alone.
    numerators: at T, of the teacher's tokens, [M, K].
  """

  label_sum: jax.Array
  whole_sum: jax.Array
  tail_sum: jax.Array
  numerators: jax.Array

  def classes(self, complete: bool) -> jax.Array:
    """Log-probabilities of the classes, as `_classes` has the teacher's."""
    of_tokens = self.numerators - self.whole_sum[:, None]
    if complete:
      return of_tokens
    return jnp.concatenate([of_tokens, (self.tail_sum - self.whole_sum)[:, None]], axis=-1)


class _Static(NamedTuple):
  """What a program is made for.

  Attributes:
    how: the divergence.
    complete: the teacher's tokens are the vocabulary.
    gathered: axes of the mesh that hold pieces of E.
    vocab: those that share tokens and split the vocabulary.
  """

  how: Divergence
  complete: bool
  gathered: MeshAxes
  vocab: MeshAxes


def _with_known(
  how: Divergence, complete: bool, gathered: MeshAxes, vocab: MeshAxes, *arrays: jax.Array
) -> Losses:
  """A device's part of `linear_token_losses`; arrays as `over_vocabulary` gives them."""
  x, chunks, entries, targets, *teacher = arrays
  static = _Static(how, complete, gathered, vocab)
  return _chunked(static, x, chunks, entries, _Known(targets, TopK(*teacher)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static: _Static, x: jax.Array, chunks: jax.Array, entries: jax.Array, known: _Known) -> Losses:
  """Losses [M] of tokens x [M, E], with kernels [n, pieces of E, C] of entries [n, C]; see `vocab_parallel._chunked`."""
  return _losses(static, x, chunks, entries, known)[0]


def _losses(
  static: _Static, x: jax.Array, chunks: jax.Array, entries: jax.Array, known: _Known
) -> tuple[Losses, _Student]:
  how, complete, gathered, vocab = static

  def add(carry: tuple[Any, ...], chunk: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, ...], None]:
    label, whole, tail, numerators, picked = carry
    logits = logits_of(gathered, x, *chunk)
    scaled = logits / how.temperature
    inside, places = _places(known.teacher.ids, chunk[1])
    is_class = _put(jnp.zeros(logits.shape, bool), places, jnp.ones(places.shape, bool))
    found = jnp.take_along_axis(scaled, jnp.minimum(places, scaled.shape[1] - 1), axis=1)
    picked += jnp.sum(jnp.where(chunk[1] == known.targets[:, None], logits, 0.0), axis=-1)
    label = label if how.temperature == 1 else label.add(logits)
    sums = label, whole.add(scaled), tail.add(jnp.where(is_class, _MIN, scaled))
    return (*sums, numerators + jnp.where(inside, found, 0.0), picked), None

  nothing, zero = _LogSum.of_nothing(x.shape[0]), jnp.zeros(x.shape[0], jnp.float32)
  start = (nothing, nothing, nothing, jnp.zeros(known.teacher.ids.shape, jnp.float32), zero)
  (label, whole, tail, numerators, picked), _ = jax.lax.scan(add, start, (chunks, entries))
  if vocab:
    numerators, picked = (jax.lax.psum(part, vocab) for part in (numerators, picked))
  whole_sum = whole.over(vocab)
  label_sum = whole_sum if how.temperature == 1 else label.over(vocab)
  student = _Student(label_sum, whole_sum, tail.over(vocab), numerators)
  divergence = _divergence(how.kind, _classes(known.teacher, complete), student.classes(complete))
  real = known.targets != IGNORE_INDEX
  found = Losses(
    jnp.where(real, label_sum - picked, 0.0), jnp.where(real, how.temperature**2 * divergence, 0.0)
  )
  return found, student


def _places(ids: jax.Array, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which of ids [M, K] are in a chunk of entries [C], and where in it; those that are not are at its end, C."""
  first = entries[0]
  inside = (ids >= first) & (ids <= jnp.max(entries)) & (first >= 0)
  return inside, jnp.where(inside, ids - first, entries.shape[0])


def _put(array: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
  """Array [M, C] with values [M, K] at places [M, K] of each token; those at C are dropped."""
  return array.at[jnp.arange(array.shape[0])[:, None], places].set(values, mode="drop")


def _chunked_forward(
  static: _Static, x: Any, chunks: Any, entries: Any, known: Any
) -> tuple[Losses, tuple[Any, ...]]:
  x, entries, known = (jax.tree.map(_value, operand, is_leaf=_is_leaf) for operand in (x, entries, known))
  losses, student = _losses(static, x, chunks.value, entries, known)
  # An empty tuple says that the kernel trains: only the structure of what is kept is static.
  return losses, (x, chunks.value, entries, known, student, () if chunks.perturbed else None)


def _is_leaf(operand: Any) -> bool:
  return hasattr(operand, "perturbed")


def _value(operand: Any) -> jax.Array:
  return operand.value


def _chunked_backward(
  static: _Static, saved: tuple[Any, ...], g: Losses
) -> tuple[jax.Array | None, jax.Array | None, None, None]:
  """Gradients of all devices' uses together, of which each device has the part of its own logits.

  With s the log-probability of a class and P its derivative of the divergence, that of a scaled logit z of a class is
  P - (sum of P) softmax(z), and that of one of the tail has the tail's P times its share of the tail.
  """
  how, complete, gathered, vocab = static
  x, chunks, entries, known, student, needs_kernel = saved
  real = known.targets != IGNORE_INDEX
  of_label, of_divergence = (
    jnp.where(real, jax.lax.psum(part, vocab) if vocab else part, 0.0) for part in map(_gradient, g)
  )
  pull = _class_gradients(static, known.teacher, student, of_divergence * how.temperature)
  own, of_tail, total = pull[:, : known.teacher.ids.shape[1]], pull[:, -1:], jnp.sum(pull, -1, keepdims=True)

  def add(dx: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    piece, entries = chunk
    logits = logits_of(gathered, x, piece, entries)
    scaled = logits / how.temperature
    # No gradient is infinite: this says that an entry is of no class.
    d_logits = _put(jnp.full(logits.shape, jnp.inf), _places(known.teacher.ids, entries)[1], own)
    share = 0.0 if complete else of_tail * jnp.exp(scaled - student.tail_sum[:, None])
    d_logits = jnp.where(d_logits == jnp.inf, share, d_logits)
    d_logits -= total * jnp.exp(scaled - student.whole_sum[:, None])
    probs = jnp.exp(logits - student.label_sum[:, None])
    d_logits += (probs - (entries == known.targets[:, None])) * of_label[:, None]
    d_logits = d_logits.astype(x.dtype)
    dx += jnp.dot(d_logits, all_gathered(gathered, piece, x.dtype).T, preferred_element_type=jnp.float32)
    if needs_kernel is None:
      return dx, None
    d_piece = jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
    if gathered:
      d_piece = jax.lax.psum_scatter(d_piece, gathered, scatter_dimension=0, tiled=True)
    return dx, d_piece.astype(piece.dtype)

  dx, d_chunks = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (chunks, entries))
  return dx.astype(x.dtype), d_chunks, None, None


def _gradient(part: Any) -> jax.Array:
  """A gradient that comes in: a symbol where nothing is made of a loss."""
  return jnp.zeros(part.shape, jnp.float32) if isinstance(part, SymbolicZero) else part


def _class_gradients(static: _Static, teacher: TopK, student: _Student, scale: jax.Array) -> jax.Array:
  """Derivatives of each token's divergence, times its scale [M], by its classes' log-probabilities [M, classes]."""
  theirs = _classes(teacher, static.complete)
  total = lambda classes: jnp.sum(_divergence(static.how.kind, theirs, classes) * scale)  # noqa: E731
  return jax.grad(total)(student.classes(static.complete))


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)
