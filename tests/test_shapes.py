"""The shapes in signatures are those that functions take and return; what has others is refused where they are checked."""

import functools
import inspect

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from internvl_jax.losses import lm, preference, vocab_parallel
from internvl_jax.models import gradients, moe, projector, rope
from internvl_jax.models.attention import Mask, xla
from internvl_jax.models.towers import tower
from internvl_jax.parallel import sharded_gather
from internvl_jax.parallel.rules import Product


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


# Name -> function, arguments that fit, and those of which one does not.
CASES = {
  "cross_entropy": (
    lm.cross_entropy,
    (floats(2, 3, 7), ints(2, 3), floats(2, 3)),
    (floats(2, 3, 7), ints(2, 1), floats(2, 3)),
  ),
  "token_losses": (lm.token_losses, (floats(5, 7), ints(5)), (floats(5, 7), floats(5))),
  "chunked_linear_cross_entropy": (
    lm.chunked_linear_cross_entropy,
    (floats(5, 4), floats(4, 7), ints(5), floats(5)),
    (floats(5, 4), floats(4, 7), ints(5), floats(1)),
  ),
  "linear_token_losses": (
    vocab_parallel.linear_token_losses,
    (floats(2, 3, 4), floats(4, 7), ints(2, 3)),
    (floats(2, 3, 4), floats(4, 7), ints(6)),
  ),
  "rotate": (
    rope.rotate,
    (floats(2, 3, 4, 8), floats(2, 3, 4), floats(2, 3, 4)),
    (floats(2, 3, 4, 8), floats(2, 3, 4), floats(2, 3, 1)),
  ),
  "rotations": (
    functools.partial(rope.rotations, rope.Rope(), dim=8, bound=9),
    (ints(2, 3),),
    (floats(2, 3),),
  ),
  "pixel_shuffle": (
    functools.partial(projector.pixel_shuffle, ratio=0.5, version="v2"),
    (floats(2, 16, 3),),
    (floats(2, 4, 4, 3),),
  ),
  "embed": (
    functools.partial(sharded_gather.embed, dtype=jnp.dtype(jnp.float32)),
    (floats(9, 4), ints(2, 3)),
    (floats(9, 4), ints(6)),
  ),
  "take_features": (
    sharded_gather.take_features,
    (floats(1, 5, 4), ints(2, 3)),
    (floats(5, 4), ints(2, 3)),
  ),
  "router_statistics": (
    functools.partial(moe.router_statistics, valid=None),
    (floats(2, 3, 4), ints(2, 3, 2)),
    (floats(2, 3, 4), ints(2, 1, 2)),
  ),
  "load_balancing_loss": (
    functools.partial(moe.load_balancing_loss, shards=1),
    (floats(2, 3, 4), floats(2, 3, 4), ints(3)),
    (floats(2, 3, 4), floats(2, 3, 4), ints(1)),
  ),
  "drop_branch": (
    functools.partial(tower.drop_branch, index=0),
    (floats(5, 3, 4), floats(2, 5)),
    (floats(5, 3, 4), floats(5, 2)),
  ),
  "attention": (
    functools.partial(xla.plain, mask=Mask(causal=True), sinks=None, over="rows"),
    (floats(2, 3, 4, 8), floats(2, 5, 2, 8), floats(2, 5, 2, 8)),
    (floats(2, 3, 4, 8), floats(2, 5, 2, 8), floats(1, 5, 2, 8)),
  ),
  "matmul": (
    functools.partial(gradients.matmul, product=Product((None, None))),
    (floats(2, 3, 4), floats(4, 5)),
    (floats(2, 3, 4), floats(5, 4)),
  ),
}


def checked(function):
  """The function with its signature checked, beneath what a partial has fixed."""
  if isinstance(function, functools.partial):
    return functools.partial(checked(function.func), *function.args, **function.keywords)
  return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


@pytest.mark.parametrize("name", CASES)
def test_signatures_say_the_shapes(name):
  function, right, wrong = CASES[name]
  jax.eval_shape(checked(function), *right)
  with pytest.raises(jaxtyping.TypeCheckError):
    jax.eval_shape(checked(function), *wrong)


@pytest.mark.parametrize("module", [lm, preference, vocab_parallel], ids=lambda module: module.__name__)
def test_no_public_function_of_the_losses_takes_an_array_of_any_shape(module):
  functions = [
    function
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and function.__module__ == module.__name__
  ]
  assert functions
  untold = [
    f"{function.__name__}: {parameter}"
    for function in functions
    for parameter, kind in function.__annotations__.items()
    if kind is jax.Array
  ]
  assert untold == []
