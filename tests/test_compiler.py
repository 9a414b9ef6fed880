"""What XLA is told: which options, who has the last word, and what becomes of options that it does not know."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from internvl_jax import compiler, environment
from internvl_jax.compiler import COMPILE_ONLY, OPTIONS, check_overrides, compile_program, compiler_options
from internvl_jax.config import TrainConfig
from internvl_jax.config_checks import problems
from internvl_jax.environment import MEMORY_FRACTION, set_environment
from internvl_jax.errors import UserError
from internvl_jax.runtime_options import parse_xla_option
from internvl_jax.trainer import CompiledSteps
from tests.support.harness import Harness, make_batch, toy

ROOT = Path(__file__).parent.parent
ROWS = [row for table in (OPTIONS, COMPILE_ONLY) for rows in table.values() for row in rows]
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def lowered():
  return jax.jit(lambda x: x + 1).lower(np.float32(1))


@pytest.fixture
def rows(monkeypatch):
  """Sets the table of the platform at hand."""

  def put(*options):
    options = tuple(compiler.Option(name=name, value=value, reason="a test") for name, value in options)
    monkeypatch.setitem(OPTIONS, "cpu", options)

  return put


@pytest.fixture
def heard(caplog):
  logging.getLogger("absl").propagate = True
  caplog.set_level(logging.INFO)
  return caplog


# --- The table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_this_xla_knows_every_option(row):
  """Whatever the backend, XLA reads all options into one structure, and refuses what has no place there."""
  assert lowered().compile(compiler_options={row.name: row.value})(np.float32(1)) == 2
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    lowered().compile(compiler_options={f"{row.name}_not": row.value})


def test_options_are_the_platforms():
  gpu = compiler_options("gpu", environ={})
  assert gpu == {row.name: row.value for row in OPTIONS["gpu"]}
  assert compiler_options("gpu", compile_only=True, environ={}) == gpu | {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
  }
  assert compiler_options("cpu", environ={}) == compiler_options("tpu", compile_only=True, environ={}) == {}


# --- Who has the last word ----------------------------------------------------------------------------------


def test_what_xla_flags_names_stays(heard):
  compiler._say_once.cache_clear()
  environ = {"XLA_FLAGS": f"--xla_dump_max_hlo_modules=3 --{SCHEDULER}=false"}
  compiler_options("gpu", environ=environ)
  found = compiler_options("gpu", environ=environ)
  assert SCHEDULER not in found and len(found) == len(OPTIONS["gpu"]) - 1
  assert [record.getMessage() for record in heard.records] == [
    f"XLA_FLAGS has its own {SCHEDULER}, which stays"
  ]


def test_xla_flags_may_name_a_file(tmp_path):
  file = tmp_path / "flags"
  file.write_text(f"--{SCHEDULER}=false\n--xla_gpu_autotune_level=2\n")
  found = compiler_options("gpu", compile_only=True, environ={"XLA_FLAGS": str(file)})
  assert found.keys().isdisjoint({SCHEDULER, "xla_gpu_autotune_level"})
  assert "xla_gpu_enable_triton_gemm" in found


def test_overrides_go_before_the_table_and_xla_flags():
  overrides = (f"{SCHEDULER}=false", "xla_gpu_autotune_level=2", "xla_gpu_enable_command_buffer=")
  expected = {SCHEDULER: False, "xla_gpu_autotune_level": 2, "xla_gpu_enable_command_buffer": ""}
  for environ in ({}, {"XLA_FLAGS": f"--{SCHEDULER}=true"}):
    found = compiler_options("gpu", overrides, compile_only=True, environ=environ)
    assert found.items() >= expected.items()
  assert compiler_options("cpu", overrides, environ={}) == expected


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("xla_gpu_x=True", ("xla_gpu_x", True)),
    ("--xla_gpu_x=false", ("xla_gpu_x", False)),
    ("xla_gpu_x=-3", ("xla_gpu_x", -3)),
    ("xla_gpu_x=FUSION,CUBLAS", ("xla_gpu_x", "FUSION,CUBLAS")),
    ("xla_dump_to=/tmp/a=b", ("xla_dump_to", "/tmp/a=b")),
  ],
)
def test_an_entry_is_a_name_and_a_value(text, expected):
  name, value = parse_xla_option(text)
  assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("entry", ["xla_gpu_x", "gpu_x=1", "xla gpu=1", ""])
def test_a_bad_entry_is_a_problem_of_the_configuration(entry):
  config = TrainConfig()
  config.runtime.xla_options = ("xla_gpu_autotune_level=2", entry)
  (line,) = [line for line in problems(config) if "xla_options" in line]
  assert line == (
    f"runtime.xla_options: {entry!r} must be xla_…=value, such as 'xla_gpu_enable_triton_gemm=false'"
  )


# --- Options that XLA refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("entry", "why"),
  [
    ("xla_gpu_not_there=true", "there is no such option"),
    ("xla_gpu_autotune_level=much", "'much' is not a valid int32 value"),
  ],
)
def test_an_override_that_xla_refuses_is_one_line(entry, why):
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  version = f"the XLA of jaxlib {jax.lib.__version__}"
  with pytest.raises(UserError) as caught:
    check_overrides(("xla_gpu_graph_min_graph_size=5", entry), mesh)
  assert (
    str(caught.value) == f"runtime.xla_options: {entry!r}: {why} in {version}; correct it, or leave it out"
  )


def test_overrides_are_checked_where_the_mesh_is_opened():
  from internvl_jax.setup.devices import open_mesh

  config = TrainConfig()
  config.runtime.xla_options = ("xla_gpu_not_there=1",)
  with pytest.raises(UserError, match="no such option"):
    open_mesh(config)


def test_a_default_that_xla_no_longer_knows_is_left_out(rows, heard):
  rows(("xla_gpu_not_there", True), ("xla_gpu_autotune_level", 3))
  assert compile_program(lowered(), "cpu")(np.float32(1)) == 2
  (line,) = [record.getMessage() for record in heard.records]
  assert "xla_gpu_not_there, which is set by default: there is no such option" in line


def test_other_errors_of_the_compiler_are_not_ours():
  class Lowered:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")

  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    compile_program(Lowered(), "gpu", ("xla_gpu_autotune_level=2",))


# --- Where they go ------------------------------------------------------------------------------------------


def test_the_step_is_compiled_with_them(rows, monkeypatch):
  taken = []

  class Lowered:
    def compile(self, compiler_options):
      taken.append(compiler_options)
      return lambda *inputs: inputs

  class Jitted:
    def trace(self, *inputs):
      return self

    def lower(self):
      return Lowered()

  rows((SCHEDULER, True))
  monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: Jitted())
  monkeypatch.setattr(compiler, "named_in_flags", lambda environ: set())
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  ids, tiles = np.zeros((1, 2, 8), np.int32), np.zeros((1, 1, 3, 4, 4, 3), np.uint8)
  rows_of_batch = type("Rows", (), {"input_ids": ids, "tiles": tiles})
  batch = type("Batch", (), {"rows": rows_of_batch})
  steps = CompiledSteps(lambda: None, mesh, xla_options=("xla_gpu_autotune_level=2",))
  steps._compile((None, None, batch, 0.0))
  assert taken == [{SCHEDULER: True, "xla_gpu_autotune_level": 2}]


@pytest.fixture(scope="module")
def sharded():
  """A toy step on a mesh that shards rows and parameters, with abstract inputs as a run has them before its weights."""
  harness = Harness(toy(), mesh={"data": 2, "fsdp": 2}, freeze={"freeze_backbone": True})
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    (harness.state, harness.frozen),
  )
  return harness, abstract


def shapes_of(batch):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)


def test_what_is_compiled_beside_is_the_program_that_is_run(sharded, monkeypatch):
  """Not another one for the arrays themselves; a batch of another shape gets its own."""
  harness, abstract = sharded
  compiled = []
  compile_one = CompiledSteps._compile

  def counted(self, inputs):
    compiled.append(threading.current_thread().name.partition("_")[0])
    return compile_one(self, inputs)

  monkeypatch.setattr(CompiledSteps, "_compile", counted)
  steps = CompiledSteps(harness.step, harness.mesh)
  batch, other = make_batch(shards=4), make_batch(shards=4, length=16)
  steps.compile_beside(*abstract, shapes_of(batch))
  assert not steps.knows(batch)
  state = jax.tree.map(jnp.copy, harness.state)
  state, metrics = steps(state, harness.frozen, batch, 1e-2)
  assert compiled == ["compile"] and steps.knows(batch) and not steps.knows(other)
  assert float(metrics.loss) == float(harness.run(batch).loss)
  steps(state, harness.frozen, other, 1e-2)
  assert compiled == ["compile", "MainThread"]
  assert [row.name for row in steps.stopwatch.beside()] == ["trace", "lower", "compile"]


def test_an_error_beside_is_that_of_the_step(sharded):
  harness, abstract = sharded

  def fails(*inputs):
    raise UserError("cannot be computed so")

  step = type("Step", (), {"__call__": staticmethod(fails)})()
  steps, batch = CompiledSteps(step, harness.mesh), make_batch(shards=4)
  steps.compile_beside(*abstract, shapes_of(batch))
  with pytest.raises(UserError, match="cannot be computed so"):
    steps(harness.state, harness.frozen, batch, 1e-2)
  steps.compile_beside(*abstract, shapes_of(batch))
  steps.close()  # Nobody asked for it.


def test_memory_is_taken_before_the_backend_starts():
  environ = {}
  set_environment(environ)
  assert environ == {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION)}
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    environ = {name: "0.5"}
    set_environment(environ)
    assert environ == {name: "0.5"}


def test_jax_reads_the_fraction():
  """By the function of JAX that makes the options of the GPU backend."""
  code = (
    "from internvl_jax.environment import set_environment; set_environment();"
    "from jaxlib.xla_client import generate_pjrt_gpu_plugin_options as read; print(read()['memory_fraction'])"
  )
  names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
  environment = {key: value for key, value in os.environ.items() if key not in names}
  for given, expected in ({}, MEMORY_FRACTION), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5):
    found = subprocess.run(
      [sys.executable, "-c", code],
      env=environment | given | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      check=True,
    )
    assert float(found.stdout) == expected


@pytest.mark.parametrize(
  ("environ", "pages", "accelerator", "expected"),
  [
    ({}, "always [madvise] never", False, True),
    ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "always [madvise] never", False, True),
    ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "always [madvise] never", False, False),
    ({}, "[always] madvise never", False, False),
    ({}, "always madvise [never]", False, False),
    ({}, None, False, False),
    ({}, "always [madvise] never", True, False),
    ({"JAX_PLATFORMS": "cpu"}, "always [madvise] never", True, True),
    ({"JAX_PLATFORMS": "cuda,cpu"}, "always [madvise] never", False, False),
  ],
)
def test_huge_pages_are_asked_for_where_cpus_compute(
  environ, pages, accelerator, expected, tmp_path, monkeypatch
):
  monkeypatch.setattr(environment, "_glibc", lambda: (2, 36))
  if pages is not None:
    (tmp_path / "enabled").write_text(pages + "\n")
  found = environment.wants_huge_pages(environ, tmp_path / "enabled", [tmp_path] if accelerator else [])
  assert found == expected
  monkeypatch.setattr(environment, "_glibc", lambda: (2, 34))
  assert not environment.wants_huge_pages(environ, tmp_path / "enabled", [])


def test_a_command_starts_anew_with_what_it_was_given(monkeypatch):
  """And with a setting of glibc's more; not under a debugger, and not a second time."""
  started = []
  monkeypatch.setattr(environment, "wants_huge_pages", lambda environ: "hugetlb" not in str(environ))
  monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
  monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
  monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "internvl_jax.train", "--config=a b"])
  monkeypatch.setattr(sys, "gettrace", lambda: None)
  environment.restart_with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=1", "A": "b"})
  ((path, arguments, given),) = started
  assert path == sys.executable and arguments == [sys.executable, *sys.orig_argv[1:]]
  assert given == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1", "A": "b"}
  environment.restart_with_huge_pages(given)
  monkeypatch.setattr(sys, "gettrace", lambda: print)
  environment.restart_with_huge_pages({})
  assert len(started) == 1


@pytest.mark.parametrize(
  ("folder", "given", "expected"),
  [
    ("/cache", None, "xla_gpu_per_fusion_autotune_cache_dir"),
    ("gs://bucket/cache", None, "none"),
    ("/cache", "all", "all"),
  ],
)
def test_what_was_timed_is_kept_beside_the_programs(folder, given, expected, monkeypatch):
  before = {
    name: getattr(jax.config, name)
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
  }
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", raising=False)
  if given:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", given)
    jax.config.update("jax_persistent_cache_enable_xla_caches", given)
  try:
    compiler.set_cache(folder)
    assert jax.config.jax_compilation_cache_dir == folder
    assert jax.config.jax_persistent_cache_enable_xla_caches == expected
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


@pytest.fixture
def cache_settings(monkeypatch, tmp_path):
  """JAX's settings as they are where nobody has named a cache."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_enable_xla_caches",
    "jax_compilation_cache_max_size",
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_where_nobody_says_otherwise(cache_settings, tmp_path, caplog):
  folder = compiler.open_cache(TrainConfig().runtime.compilation_cache_dir)
  assert folder is not None and Path(folder).parent == tmp_path / "caches" / "internvl_jax" / "programs"
  assert jax.config.jax_compilation_cache_dir == folder and jax.config.jax_compilation_cache_max_size > 0
  # What a variable of JAX's or an earlier call has named stays.
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  assert compiler.open_cache("auto") == "/elsewhere" == jax.config.jax_compilation_cache_dir
  assert compiler.open_cache("/named") == "/named" == jax.config.jax_compilation_cache_dir
  assert compiler.open_cache(None) is None


def test_a_cache_that_cannot_be_written_is_no_error(cache_settings, tmp_path, caplog):
  (tmp_path / "caches").write_text("a file")
  with caplog.at_level(logging.INFO):
    assert compiler.open_cache("auto") is None
  assert jax.config.jax_compilation_cache_dir is None
  assert re.search(r"compiled anew: .*caches.* cannot be written \(Not a directory\)", caplog.text)
