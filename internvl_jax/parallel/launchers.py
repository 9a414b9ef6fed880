"""Which of a run's processes this one is, from what its launcher put into the environment.

A run on several hosts is the same command started once on each of them (or once for each GPU). Variables that are
read, by what sets them:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    JAX's own names; xpk's on GPUs (NNODES, NODE_RANK)
    MASTER_ADDR, WORLD_SIZE, RANK                                 torchrun and what imitates it
    OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK                    Open MPI's mpirun
    PMI_SIZE, PMI_RANK                                            MPICH's, Intel's and Cray's mpiexec
    SLURM_STEP_NUM_TASKS, SLURM_PROCID                            Slurm's srun
    (TPU chips)                                                   a TPU pod or a JobSet of GKE: JAX knows how to ask
"""

import dataclasses
import glob
import importlib.util
import re
from collections.abc import Callable, Mapping

from internvl_jax.errors import UserError
from internvl_jax.runtime_options import parse_distributed

_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Place:
  """This process among those of a run.

  Attributes:
    launcher: what started it, in words.
    coordinator: host and port of process 0; None: JAX finds that out, and the two numbers too.
    processes: how many there are.
    process: which one this is, from 0.
    gpus: which of the host's GPUs are this process's; None: all of them.
  """

  launcher: str
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  gpus: tuple[int, ...] | None = None


def find_place(setting: str, environ: Mapping[str, str]) -> Place | None:
  """Reads `runtime.distributed` and the environment; None for a process that is alone.

  Args:
    setting: "auto", "off", or "host:port,processes,process".
    environ: such as `os.environ`.

  Raises:
    UserError: variables are missing, or say what cannot be.
  """
  if setting == "off":
    return None
  if setting != "auto":
    parts = parse_distributed(setting)
    if parts is None:
      raise UserError(f"runtime.distributed={setting!r} must be auto, off, or host:port,processes,process")
    return _alone_is_none(Place("runtime.distributed", *parts))
  for launcher in _LAUNCHERS:
    if launcher.is_complete(environ):
      return _alone_is_none(launcher.place(environ))
  if _on_tpu(environ):
    return None if _single_tpu_host(environ) else Place("TPU pod")
  for launcher in _LAUNCHERS:
    launcher.refuse_half(environ)
  return None


def _alone_is_none(place: Place) -> Place | None:
  return None if place.processes == 1 else place


# --- Launchers ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Launcher:
  """The variables by which a launcher tells a process its place; of several names, the first one set counts.

  Attributes:
    name: in words.
    count, index: how many processes there are, and which one this is.
    local_count, local_index: the same on this host.
    needs: a variable without which the others say nothing.
    address: finds process 0's host where no general variable names it.
    strict: whether a part of the variables is a mistake; Slurm sets some in a shell that it gives, too.
  """

  name: str
  count: tuple[str, ...]
  index: tuple[str, ...]
  local_count: tuple[str, ...] = ()
  local_index: tuple[str, ...] = ()
  needs: str | None = None
  address: Callable[[Mapping[str, str]], str | None] = lambda environ: None
  strict: bool = True

  def is_complete(self, environ: Mapping[str, str]) -> bool:
    """Whether this launcher has told its processes all."""
    needed = self.needs is None or self.needs in environ
    return needed and _first(self.count, environ) is not None and _first(self.index, environ) is not None

  def place(self, environ: Mapping[str, str]) -> Place:
    """The place that the variables tell."""
    count, index = _number(self.count, environ), _number(self.index, environ)
    assert count is not None and index is not None
    if index >= count:
      raise UserError(
        f"{self.name} says that this is process {index} of {count}; they are counted from 0: set "
        f"{_name(self.index, environ)} below {_name(self.count, environ)}"
      )
    local = (self._local_count(environ, count), _number(self.local_index, environ))
    coordinator = self._coordinator(environ, everyone_is_here=count == local[0])
    return Place(self.name, coordinator, count, index, _gpus(*local, environ))

  def refuse_half(self, environ: Mapping[str, str]) -> None:
    """Raises if some variables are set and others are not: each process would train alone, on the same files."""
    groups = [*([(self.needs,)] if self.needs else []), self.count, self.index]
    # Other names are too common to mean anything by themselves.
    present = [group[0] for group in groups if environ.get(group[0])]
    missing = [group[0] for group in groups if _first(group, environ) is None]
    if present and self.strict and _number(self.count, environ) != 1:
      raise UserError(
        f"{' and '.join(present)} {'is' if len(present) == 1 else 'are'} set, as by {self.name}, but not "
        f"{' and '.join(missing)}; set all of them, or runtime.distributed=off to train with this process alone"
      )

  def _local_count(self, environ: Mapping[str, str], count: int) -> int | None:
    if self.local_count == _SLURM_LOCAL_COUNT:
      return _slurm_local_count(environ)
    found = _number(self.local_count, environ)
    return 1 if count == 1 else found

  def _coordinator(self, environ: Mapping[str, str], *, everyone_is_here: bool) -> str:
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
      return address if re.search(r":\d+$", address) else f"{address}:{_port(environ)}"
    if host := environ.get("MASTER_ADDR"):
      return f"{host}:{_master_port(environ)}"
    host = self.address(environ) or ("127.0.0.1" if everyone_is_here else None)
    if host is None:
      raise UserError(
        f"{self.name} does not tell which host has process 0; set JAX_COORDINATOR_ADDRESS=host:port to that host and "
        "a free port, the same for all processes"
      )
    return f"{host}:{_port(environ)}"


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
  return next((environ[name] for name in names if environ.get(name)), None)


def _name(names: tuple[str, ...], environ: Mapping[str, str]) -> str:
  return next((name for name in names if environ.get(name)), names[0])


def _number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
  text = _first(names, environ)
  if text is not None and not text.isdecimal():
    raise UserError(f"{_name(names, environ)}={text!r} must be a number, from 0 on")
  return None if text is None else int(text)


def _port(environ: Mapping[str, str]) -> int:
  """A port that all processes come to alike, and that two jobs on a host seldom share."""
  if port := _number(("JAX_COORDINATOR_PORT",), environ):
    return port
  job = _number(("SLURM_JOB_ID",), environ)
  return _PORT if job is None else 61440 + job % 4096


def _master_port(environ: Mapping[str, str]) -> int:
  port = _number(("MASTER_PORT",), environ) or 29500
  # torchrun itself listens there, for the processes that it starts.
  return port + 1 if "TORCHELASTIC_RUN_ID" in environ else port


def _gpus(count: int | None, index: int | None, environ: Mapping[str, str]) -> tuple[int, ...] | None:
  """The GPUs of a process, of those that the launcher left visible; None: all."""
  if count is None or index is None or count == 1:
    return None
  visible = next((environ[name] for name in _VISIBLE if environ.get(name)), None)
  if visible is None:
    return (index,)
  devices = [device for device in visible.split(",") if device.strip()]
  if len(devices) < count:
    return None  # The launcher has given each process its own.
  each = len(devices) // count
  return tuple(range(index * each, (index + 1) * each))


_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_SLURM_LOCAL_COUNT = ("SLURM_STEP_TASKS_PER_NODE",)


def _slurm_local_count(environ: Mapping[str, str]) -> int | None:
  """Tasks on this node, of a list such as "4(x2),3": that of the node's own place in it."""
  node, counts = _number(("SLURM_NODEID",), environ), []
  for entry in (_first(_SLURM_LOCAL_COUNT, environ) or "").split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
    if match is None:
      return None
    counts += [int(match[1])] * int(match[2] or 1)
  return counts[node] if node is not None and node < len(counts) else None


def _slurm_host(environ: Mapping[str, str]) -> str | None:
  """The first host of the step: of "rack[1-2]node[007-010,12]-ib,other" it is rack1node007-ib."""
  # Commas within brackets belong to the name.
  first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ.get("SLURM_STEP_NODELIST", ""))
  return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0]) if first else None


def _open_mpi_host(environ: Mapping[str, str]) -> str | None:
  """The host of mpirun, where Open MPI up to version 4 names it: process 0 is there."""
  uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
  match = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
  return (match[1] or f"[{match[2]}]") if match else _slurm_host(environ)


_JAX = _Launcher(
  "JAX's variables",
  count=("JAX_NUM_PROCESSES", "NNODES"),
  index=("JAX_PROCESS_ID", "NODE_RANK"),
  needs="JAX_COORDINATOR_ADDRESS",
)
_TORCHRUN = _Launcher(
  "torchrun",
  count=("WORLD_SIZE",),
  index=("RANK",),
  local_count=("LOCAL_WORLD_SIZE",),
  local_index=("LOCAL_RANK",),
  needs="MASTER_ADDR",
)
_OPEN_MPI = _Launcher(
  "Open MPI",
  count=("OMPI_COMM_WORLD_SIZE",),
  index=("OMPI_COMM_WORLD_RANK",),
  local_count=("OMPI_COMM_WORLD_LOCAL_SIZE",),
  local_index=("OMPI_COMM_WORLD_LOCAL_RANK",),
  address=_open_mpi_host,
)
_PMI = _Launcher(
  "MPI (PMI)",
  count=("PMI_SIZE",),
  index=("PMI_RANK",),
  local_count=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
  local_index=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
  address=_slurm_host,
)
_SLURM = _Launcher(
  "Slurm",
  count=("SLURM_STEP_NUM_TASKS",),
  index=("SLURM_PROCID",),
  local_count=_SLURM_LOCAL_COUNT,
  local_index=("SLURM_LOCALID",),
  needs="SLURM_STEP_NODELIST",
  address=_slurm_host,
  strict=False,
)
# The innermost comes first: mpirun and torchrun also run inside of a Slurm job, not the other way round.
_LAUNCHERS = (_JAX, _TORCHRUN, _OPEN_MPI, _PMI, _SLURM)


def _on_tpu(environ: Mapping[str, str]) -> bool:
  """Whether JAX would take this machine's TPU chips."""
  platforms = environ.get("JAX_PLATFORMS", "")
  if (platforms and "tpu" not in platforms.split(",")) or importlib.util.find_spec("libtpu") is None:
    return False
  told = any(environ.get(name) for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
  return told or bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _single_tpu_host(environ: Mapping[str, str]) -> bool:
  """Whether the environment says that no other host belongs to this one's slice, nor another slice to it."""
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  return hosts is not None and "," not in hosts and environ.get("MEGASCALE_NUM_SLICES", "1") == "1"
