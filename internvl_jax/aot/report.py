"""What a compiled step would take of each chip: memory, operations, exchanges, and the least time of a step."""

import collections
import dataclasses
import re
from typing import Any

import jax

from internvl_jax.aot import collectives, costs, hlo, links, operations, overlap, traffic
from internvl_jax.aot.peak import peak
from internvl_jax.aot.program import Compiled, StepPlan
from internvl_jax.aot.target import Target
from internvl_jax.models.base_weights import as_kernels
from internvl_jax.parallel.rules import bytes_per_device
from internvl_jax.trees import count

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
  """Arrays of one shape and origin that are alive when most memory is in use.

  Attributes:
    shape: e.g. "bf16[32,1,8192,4096]".
    count: how many.
    bytes: of all of them.
    origin: part of the model and phase, and the operation that makes it.
  """

  shape: str
  count: int
  bytes: int
  origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """All collectives of one kind along the same axes of the mesh.

  Attributes:
    kind, axes, dtype: see `collectives.Collective`; the axes are joined by "+".
    count: runs in a step.
    bytes: of whole arrays (gathered, or before they are scattered) in a step, on a chip.
    seconds: the least time; None where links are not known.
    parts: bytes by the part of the model and the phase that they belong to.
  """

  kind: str
  axes: str
  dtype: str
  count: int
  bytes: int
  seconds: float | None
  parts: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """The least time of a step, if everything that can overlap does.

  Attributes:
    compute, memory, links: seconds that the operations, the main memory and the exchanges take alone.
    step: the longest of them.
    mfu: the model's operations over what the chip could have computed in that time: a bound from above.
  """

  compute: float
  memory: float
  links: float
  step: float
  mfu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Everything that is known of a step; bytes, operations and seconds are those of one chip.

  Attributes:
    topology, chips, mesh: the devices and how they are arranged.
    batch: micro-batches, rows of a shard, tokens and tiles of a row, data shards.
    balance: how packed rows are balanced over data shards, and by which costs; None: they are taken as they come.
    warnings: lines on parameters that too few devices share.
    execution: dtype, attention, experts (None in a dense model) and remat.
    parameters, trainable: how many.
    memory: bytes by part, which add up to `total`.
    limit: bytes that a program may use; None where that is not known.
    fits: whether `total` is within it.
    refusal: the compiler's words where memory did not suffice.
    peak: the largest buffers alive at once, parameters and optimizer state apart.
    flops: of the model, {part: {"forward", "backward"}}.
    compiled_flops: of the program, what is recomputed included.
    kernel_flops: those of them in kernels written by hand, by their shapes.
    traffic: bytes to and from the main memory, an estimate.
    uncounted_loops: loops of the program of which it is not known how often they run. The program's operations, traffic
      and exchanges hold one turn of them.
    exchanges: by kind and axes, largest first.
    hidden: share of the exchanged bytes that products run beside; None for platforms whose programs do not say.
    roofline: None where the chip's data sheet is not known.
    lower_seconds, compile_seconds: of this machine.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  batch: dict[str, int]
  balance: dict[str, Any] | None = None
  warnings: list[str] = dataclasses.field(default_factory=list)
  execution: dict[str, Any]
  parameters: int
  trainable: int
  memory: dict[str, int]
  limit: int | None
  fits: bool | None
  refusal: str | None
  peak: list[Buffer]
  flops: dict[str, dict[str, int]]
  compiled_flops: int
  kernel_flops: int
  traffic: int
  uncounted_loops: int
  exchanges: list[Exchange]
  hidden: float | None = None
  roofline: Roofline | None
  lower_seconds: float
  compile_seconds: float

  @property
  def total(self) -> int:
    """Bytes of memory in use at the peak."""
    return sum(self.memory.values())

  def as_json(self) -> dict[str, Any]:
    """All of it as plain values."""
    return {**dataclasses.asdict(self), "total": self.total}


def make_report(plan: StepPlan, compiled: Compiled, target: Target, *, limit: int | None) -> Report:
  """Puts together what the shapes, the compiled program and the chip's data sheet say."""
  module = hlo.parse(compiled.hlo)
  found = collectives.find(module, plan.mesh.size)
  # Programs count devices as the mesh does.
  target = dataclasses.replace(target, devices=list(plan.mesh.devices.flat))
  memory = memory_by_part(plan, compiled)
  total = sum(memory.values())
  sharing = plan.mesh.size // plan.shards
  flops = {
    part: {phase: value // sharing for phase, value in entry.items()}
    for part, entry in costs.model_flops(plan).items()
  }
  kernels = operations.kernel_flops(module, plan.mesh.shape["expert"])
  compiled_flops = operations.flops(module) + kernels
  moved = traffic.bytes_moved(module)
  how = plan.step.objective.how  # pyright: ignore[reportAttributeAccessIssue]
  return Report(
    topology=target.name,
    chips=plan.mesh.size,
    mesh=dict(plan.mesh.shape),
    batch={**dataclasses.asdict(plan.shape), "shards": plan.shards},
    balance=plan.balance,
    warnings=list(plan.warnings),
    execution={
      "dtype": jax.numpy.dtype(how.dtype).name,
      "attention": how.kernels.attention,
      "experts": how.kernels.experts if plan.source.config.text.experts else None,
      "remat": how.remat,
    },
    parameters=count(as_kernels({**plan.frozen, **plan.state.params})),
    trainable=count(plan.state.params),
    memory=memory,
    limit=limit,
    fits=None if limit is None else compiled.refusal is None and total <= limit,
    refusal=compiled.refusal,
    peak=peak_buffers(plan, module, compiled),
    flops=flops,
    compiled_flops=compiled_flops,
    kernel_flops=kernels,
    traffic=moved,
    uncounted_loops=len(module.uncounted_loops),
    exchanges=exchanges(found, plan, target),
    hidden=overlap.hidden_share(overlap.exchanges(module)) if target.platform == "gpu" else None,
    roofline=roofline(_sum(flops), compiled_flops, moved, found, target),
    lower_seconds=compiled.lower_seconds,
    compile_seconds=compiled.compile_seconds,
  )


def _sum(flops: dict[str, dict[str, int]]) -> int:
  return sum(value for entry in flops.values() for value in entry.values())


def arguments(plan: StepPlan) -> dict[str, int]:
  """Bytes of one device that the step's arguments take, by their shardings."""

  def held(tree: Any) -> int:
    return sum(bytes_per_device(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))

  return {
    "parameters that train": held(plan.state.params),
    "frozen parameters": held(plan.frozen),
    "optimizer state": held(plan.state.opt_state),
    "batch": held(plan.batch),
  }


def memory_by_part(plan: StepPlan, compiled: Compiled) -> dict[str, int]:
  """Bytes of one device: what the shardings say of arguments, and the compiler of the rest. They add up."""
  stats, known = compiled.stats, arguments(plan)
  gradients = min(stats["temp"], known["parameters that train"])
  return {
    **known,
    "padding of these": stats["argument"] - sum(known.values()),
    "gradients": gradients,
    "activations and temporaries": stats["temp"] - gradients,
    "results": stats["output"] - stats["alias"],
    "program": stats["generated_code"],
  }


def peak_buffers(plan: StepPlan, module: hlo.Module, compiled: Compiled) -> list[Buffer]:
  """The temporaries that live when most memory is in use, those of one shape and origin together."""
  lines = {name: line for found in module.computations.values() for name, line in found.items()}
  weights = {leaf.sharding.shard_shape(leaf.shape) for leaf in plan.state.params.values() if leaf.ndim > 1}
  groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
  for (name, index), size in peak(module, *compiled.files):
    line = lines[name]
    if len(line.arrays) > 1 and not index:
      continue  # The addresses of a tuple's parts.
    array = line.arrays[index[0] if index else 0]
    shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
    is_gradient = array.dtype == "f32" and array.dims in weights
    groups[shape, "gradients" if is_gradient else _origin(line)].append(size)
  buffers = [
    Buffer(shape=shape, count=len(sizes), bytes=sum(sizes), origin=origin)
    for (shape, origin), sizes in groups.items()
  ]
  return sorted(buffers, key=lambda buffer: -buffer.bytes)


def _origin(line: hlo.Instruction) -> str:
  scope = line.op_name
  if not scope:
    return re.sub(r"[.\d]+$", "", line.name)
  return f"{costs.part_of_scope(scope)}, {costs.phase_of(scope)}: {scope.rsplit('/', 1)[-1]}"


def exchanges(found: list[collectives.Collective], plan: StepPlan, target: Target) -> list[Exchange]:
  """Collectives by kind, axes and type, those that move most first."""
  groups: dict[tuple[str, str, str], list[collectives.Collective]] = collections.defaultdict(list)
  for collective in found:
    axes = "+".join(collective.axes(dict(plan.mesh.shape)))
    groups[collective.kind, axes, collective.dtype].append(collective)
  rows = []
  for (kind, axes, dtype), members in groups.items():
    parts: dict[str, int] = collections.defaultdict(int)
    for member in members:
      parts[f"{costs.part_of_scope(member.op_name)}, {costs.phase_of(member.op_name)}"] += (
        member.runs * member.bytes
      )
    rows.append(
      Exchange(
        kind=kind,
        axes=axes,
        dtype=dtype,
        count=sum(member.runs for member in members),
        bytes=sum(member.runs * member.bytes for member in members),
        seconds=links.total_seconds(members, target),
        parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
      )
    )
  return sorted(rows, key=lambda row: -(row.seconds or row.bytes))


def roofline(
  model_flops: int, compiled_flops: int, moved: int, found: list[collectives.Collective], target: Target
) -> Roofline | None:
  """The least time of a step on chips whose data sheet is known."""
  chip = target.chip
  if chip is None:
    return None
  compute, memory = compiled_flops / chip.flops, moved / chip.memory_bandwidth
  exchanged = links.total_seconds(found, target) or 0.0
  step = max(compute, memory, exchanged)
  return Roofline(
    compute=compute,
    memory=memory,
    links=exchanged,
    step=step,
    mfu=model_flops / chip.flops / step if step else 0.0,
  )


# --- Words --------------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
  """Whether it fits, in a line."""
  unit, size_of = _unit(report.total, _BYTES)
  used = f"{report.total / size_of:.2f} {unit}"
  if report.limit is None:
    return f"{used} a device; how much it has is not known (--hbm=GiB says)"
  limit = f"{report.limit / GIB:.2f} GiB"
  if report.fits:
    return f"fits: {used} of {limit} a device, {(report.limit - report.total) / GIB:.2f} GiB are left"
  excess = report.total - report.limit
  # Refused below the limit: the free memory would have to be contiguous.
  why = f"{excess / GIB:.2f} GiB too much" if excess > 0 else f"the compiler says: {report.refusal}"
  return f"does not fit: {used} of {limit} a device, {why}; {' or '.join(advice(report))}"


def advice(report: Report) -> list[str]:
  """What would take less memory and is not done yet, the cheapest first, in words that follow "or"."""
  mesh, batch, remat = report.mesh, report.batch, report.execution["remat"]
  found = (
    ["shard weights and moments over all devices (mesh.data=1, mesh.fsdp=-1)"] if mesh["data"] > 1 else []
  )
  more = "take more devices (--search looks for the fewest)"
  kept = ("parameters that train", "frozen parameters", "optimizer state")
  if report.limit is not None and sum(report.memory[part] for part in kept) > report.limit:
    return [*found, more]  # However rows are cut, these stay as large.
  if remat is None:
    found.append("recompute layers (model.grad_checkpoint=True)")
  elif remat != "full":
    found.append("recompute more (runtime.remat_policy=full)")
  if batch["rows"] > 1:
    found.append(
      "take one row at a time (training.per_device_train_batch_size=1, and training.gradient_accumulation_steps="
      f"{batch['accumulation'] * batch['rows']} for the same batch)"
    )
  elif mesh["tensor"] * mesh["sequence"] < report.chips:
    found.append("let devices share a row (mesh.tensor or mesh.sequence)")
  return [*found, more]


def render(report: Report) -> str:
  """The report for people."""
  lines = [*_head(report), "", *_memory(report), "", *_flops(report)]
  if report.exchanges:
    lines += ["", *_exchanges(report)]
  if report.roofline:
    lines += ["", *_roofline(report.roofline)]
  lines += ["", f"lowered in {report.lower_seconds:.1f} s, compiled in {report.compile_seconds:.1f} s"]
  return "\n".join(lines)


def _head(report: Report) -> list[str]:
  batch, how = report.batch, report.execution
  mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"
  return [
    f"{report.parameters:,} parameters, {report.trainable:,} train",
    f"{report.topology}: {report.chips} devices, mesh {mesh}",
    f"a step: {batch['accumulation']} x {batch['shards']} x {batch['rows']} rows (micro-batches, data shards, rows of "
    f"one) of {batch['tokens']} tokens and {batch['tiles']} tiles",
    *_balance(report.balance),
    f"computed in {how['dtype']}, attention {how['attention']}, "
    + (f"experts {how['experts']}, " if how["experts"] else "")
    + f"rematerialized: {how['remat'] or 'nothing'}",
    *(f"warning: {line}" for line in report.warnings),
  ]


def _balance(found: dict[str, Any] | None) -> list[str]:
  """How rows are balanced, in a line."""
  if found is None:
    return []
  by = "loader.balance_costs" if found["measured"] else "FLOPs"
  return [
    f"rows are balanced over {found['steps']} steps: by {by}, a tile costs {found['tokens_a_tile']:.4g} tokens and a pair "
    f"of attention {found['tokens_a_pair']:.2g} (doctor says how even the data's rows get)"
  ]


def _unit(total: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
  """The largest of the units that the total is at least one of, or the smallest."""
  return next((unit for unit in units if total >= unit[1]), units[-1])


_BYTES = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10))
_OPERATIONS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


def _memory(report: Report) -> list[str]:
  unit, size_of = _unit(report.total, _BYTES)
  lines = [f"{'memory of a device':<44}{unit:>10}"]
  lines += [f"  {part:<42}{size / size_of:>10.2f}" for part, size in report.memory.items()]
  lines += [f"  {'total':<42}{report.total / size_of:>10.2f}", verdict(report)]
  if report.peak:
    lines += ["", f"{'largest temporaries at the peak':<76}{unit:>8}"]
    for buffer in report.peak[:8]:
      times = f"{buffer.count} x " if buffer.count > 1 else ""
      lines.append(f"  {times + buffer.shape:<34}{buffer.origin[:40]:<40}{buffer.bytes / size_of:>8.2f}")
  return lines


def _flops(report: Report) -> list[str]:
  unit, size_of = _unit(_sum(report.flops), _OPERATIONS)
  lines = [f"{f'operations of a device and step ({unit})':<44}{'forward':>10}{'backward':>10}"]
  for part, entry in report.flops.items():
    lines.append(f"  {part:<42}{entry['forward'] / size_of:>10.2f}{entry['backward'] / size_of:>10.2f}")
  lines.append(f"  {'the model':<42}{_sum(report.flops) / size_of:>20.2f}")
  lines.append(f"  {'the program, recomputation included':<42}{report.compiled_flops / size_of:>20.2f}")
  if report.uncounted_loops:
    lines.append(
      f"  at least: of {report.uncounted_loops} loops it is not known how often they run, and one turn is counted"
    )
  return lines


def _exchanges(report: Report) -> list[str]:
  unit, size_of = _unit(max(row.bytes for row in report.exchanges), _BYTES)
  timed = report.exchanges[0].seconds is not None
  lines = [
    f"{'exchanges of a device and step':<44}{'count':>10}{unit:>10}" + ("  ms, at least" if timed else "")
  ]
  for row in report.exchanges[:16]:
    name = f"{row.kind} {row.dtype} over {row.axes}"
    seconds = "" if row.seconds is None else f"{1e3 * row.seconds:>14.1f}"
    lines.append(f"  {name:<42}{row.count:>10}{row.bytes / size_of:>10.2f}{seconds}")
  if len(report.exchanges) > 16:
    lines.append(f"  and {len(report.exchanges) - 16} smaller kinds")
  if report.hidden is not None:
    lines.append(
      f"  {report.hidden:.0%} of these bytes have products beside them, as the program is scheduled"
    )
  return lines


def _roofline(found: Roofline) -> list[str]:
  return [
    f"a step takes at least {1e3 * found.step:.0f} ms: products {1e3 * found.compute:.0f}, memory "
    f"{1e3 * found.memory:.0f}, exchanges {1e3 * found.links:.0f} (as if each ran at its peak and hid the others)",
    f"so at most {found.mfu:.0%} of the peak go to the model (MFU)",
  ]
