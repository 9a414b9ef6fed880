"""Answers on a mesh are those of one device, and the cache is spread over it."""

import jax
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.inference import open_for_inference
from internvl_jax.models.functional import define
from internvl_jax.models.internvl import Execution, InternVL
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
  definition = define(lambda rngs: InternVL(config, rngs=rngs))
  rng = np.random.default_rng(1)
  params = {path: rng.normal(size=leaf.shape).astype("f4") / 4 for path, leaf in definition.shapes.items()}
  decoder = GreedyDecoder(
    model=definition,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=IMAGE,
    stop_ids=(VOCAB,),
    max_new_tokens=NEW,
    batch_size=ROWS,
  )
  expected = decoder(jax.device_put(params, jax.devices()[0]), prompts())
  mesh = meshes.make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[: np.prod(list(axes.values()))])
  placed = jax.device_put(params, rules.weight_shardings(definition.axes, definition.shapes, mesh))
  for ours, theirs in zip(decoder(placed, prompts()), expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert len({tuple(answer) for answer in expected}) == ROWS

  if name != "dense":
    return  # A program is not compiled twice for what the other shows.
  padded = decoder._pad(prompts())
  with rules.scope(mesh):
    program = GreedyDecoder._generate.lower(decoder, placed, *padded).compile().as_text()
  layers, heads, width = config.text.num_layers, config.text.num_kv_heads, config.text.head_dim
  slots = padded[0].shape[1] + NEW
  rows = ROWS // 2
  spread, whole = (f"f32[{layers},{r},{slots},{k},{width}]" for r, k in ((rows, heads // 2), (ROWS, heads)))
  assert spread in program and whole not in program


def test_more_devices_than_there_are(tmp_path):
  with pytest.raises(UserError, match="--devices=9: there are 8"):
    open_for_inference(CURVE / "init", bf16=False, devices=9)
