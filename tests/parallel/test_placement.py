"""Full-size weights on meshes whose sizes do not divide their widths: spread another way, or told of."""

import functools
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from internvl_jax.config import TrainConfig
from internvl_jax.hf import published
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel import placement_table, rules
from internvl_jax.parallel.mesh import AXES, FSDP_OUTER, cut_fsdp
from internvl_jax.setup.devices import open_mesh
from internvl_jax.state import with_dtypes

FAMILIES = {
  "InternLM2": "2-26b",
  "Qwen2, width 896": "2.5-1b",
  "Phi-3": "2-4b",
  "Yi": "2-40b",
  "Llama 3": "2-76b",
  "Qwen2.5": "2.5-78b",
  "InternLM3": "3-9b",
  "Qwen3": "3.5-14b",
  "Qwen3-MoE": "3.5-241b-a28b",
  "gpt-oss": "3.5-20b-a4b",
}


@functools.cache
def model_of(size):
  config = TrainConfig()
  config.model.model_name_or_path = published.hub_id(size)
  model = open_shapes(config).model
  return model.axes, with_dtypes(model, set(model.shapes), bf16=True)


def mesh_of(**sizes):
  names = AXES if sizes.get(FSDP_OUTER, 1) == 1 else ("data", FSDP_OUTER, *AXES[1:])
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in names), names)


def cut_for(size, **sizes):
  """The mesh as a run cuts it, which has as many devices."""
  axes, shapes = model_of(size)
  groups = rules.fsdp_groups(axes, shapes, mesh_of(**sizes))
  return mesh_of(**sizes | {FSDP_OUTER: groups, "fsdp": sizes["fsdp"] // groups})


def pieces(size, mesh):
  """Of each large parameter: in how many pieces it lies."""
  axes, shapes = model_of(size)
  places = rules.weight_shardings(axes, shapes, mesh)
  return {
    path: leaf.size // math.prod(places[path].shard_shape(leaf.shape))
    for path, leaf in shapes.items()
    if leaf.size * leaf.dtype.itemsize >= placement_table.LARGE
  }


@pytest.mark.parametrize("size", FAMILIES.values(), ids=FAMILIES)
def test_no_large_parameter_is_whole(size):
  for devices in (512, 384, 96, 48):
    mesh = cut_for(size, fsdp=devices)
    assert mesh.size == devices
    found = pieces(size, mesh)
    # Threes divide few widths, and the embeddings of 2880 and 896 have no other axis that anything divides.
    assert found and min(found.values()) >= devices / 8, devices
    layers = {path: n for path, n in found.items() if ".layers." in path}
    assert devices != 512 or set(layers.values()) <= {devices}


@pytest.mark.parametrize("size", FAMILIES.values(), ids=FAMILIES)
def test_what_divides_lies_as_it_did(size):
  """No axis is cut, and no weight takes `fsdp` along another axis than its own for it."""
  axes, shapes = model_of(size)
  for sizes in ({"fsdp": 8}, {"fsdp": 64}, {"fsdp": 16, "tensor": 4}, {"fsdp": 8, "expert": 2}):
    mesh = cut_for(size, **sizes)
    assert FSDP_OUTER not in mesh.shape
    for path, leaf in shapes.items():
      for name, entry in zip(axes[path], rules.weight_entries(axes[path], leaf.shape, mesh), strict=True):
        assert "fsdp" not in entry or name in ("embed", "patch", "table"), path


def test_the_6b_vit_takes_both_halves_of_fsdp_apart():
  mesh = cut_for("2.5-78b", fsdp=512)
  assert (mesh.shape[FSDP_OUTER], mesh.shape["fsdp"]) == (4, 128)
  axes, shapes = model_of("2.5-78b")
  places = rules.weight_shardings(axes, shapes, mesh)
  layers = "vision_model.encoder.layers.0:45"
  assert places[f"{layers}.mlp.fc1.kernel"].spec == jax.P(None, "fsdp", FSDP_OUTER)
  # The language model's width divides by the whole, and its pieces lie as they would over one axis.
  up = places["language_model.model.layers.0:80.mlp.up_proj.kernel"]
  assert up.spec == jax.P(None, (FSDP_OUTER, "fsdp"), None)
  # Optimizer state and gradients follow.
  state = rules.state_shardings(axes, shapes, shapes, mesh)
  assert state.moments == state.gradients == places


def test_an_axis_that_is_cut_keeps_the_order_of_devices():
  mesh = jax.make_mesh((1, 4, 1, 1, 2), AXES)
  cut = cut_fsdp(mesh, 2)
  assert dict(cut.shape) == {"data": 1, FSDP_OUTER: 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}
  assert list(cut.devices.flat) == list(mesh.devices.flat)


def test_a_run_cuts_the_axis_and_says_so(caplog):
  """Six devices: three do not divide the widths, two do."""
  config = TrainConfig()
  config.model.model_name_or_path = published.hub_id("2.5-1b")
  config.mesh.data, config.mesh.fsdp = 1, -1
  with caplog.at_level("INFO"):
    mesh = open_mesh(config, jax.devices()[:6], open_shapes(config).model)
  assert mesh.shape[FSDP_OUTER] * mesh.shape["fsdp"] == 6 and mesh.shape["data"] == 1
  assert f"mesh.fsdp=6: its devices are arranged as fsdp_outer={mesh.shape[FSDP_OUTER]} x" in caplog.text


def warned(size, mesh):
  axes, shapes = model_of(size)
  return placement_table.placement_warnings(shapes, rules.state_shardings(axes, shapes, shapes, mesh))


def test_what_stays_whole_is_told_in_one_line():
  (line,) = warned("2.5-78b", mesh_of(fsdp=3))
  assert line.startswith(
    "11 large parameter(s) (language_model.model.layers.0:80.self_attn.o_proj.kernel is 80x8192x8192)"
  )
  assert (
    "take 281.39 GiB of each" in line and "(fsdp=3)" in line and "on 2 or 4 devices in place of 3" in line
  )
  assert not warned("2.5-78b", mesh_of(data=3))  # Copies are what `data` is for.
  assert not warned("2.5-78b", cut_for("2.5-78b", fsdp=512))


def test_what_too_few_share_is_told_where_it_matters():
  (line,) = warned("2.5-78b", cut_for("2.5-78b", fsdp=48))
  assert "in fewer than 48 pieces" in line and "11.72 GiB" in line and "fsdp_outer=3 fsdp=16" in line
  assert not warned("2.5-1b", cut_for("2.5-1b", fsdp=48))
