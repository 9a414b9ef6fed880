"""The attention mask: which keys a query sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from internvl_jax.parallel.rules import MeshAxes, spec


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["segments", "kv_segments", "q_index", "shared", "window"],
  meta_fields=["causal", "windows"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """Which keys a query sees: those that all of these allow.

  A query that sees no key gets finite numbers that nobody may read.

  Letters: B rows, T queries, S keys.

  Attributes:
    segments: int [B, T]; a query sees keys of its own segment. None is one segment.
    kv_segments: int [B, S], the keys' segments; None takes `segments`.
    shared: bool [B, S], the keys of segment 2p - 1, from p = 1, that segment 2p sees besides its own: the prompt that
      two answers have in common. None: no keys.
    causal: hide keys whose index along S is above the query's.
    q_index: int [T], the queries' index along S; None is 0..T-1. Only read when causal.
    windows: of a window w, a query sees its own key and the w - 1 before it; empty sees all. Only read when causal.
    window: which of several `windows` it is, where only the running program knows; they rise.
  """

  segments: jax.Array | None = None
  kv_segments: jax.Array | None = None
  shared: jax.Array | None = None
  causal: bool
  q_index: jax.Array | None = None
  windows: tuple[int, ...] = ()
  window: jax.Array | None = None

  def __post_init__(self):
    if self.kv_segments is None:
      object.__setattr__(self, "kv_segments", self.segments)

  @property
  def reach(self) -> jax.Array | int | None:
    """The window; None where a query sees all keys before it."""
    if not self.causal or not self.windows:
      return None
    assert self.window is not None or len(self.windows) == 1, self.windows
    return self.windows[0] if self.window is None else self.window

  @property
  def needs(self) -> set[str]:
    """The optional features of a backend that this mask needs (`backends.BACKENDS`)."""
    found = {"shared prompts"} if self.shared is not None else set()
    if self.reach is not None:
      found.add("windows")
    return found | ({"index of queries"} if self.q_index is not None else set())

  def without_shared(self) -> "Mask":
    """The mask by which no key is shared."""
    return dataclasses.replace(self, shared=None)

  def with_prompts_moved(self) -> "Mask":
    """The mask by which what is shared belongs to the second answer and no longer to the first."""
    assert self.segments is not None and self.kv_segments is not None and self.shared is not None
    # Queries move along, so that each still sees a key; that takes a row's own keys.
    assert self.segments.shape == self.shared.shape, "shared prompts with keys of other rows"
    segments, kv_segments = (
      jnp.where(self.shared, ids + 1, ids) for ids in (self.segments, self.kv_segments)
    )
    return dataclasses.replace(self, segments=segments, kv_segments=kv_segments, shared=None)

  def rising(self) -> "Mask":
    """The mask with padding, segment 0, numbered after all others.

    Segments then rise along a row, and a block's lowest and highest say which others it can meet.
    """

    def renumber(ids: jax.Array | None) -> jax.Array | None:
      return None if ids is None else jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids)

    return dataclasses.replace(self, segments=renumber(self.segments), kv_segments=renumber(self.kv_segments))

  @property
  def is_second_answer(self) -> jax.Array:
    """Bool [B, T]: the queries that see a prompt of another segment."""
    assert self.segments is not None
    return (self.segments > 0) & (self.segments % 2 == 0)

  def specs(self, rows: MeshAxes, queries: MeshAxes) -> "Mask":
    """How its arrays are sharded where rows and queries are sharded over these axes of a mesh; keys are whole."""

    def of(value, *entries: MeshAxes | None) -> PartitionSpec | None:
      return None if value is None else spec(*entries)

    return dataclasses.replace(
      self,
      segments=of(self.segments, rows, queries),
      kv_segments=of(self.kv_segments, rows),
      shared=of(self.shared, rows),
      q_index=of(self.q_index, queries),
      window=of(self.window),
    )  # pyright: ignore[reportArgumentType]
