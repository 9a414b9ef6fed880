"""The shapes in signatures are those that functions take and return; what has others is refused where they are checked."""

import ast
import functools
from pathlib import Path

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import internvl_jax
from internvl_jax.losses import lm, vocab_parallel
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


PACKAGE = Path(internvl_jax.__file__).parent

# Annotations in which an array has no shape of its own, and why.
SHAPELESS = {
  "dict": "arrays by path or name, each of its own shape",
  "Mapping": "the same",
  "Param": "Flax names a parameter's type, and no shape",
}


def public_functions(body, prefix):
  """Names and definitions of the public functions of a module or class, methods of its public classes included."""
  for node in body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from public_functions(node.body, f"{prefix}{node.name}.")
    elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__"):
      yield f"{prefix}{node.name}", node


def has_bare_array(annotation):
  """Whether an annotation names an array type outside of a shape."""
  if isinstance(annotation, ast.Subscript):
    kind = ast.unparse(annotation.value).rpartition(".")[2]
    return kind not in SHAPELESS and not hasattr(jaxtyping, kind) and has_bare_array(annotation.slice)
  if isinstance(annotation, ast.Name | ast.Attribute):
    return ast.unparse(annotation) in ("jax.Array", "Array", "np.ndarray")
  return any(has_bare_array(child) for child in ast.iter_child_nodes(annotation))


@pytest.mark.parametrize("place", ["losses", "models", "parallel", "tasks", "objectives.py"])
def test_every_public_function_says_the_shapes_of_its_arrays(place):
  found, count = [], 0
  for path in sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place]:
    module = str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for name, function in public_functions(ast.parse(path.read_text()).body, f"{module}."):
      arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
      annotations = [argument.annotation for argument in arguments] + [function.returns]
      count += 1
      found += [name for annotation in annotations if annotation and has_bare_array(annotation)]
  assert count > 3 and found == []


def test_an_array_without_a_shape_is_found():
  bare = ["jax.Array | None", "tuple[Array, int]", "Callable[[], np.ndarray]", "Sequence[jax.Array]"]
  told = ['Float[Array, "R S"] | None', "Mapping[str, jax.Array]", "nnx.Param[jax.Array]", "np.dtype"]
  read = lambda text: ast.parse(text, mode="eval").body  # noqa: E731
  assert [text for text in bare + told if has_bare_array(read(text))] == bare
