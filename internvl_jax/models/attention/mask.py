"""The attention mask: which keys a query sees."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from internvl_jax.parallel.rules import MeshAxes, spec

CACHED_PROMPTS = "shared prompts of a cache"
"""The feature of a backend (`Mask.needs`) by which new tokens of several answers see their prompt in a cache."""


class SharedPrompts(NamedTuple):
  """Which segments of rows see the prompts of others.

  Attributes:
    parent: int [B, T]; see `Mask`.
    answers: the most segments that see one prompt, the one that has it among them.
  """

  parent: Int[Array, "B T"]
  answers: int


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["segments", "kv_segments", "q_index", "parent", "kv_parent", "window"],
  meta_fields=["causal", "windows", "answers"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """Which keys a query sees: those that all of these allow.

  A query that sees no key gets finite numbers that nobody may read.

  Letters: B rows, T queries, S keys.

  Attributes:
    segments: int [B, T]; a query sees keys of its own segment. None is one segment.
    kv_segments: int [B, S], the keys' segments; None takes `segments`.
    parent: int [B, T], the segment whose prompt a query sees besides its own segment, for answers that have a prompt in
      common; 0 sees none. The prompt's own tokens have the number of their own segment, which is what marks them, and
      the answers that see it are the segments that follow. None: no prompt is shared.
    kv_parent: int [B, S], the keys' parents; None takes `parent`.
    answers: the most segments that see one prompt, the one that has it among them.
    causal: hide keys whose index along S is above the query's.
    q_index: int [T], the queries' index along S; None is 0..T-1. Only read when causal.
    windows: of a window w, a query sees its own key and the w - 1 before it; empty sees all. Only read when causal.
    window: which of several `windows` it is, where only the running program knows; they rise.
  """

  segments: Int[Array, "B T"] | None = None
  kv_segments: Int[Array, "B S"] | None = None
  parent: Int[Array, "B T"] | None = None
  kv_parent: Int[Array, "B S"] | None = None
  answers: int = 2
  causal: bool
  q_index: Int[Array, " T"] | None = None
  windows: tuple[int, ...] = ()
  window: Int[Array, ""] | None = None

  def __post_init__(self):
    if self.kv_segments is None:
      object.__setattr__(self, "kv_segments", self.segments)
    if self.kv_parent is None:
      object.__setattr__(self, "kv_parent", self.parent)

  @property
  def reach(self) -> Int[Array, ""] | int | None:
    """The window; None where a query sees all keys before it."""
    if not self.causal or not self.windows:
      return None
    assert self.window is not None or len(self.windows) == 1, self.windows
    return self.windows[0] if self.window is None else self.window

  @property
  def needs(self) -> set[str]:
    """The optional features of a backend that this mask needs (`backends.BACKENDS`)."""
    found = set[str]()
    if self.parent is not None:
      found.add("shared prompts" if self.q_index is None else CACHED_PROMPTS)
    if self.reach is not None:
      found.add("windows")
    return found | ({"index of queries"} if self.q_index is not None else set())

  def without_parents(self) -> "Mask":
    """The mask by which no prompt is shared."""
    return dataclasses.replace(self, parent=None, kv_parent=None)

  def with_prompts_moved(self, number: int) -> "Mask":
    """The mask by which a shared prompt belongs to the `number`-th answer after the first, and to no other."""
    assert self.segments is not None and self.kv_segments is not None and self.parent is not None
    # Queries move along, so that each still sees a key; that takes a row's own keys.
    assert self.segments.shape == self.kv_segments.shape, "shared prompts with keys of other rows"
    segments, kv_segments = (
      jnp.where(self.is_prompt, ids + number, ids) for ids in (self.segments, self.kv_segments)
    )
    return dataclasses.replace(self.without_parents(), segments=segments, kv_segments=kv_segments)

  def rising(self) -> "Mask":
    """The mask with padding, segment 0, numbered after all others.

    Segments then rise along a row, and a block's lowest and highest say which others it can meet.
    """

    def renumber(ids: jax.Array | None) -> jax.Array | None:
      return None if ids is None else jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids)

    return dataclasses.replace(self, segments=renumber(self.segments), kv_segments=renumber(self.kv_segments))

  @property
  def is_prompt(self) -> Bool[Array, "B S"]:
    """Bool [B, S]: the keys that segments other than their own see."""
    assert self.kv_segments is not None and self.kv_parent is not None
    return (self.kv_parent > 0) & (self.kv_parent == self.kv_segments)

  @property
  def answer_number(self) -> Int[Array, "B T"]:
    """Int [B, T]: the number of a query's segment after that which has its prompt; 0 where it has its own."""
    assert self.segments is not None and self.parent is not None
    return jnp.where(self.parent > 0, self.segments - self.parent, 0)

  def specs(self, rows: MeshAxes, queries: MeshAxes) -> "Mask":
    """How its arrays are sharded where rows and queries are sharded over these axes of a mesh; keys are whole."""

    def of(value: jax.Array | None, *entries: MeshAxes | None) -> PartitionSpec | None:
      return None if value is None else spec(*entries)

    return dataclasses.replace(
      self,
      segments=of(self.segments, rows, queries),
      kv_segments=of(self.kv_segments, rows),
      parent=of(self.parent, rows, queries),
      kv_parent=of(self.kv_parent, rows),
      q_index=of(self.q_index, queries),
      window=of(self.window),
    )  # pyright: ignore[reportArgumentType]
