"""Processes find each other in the environment of every launcher, and end together."""

import concurrent.futures
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from internvl_jax.arguments import MeshConfig
from internvl_jax.errors import UserError
from internvl_jax.parallel import distributed
from internvl_jax.parallel.distributed import StopSignal, initialized
from internvl_jax.parallel.launchers import Place, find_place
from internvl_jax.parallel.mesh import data_parts, make_mesh
from tests.support import forked
from tests.support.hosts import free_port
from tests.support.toy import CURVE, REPOSITORY


class Store:
  """Stands for the coordinator's: what threads have put there, and where they have met."""

  def __init__(self, count):
    self.values, self.me = {}, threading.local()
    self._barrier = threading.Barrier(count, timeout=30)

  def wait_at_barrier(self, name, timeout):
    self._barrier.wait()

  def key_value_set_bytes(self, key, value):
    assert key not in self.values and value and len(value) <= distributed._PIECE_BYTES
    self.values[key] = value

  def blocking_key_value_get_bytes(self, key, timeout):
    return self.values[key]

  def key_value_dir_get_bytes(self, folder):
    return [(key, value) for key, value in self.values.items() if key.startswith(f"{folder}/")]

  def key_value_delete(self, folder):
    for key in [key for key in self.values if key.startswith(f"{folder}/")]:
      del self.values[key]

  def __next__(self):
    self.me.calls += 1
    return self.me.calls - 1


def test_bytes_of_any_length_are_gathered_in_pieces(monkeypatch):
  store = Store(3)
  monkeypatch.setattr(distributed, "key_value_store", lambda: store)
  monkeypatch.setattr(distributed, "_gathers", store)
  monkeypatch.setattr(distributed, "_HEAD_BYTES", 4)
  monkeypatch.setattr(distributed, "_PIECE_BYTES", 9)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(jax, "process_index", lambda: store.me.number)
  lengths = [(0, 4, 5), (18, 1, 100), (0, 0, 0), (3, 9, 10)]
  parts = [[bytes([97 + i]) * length for i, length in enumerate(each)] for each in lengths]

  def process(number):
    store.me.number, store.me.calls = number, 0
    return [distributed.all_gather_bytes(each[number]) for each in parts]

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    assert list(pool.map(process, range(3))) == [parts] * 3
  # What all have read is not kept.
  assert {key.split("/")[0].rpartition(":")[2] for key in store.values} == {"3"}


TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "34229", "RANK": "5", "WORLD_SIZE": "8"}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_RANK": "5",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
PMI = {"PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "1"}
SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[07-08]",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
  "SLURM_PROCID": "5",
  "SLURM_NODEID": "1",
  "SLURM_LOCALID": "1",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "head:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.mark.parametrize(
  ("environ", "place"),
  [
    (JAX, Place("JAX's variables", "head:1234", 2, 1)),
    (
      {"JAX_COORDINATOR_ADDRESS": "head", "JAX_COORDINATOR_PORT": "99", "NNODES": "2", "NODE_RANK": "0"},
      Place("JAX's variables", "head:99", 2, 0),
    ),
    # One process a node: it takes all of its GPUs.
    (TORCHRUN, Place("torchrun", "10.0.0.1:34229", 8, 5)),
    # One process a GPU, under torchrun proper, which listens on its port itself.
    (
      {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"},
      Place("torchrun", "10.0.0.1:34230", 8, 5, (1,)),
    ),
    ({**OPEN_MPI, **ORTE}, Place("Open MPI", "10.96.0.1:8476", 8, 5, (1,))),
    ({**OPEN_MPI, "MASTER_ADDR": "a", "MASTER_PORT": "7"}, Place("Open MPI", "a:7", 8, 5, (1,))),
    # All processes on this host.
    (
      {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
      Place("Open MPI", "127.0.0.1:8476", 4, 1, (1,)),
    ),
    # mpirun inside of a Slurm job, whose own variables are those of its shell.
    (
      {**SLURM, **PMI, "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
      Place("MPI (PMI)", "gpu07:61441", 8, 5, (2, 3)),
    ),
    (SLURM, Place("Slurm", "gpu07:61441", 8, 5, (1,))),
    # Slurm has given each task its own GPU, or the node's one task all of them.
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "3"}, Place("Slurm", "gpu07:61441", 8, 5)),
    (
      {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"},
      Place("Slurm", "gpu07:61441", 8, 5),
    ),
    ({**SLURM, "SLURM_STEP_NODELIST": "a1,b[2-3]"}, Place("Slurm", "a1:61441", 8, 5, (1,))),
    (
      {**SLURM, "SLURM_STEP_NODELIST": "rack[1-2]node[03,05-06]-ib,b[2-3]"},
      Place("Slurm", "rack1node03-ib:61441", 8, 5, (1,)),
    ),
    # A process that is alone joins nobody.
    ({}, None),
    ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
    ({"WORLD_SIZE": "1"}, None),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"MASTER_PORT": "34229", "NNODES": "1"}, None),
    # A shell of a Slurm job that is no step of it.
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
  ],
)
def test_the_place_of_a_process(environ, place):
  assert find_place("auto", environ) == place
  assert find_place("off", environ) is None


@pytest.mark.parametrize(
  ("environ", "message"),
  [
    ({"MASTER_ADDR": "a", "RANK": "1"}, "MASTER_ADDR and RANK are set, as by torchrun, but not WORLD_SIZE"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, as by torchrun, but not MASTER_ADDR and RANK"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "but not JAX_NUM_PROCESSES and JAX_PROCESS_ID; set all of them"),
    ({"OMPI_COMM_WORLD_RANK": "1"}, "but not OMPI_COMM_WORLD_SIZE"),
    ({**TORCHRUN, "RANK": "8"}, "process 8 of 8; they are counted from 0: set RANK below WORLD_SIZE"),
    ({**TORCHRUN, "RANK": "one"}, "RANK='one' must be a number"),
    (PMI, "does not tell which host has process 0; set JAX_COORDINATOR_ADDRESS=host:port"),
  ],
)
def test_half_an_environment_is_refused(environ, message):
  with pytest.raises(UserError) as error:
    find_place("auto", environ)
  assert message in str(error.value) and "\n" not in str(error.value)
  assert find_place("off", environ) is None
  assert find_place("head:8476,4,3", environ) == Place("runtime.distributed", "head:8476", 4, 3)


class FakeDevice:
  """What a mesh is built from: a device that knows its host and its slice."""

  platform, device_kind = "cpu", "cpu"

  def __init__(self, number, host, part):
    self.id, self.process_index, self.slice_index = number, host, part

  def __repr__(self):
    return str(self.id)


def fake_devices(hosts, each, slices=1):
  return [FakeDevice(i, i // each, i // each * slices // hosts) for i in range(hosts * each)]


def ids(mesh):
  return [int(device.id) for device in mesh.devices.flat]


def test_slices_are_split_over_the_data_axes_alone():
  devices = fake_devices(hosts=4, each=2, slices=2)
  whole = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
  assert ids(whole) == list(range(8))
  # fsdp takes the slices that data does not: the first half of its devices is one slice.
  deep = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)
  assert [device.slice_index for device in deep.devices[0, :, 0, 0, 0]] == [0, 0, 1, 1]
  with pytest.raises(UserError, match="multiple of the 2 slices"):
    make_mesh(MeshConfig(data=1, tensor=8), devices)


def test_the_part_of_the_batch_that_a_host_feeds():
  devices = fake_devices(hosts=4, each=2)

  def parts(**axes):
    return data_parts(make_mesh(MeshConfig(**axes), devices))

  assert parts(data=8) == parts(fsdp=8) == parts(data=4, tensor=2) == [0, 1, 2, 3]
  # Two hosts hold the halves of a model: they read the same rows.
  assert parts(data=2, tensor=4) == [0, 0, 1, 1]
  assert parts(data=1, tensor=8) == [0, 0, 0, 0]
  uneven = [FakeDevice(i, host, 0) for i, host in enumerate([0, 0, 0, 1])]
  with pytest.raises(UserError, match="unevenly"):
    data_parts(make_mesh(MeshConfig(data=4), uneven))


PROGRAM = """
import sys, time
import jax
import numpy as np
from internvl_jax import cli
from internvl_jax.errors import UserError
from internvl_jax.parallel import distributed

distributed.JOIN_SECONDS, distributed.HEARTBEAT_SECONDS = int(sys.argv[2]), 5 if sys.argv[3] == "fail" else 10
with distributed.initialized(sys.argv[1], cli.report):
  print("joined", jax.process_index(), flush=True)
  if jax.process_index() == 1 and sys.argv[3] == "fail":
    raise UserError("the disk of this host is on fire")
  print(distributed.sum_over([0, 1], np.array([[1, 2], [2**40, 4]]) * (1 + jax.process_index())).tolist())
  distributed.barrier("everybody", seconds=60)
print("left")
"""


LOADS = """
import sys
import jax
import numpy as np
from internvl_jax import cli
from internvl_jax.arguments import MeshConfig
from internvl_jax.hf.model import open_source
from internvl_jax.parallel import distributed, rules
from internvl_jax.parallel.mesh import make_mesh

with distributed.initialized(sys.argv[1], cli.report):
  source = open_source(sys.argv[2])
  shapes = source.model.shapes
  alone = source.load(shapes, dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])))
  spread = source.load(shapes, rules.weight_shardings(source.model.axes, shapes, make_mesh(MeshConfig(data=1, fsdp=4))))
  for path, value in spread.items():
    for shard in value.addressable_shards:
      np.testing.assert_array_equal(shard.data, alone[path][shard.index], err_msg=path)
  print(sum(not value.is_fully_replicated for value in spread.values()) > 8, flush=True)
  distributed.barrier("all is compared", seconds=60)
"""


class Started:
  """A program in a process of its own, and the files of what it says."""

  def __init__(self, folder, program, *arguments, devices=1):
    number = len(list(folder.iterdir()))
    script, *self.outputs = (folder / f"{number}-{name}" for name in ("program.py", "stdout", "stderr"))
    script.write_text(program)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPOSITORY)}
    with self.outputs[0].open("w") as out, self.outputs[1].open("w") as err:
      files = {"stdout": out.fileno(), "stderr": err.fileno()}
      self.process = forked.start([str(script), *arguments], environment=environment, **files)

  def communicate(self, timeout=60):
    """Its exit code, and what it has said on both outputs, once it has ended."""
    return self.process.wait(timeout), *(path.read_text() for path in self.outputs)


def start(folder, setting, *, seconds=60, what="pass"):
  return Started(folder, PROGRAM, setting, str(seconds), what)


def test_processes_join_and_leave(tmp_path):
  port = free_port()
  processes = [start(tmp_path, f"127.0.0.1:{port},2,{i}") for i in range(2)]
  for i, process in enumerate(processes):
    said = [line for line in process.communicate()[1].splitlines() if "Gloo" not in line]
    assert said == [f"joined {i}", f"[[3, 6], [{3 * 2**40}, 12]]", "left"]


def test_processes_read_a_checkpoint_together(tmp_path):
  init, port = str(CURVE / "init"), free_port()
  processes = [Started(tmp_path, LOADS, f"127.0.0.1:{port},2,{i}", init, devices=2) for i in range(2)]
  for process in processes:
    status, stdout, stderr = process.communicate(timeout=120)
    assert status == 0 and stdout.splitlines()[-1] == "True", stderr


def test_processes_that_feed_the_same_rows_count_once_and_alike():
  everyone = np.array([[[1, 2]], [[1, 2]], [[4, 0]], [[4, 0]]])
  assert distributed.sum_parts([0, 0, 1, 1], everyone).tolist() == [[5, 2]]
  everyone[3, 0, 1] = 1
  with pytest.raises(
    UserError, match=r"processes 2 and 3 feed the same rows .*\[\[4, 0\]\] and \[\[4, 1\]\]"
  ):
    distributed.sum_parts([0, 0, 1, 1], everyone)


def test_one_that_fails_says_why_and_ends_the_others(tmp_path):
  port = free_port()
  begin = time.monotonic()
  processes = [start(tmp_path, f"127.0.0.1:{port},2,{i}", what="fail") for i in range(2)]
  (first, _, told), (second, _, why) = (process.communicate() for process in processes)
  assert time.monotonic() - begin < 40 and second == 1 and first != 0
  assert "error: the disk of this host is on fire\n" in why and "Traceback" not in why
  assert "another task died" in told


def test_a_pod_of_which_hosts_are_missing_is_told_what_to_look_at():
  text = distributed._absence(Place("TPU pod"))
  assert "(TPU pod) has waited 300 s for the other hosts" in text and "None" not in text


def test_one_that_meets_nobody_says_so(tmp_path):
  each = [start(tmp_path, f"127.0.0.1:{free_port()},2,{process}", seconds=3) for process in range(2)]
  for process, alone, others in zip(range(2), each, ("the others", "process 0"), strict=True):
    status, _, stderr = alone.communicate()
    (error,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert f"process {process} of 2 (runtime.distributed) has waited 3 s for {others} at 127.0.0.1" in error
    assert status == 1


def test_one_alone_opens_no_port_and_stops_when_told():
  with initialized("auto", pytest.fail), StopSignal() as asked_to_stop:
    assert not jax.distributed.is_initialized()
    asked_to_stop.listen()
    assert not asked_to_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked_to_stop(2)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
