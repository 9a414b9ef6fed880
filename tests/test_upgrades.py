"""Canaries: each place that depends on what another package does not promise. docs/upgrading.md lists them."""

import ast
import inspect
import io
import re
import resource

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from PIL import Image, PngImagePlugin

from tests.support import hlo
from tests.support.toy import REPOSITORY

PAGE = (REPOSITORY / "docs/upgrading.md").read_text(encoding="utf-8")
PACKAGE = REPOSITORY / "internvl_jax"


def parameters(function) -> set[str]:
  return set(inspect.signature(function).parameters)


# --- The list -----------------------------------------------------------------------------------------------


def unpromised(tree: ast.AST) -> set[str]:
  """Private and experimental modules that a file uses."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Attribute):
      names.add(ast.unparse(node))
  found = {name for name in names if re.match(r"[\w.]+\.(_[a-z]\w*|experimental)(\.|$)", name)}
  return {
    name for name in found if name.split(".")[0] in ("jax", "grain", "orbax", "flax", "optax", "transformers")
  }


def test_the_page_lists_every_use():
  using = [path for path in PACKAGE.rglob("*.py") if unpromised(ast.parse(path.read_text(encoding="utf-8")))]
  names = {path.relative_to(PACKAGE).as_posix() for path in using}
  assert len(names) > 10
  assert {name for name in names if f"`{name}`" not in PAGE} == set()


def test_every_place_on_the_page_is_there():
  named = re.findall(r"`([\w/]+\.py)`", PAGE)
  assert len(named) > 20
  assert [path for path in named if not ((PACKAGE / path).is_file() or (REPOSITORY / path).is_file())] == []


# --- jax ----------------------------------------------------------------------------------------------------


def test_jax_coordinator_client():
  from jax._src.distributed import global_state
  from jax._src.lib import _jax

  assert global_state.client is None, "a single process has joined nobody"
  used = {"key_value_set", "key_value_try_get", "blocking_key_value_get", "wait_at_barrier"}
  assert used <= set(dir(_jax.DistributedRuntimeClient))


def test_jax_experimental_functions():
  from jax.experimental import mesh_utils, multihost_utils, topologies

  assert "step_id" in parameters(multihost_utils.reached_preemption_sync_point)
  assert {"platform", "topology_name"} <= parameters(topologies.get_topology_desc)
  assert "devices" in parameters(mesh_utils.create_device_mesh)


def test_jax_splash_attention():
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  assert {"block_sizes", "head_shards", "q_seq_shards", "interpret"} <= parameters(kernels.make_splash_mha)
  mask = masks.MultiHeadMask([masks.CausalMask((128, 128), shard_count=1)] * 2)
  kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=True)
  q, k = jax.ShapeDtypeStruct((2, 128, 64), "f4"), jax.ShapeDtypeStruct((1, 128, 64), "f4")
  segments, sinks = (
    kernels.SegmentIds(*[jax.ShapeDtypeStruct((128,), "i4")] * 2),
    jax.ShapeDtypeStruct((2,), "f4"),
  )
  assert jax.eval_shape(kernel, q, k, k, segments, sinks).shape == q.shape
  assert hasattr(kernels.SplashAttentionKernel, "manual_sharding_spec")
  assert {"q", "kv"} == set(kernels.SegmentIds._fields)
  assert {"window_size", "offset", "shard_count"} <= parameters(masks.LocalMask)


def test_jax_megablox():
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

  assert {"preferred_element_type", "tiling", "transpose_rhs", "interpret"} <= parameters(gmm)
  assert {"preferred_element_type", "tiling", "interpret"} <= parameters(tgmm)


def test_jax_pallas_through_triton():
  """Where it is gone, `runtime.attention=auto` takes another backend; then the rows of the tables can go, too."""
  from jax.experimental.pallas import triton

  assert {"num_warps", "num_stages"} <= parameters(triton.CompilerParams)


# --- XLA ----------------------------------------------------------------------------------------------------

FLOPS = 4 * hlo.LAYERS * 2 * (hlo.ROWS // hlo.DEVICES) * hlo.WIDTH**2
"""Forward, once more, and two gradients of each layer's product."""
WEIGHTS = hlo.LAYERS * hlo.WIDTH**2
EXPECTED = {
  # Weights travel twice, and in float32; on TPUs their products, and so they, are in bfloat16.
  "cpu": {"all-gather": 2 * 4 * WEIGHTS, "reduce-scatter": 4 * WEIGHTS},
  "v5e": {"all-gather": 2 * 2 * WEIGHTS, "reduce-scatter": 4 * WEIGHTS},
}
RECORDED = sorted(hlo.RECORDINGS.iterdir())


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_xla_texts_are_read_alike(folder):
  found = hlo.facts(hlo.recorded(folder))
  assert (found["flops"], found["uncounted loops"]) == (FLOPS, 0)
  assert found["exchanged"] == EXPECTED[folder.name.split("-")[0]]
  assert found["peak"] > 0


def test_two_versions_of_xla_are_recorded():
  assert len([folder for folder in RECORDED if folder.name.startswith("cpu-jaxlib")]) >= 2


def test_xla_as_installed_is_read_alike():
  found = hlo.facts(hlo.compiled(jax.devices("cpu")))
  assert (found["flops"], found["uncounted loops"]) == (FLOPS, 0)
  assert found["exchanged"] == EXPECTED["cpu"]
  assert found["peak"] > 0


def test_xla_has_the_options():
  """An option that XLA does not know is refused when a program is compiled, on any platform."""
  from internvl_jax.compiler import OPTIONS

  lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(2))
  for options in OPTIONS.values():
    lowered.compile(compiler_options={option.name: option.value for option in options})
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    lowered.compile(compiler_options={"xla_gpu_no_such_option": True})


# --- libtpu -------------------------------------------------------------------------------------------------


def barriers(function, *arguments) -> int:
  return str(jax.make_jaxpr(function)(*arguments)).count("optimization_barrier")


def test_libtpu_class_token_is_cut_behind_a_barrier():
  """Without the barrier, libtpu 0.0.52 ends in a failed check for the ViT of 6B."""
  from flax import nnx

  from internvl_jax.hf.model import source_of_config
  from tests.support import families

  source = source_of_config(families.config_of("vision_6b"))
  model = nnx.eval_shape(lambda: source.build(nnx.Rngs(0)))
  patches = (source.config.vision.image_size // source.config.vision.patch_size) ** 2
  hidden = jnp.zeros((1, 1 + patches, source.config.vision.hidden_size))
  graph, state = nnx.split(model)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
  assert barriers(lambda state, x: nnx.merge(graph, state).project(x), zeros, hidden) == 1


def test_libtpu_queries_are_normalized_behind_a_barrier():
  """Without the barrier, libtpu 0.0.52 ends in a failed check for norms over heads on some meshes."""
  from flax import nnx

  from internvl_jax.models.attention import Mask
  from internvl_jax.models.decoder import DecoderAttention, DecoderConfig

  sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_layers": 1, "head_dim": 2}

  def count(**changes):
    config = DecoderConfig(**sizes, num_heads=2, num_kv_heads=1, **changes)
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderAttention(config, nnx.Rngs(0))))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    rotation = (jnp.ones((1, 3, 1)), jnp.zeros((1, 3, 1)))
    options = {"mask": Mask(causal=True), "cache": None, "backend": "xla"}
    attend = lambda state, x: nnx.merge(graph, state)(x, rotation=rotation, **options)  # noqa: E731
    return barriers(attend, zeros, jnp.zeros((1, 3, 4)))

  assert count(qk_norm=True) == count() + 1


def test_libtpu_has_a_word_for_what_does_not_fit(monkeypatch):
  """The status of a program that takes more memory than the chip has, by which `plan` knows it."""
  pytest.importorskip("libtpu")
  # libtpu ends the process at a flag of the CPU's that it does not know.
  monkeypatch.setenv("XLA_FLAGS", "")
  from internvl_jax.aot.target import open_target

  place = jax.sharding.SingleDeviceSharding(open_target("v5e:2x2").devices[0])
  lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1 << 33,), jnp.float32, sharding=place))
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"^RESOURCE_EXHAUSTED: "):
    lowered.compile()


def test_libtpu_is_kept_from_looking_for_a_tpu():
  from internvl_jax.aot.target import _NO_TPU

  assert {"TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"} <= set(_NO_TPU)


# --- Messages -----------------------------------------------------------------------------------------------

# The first two were recorded with jaxlib 0.10.2 and 0.12.0.1 when one of two processes was killed; the third is asserted by
# tests/runs/test_hosts.py. The last is ncclGetErrorString(ncclRemoteError) behind XLA's words: there was no card to see it on.
LOST = (
  "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
  "[127.0.0.1]:22943",
  "UNKNOWN: Gloo all-reduce failed: [external/xla++third_party_ext+gloo/gloo/transport/tcp/pair.cc:547] Connection closed "
  "by peer [127.0.0.1]:18081",
  "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats): /job:jax_worker/replica:0/task:1",
  "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error",
)


@pytest.mark.parametrize("text", LOST)
def test_a_lost_process_is_known_by_the_message(text):
  from internvl_jax.parallel.distributed import _LOST_PEER

  assert _LOST_PEER.search(text)


def test_a_full_disk_is_known_by_the_message_of_tensorstore(tmp_path):
  import tensorstore

  from internvl_jax.outputs import _DISK_ERRORS

  store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
  try:
    with pytest.raises(Exception, match=_DISK_ERRORS):
      store.write("a", b"x" * 2**16).result()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- orbax, grain, absl, ml-collections ---------------------------------------------------------------------


def test_orbax_asks_the_method_that_is_overridden(tmp_path):
  import orbax.checkpoint as ocp

  from internvl_jax.checkpoint.manager import Manager

  class Told(ocp.CheckpointManager):
    def reached_preemption(self, step):
      del step
      return True

  options = ocp.CheckpointManagerOptions(save_interval_steps=1000)
  with Manager(tmp_path, options=options) as manager:
    manager.save(0, args=ocp.args.JsonSave({}))  # The first step is always saved.
  for kind, saves in ((Told, True), (Manager, False)):
    with kind(tmp_path, options=options) as manager:
      assert manager.should_save(7) is saves


def test_orbax_lets_checkpoints_be_forgotten(tmp_path):
  import orbax.checkpoint as ocp

  from internvl_jax.checkpoint.manager import Manager

  with Manager(tmp_path) as manager:
    for step in (1, 2):
      manager.save(step, args=ocp.args.JsonSave({}))
    manager.wait_until_finished()
    manager.forget({2})
    assert manager.latest_step() == 1


def test_orbax_has_the_private_modules_and_the_hook():
  import orbax.checkpoint as ocp
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  assert gcs_utils._GCS_PATH_PREFIX
  assert callable(gcs_utils.is_hierarchical_namespace_enabled) and callable(gcs_utils.get_kvstore_for_gcs)
  assert "directory" in parameters(tensorstore_utils._use_gcs_driver)
  assert callable(tensorstore_utils._normalize_path)
  assert inspect.iscoroutinefunction(ocp.StandardCheckpointHandler.async_save)
  for kind in (ocp.path.atomicity.AtomicRenameTemporaryPath, ocp.path.atomicity.CommitFileTemporaryPath):
    assert inspect.iscoroutinefunction(kind.finalize)


def test_grain_has_the_option_of_shared_memory():
  import grain

  dataset = grain.MapDataset.source([1, 2, 3]).to_iter_dataset()
  options = grain.experimental.DatasetOptions(min_shm_size=1 << 20)
  assert list(grain.experimental.WithOptionsIterDataset(dataset, options)) == [1, 2, 3]


def test_absl_flags_can_be_marked_as_parsed():
  values = flags.FlagValues()
  values.mark_as_parsed()
  assert values.is_parsed()


def test_ml_collections_takes_our_parser(tmp_path):
  """The parser's value is what overrides are applied to, and a wrong recipe is one line."""
  from internvl_jax import cli, recipe_files
  from internvl_jax.errors import UserError

  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from internvl_jax.config import TrainConfig\n\ndef get_config(arg=''):\n  return TrainConfig()\n"
  )
  values = flags.FlagValues()
  argv = ["train", f"--config={recipe}", "--config.training.max_steps=7"]
  holder = cli.define_config_flag(values, argv)
  values(argv)
  assert holder.value.training.max_steps == 7
  recipe.write_text("")
  with pytest.raises(UserError, match="no function get_config"):
    recipe_files.load_recipe(str(recipe))


# --- fsspec, Pillow, transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["https", "s3", "gs", "ftp"])
def test_fsspec_tells_what_a_file_system_is_made_with(scheme):
  import fsspec

  found = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(f"{scheme}://host/folder/file")
  assert isinstance(found, dict)
  assert found.get("host", "host") == "host"


def test_pillow_obeys_its_limits(monkeypatch):
  text = PngImagePlugin.PngInfo()
  text.add_text("comment", "x" * (2 << 20), zip=True)
  file = io.BytesIO()
  Image.new("RGB", (8, 8)).save(file, "png", pnginfo=text)
  from internvl_jax.data.sample import images

  assert PngImagePlugin.MAX_TEXT_CHUNK > 2 << 20, images.__name__
  Image.open(file).load()
  monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)
  with pytest.raises(ValueError, match="too large"):
    Image.open(file).load()
  monkeypatch.undo()
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
  with pytest.raises(Image.DecompressionBombError):
    Image.open(file)


def test_transformers_has_fast_tokenizers_and_configs():
  from transformers import CONFIG_MAPPING

  from internvl_jax.hf.tokenizer import load_tokenizer

  assert load_tokenizer(str(REPOSITORY / "tests/assets/tokenizer")).backend_tokenizer.get_vocab_size() > 0
  assert CONFIG_MAPPING["qwen3"](hidden_size=32).to_dict()["rope_parameters"]["rope_theta"]
