"""The price of training: hours of devices at an assumed utilization, which is printed with the result."""

import dataclasses

from internvl_jax.aot.report import Report
from internvl_jax.aot.target import Target
from internvl_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
  """The price of tokens; in the currency of `hour`.

  Attributes:
    hour: of one device.
    utilisation: share of the peak that goes to the model (MFU).
    supervised: share of the rows' tokens that the loss counts; None: not known.
    seconds: of a step, at that utilisation.
    million: of a million tokens of rows, images', prompts' and padding included.
    million_supervised: of a million tokens that the loss counts.
    bound: the utilisation that no run can exceed, by the roofline.
  """

  hour: float
  utilisation: float
  supervised: float | None
  seconds: float
  million: float
  million_supervised: float | None
  bound: float

  def __str__(self) -> str:
    head = (
      f"at {self.hour:g} an hour of a device and a utilisation of {self.utilisation:.0%} (MFU; supposed, --utilisation), "
      f"a step takes {self.seconds:.2f} s and a million tokens of rows, images' and prompts' included, cost {self.million:.3g}"
    )
    if self.million_supervised is None:
      tail = "; a million supervised ones cost that over their share of the rows (--supervised)"
    else:
      tail = f"; a million supervised ones, {self.supervised:.0%} of them (--supervised), {self.million_supervised:.3g}"
    if self.utilisation > self.bound:
      tail += f"; but the utilisation cannot be more than {self.bound:.0%}"
    return head + tail


def check_price(target: Target) -> None:
  """Refuses devices that have no data sheet, before anything is compiled for them.

  Raises:
    UserError: what they can do is not known.
  """
  if target.chip is None:
    raise UserError(
      f"--cost: what {target.name} can do is not known; plan for a kind by its name, e.g. v5e:4x4 or h100:8"
    )


def price(
  report: Report, target: Target, *, hour: float, utilisation: float, supervised: float | None
) -> Price:
  """The price of a million tokens.

  Args:
    report: of the step.
    target: the devices.
    hour: price of one device's hour.
    utilisation, supervised: see `Price`.

  Raises:
    UserError: what the devices can do is not known.
  """
  check_price(target)
  assert target.chip and report.roofline
  batch = report.batch
  flops = sum(value for entry in report.flops.values() for value in entry.values())
  seconds = flops / (target.chip.flops * utilisation)
  tokens = batch["accumulation"] * batch["shards"] * batch["rows"] * batch["tokens"]
  million = hour * report.chips * seconds / 3600 / tokens * 1e6
  return Price(
    hour=hour,
    utilisation=utilisation,
    supervised=supervised,
    seconds=seconds,
    million=million,
    million_supervised=None if supervised is None else million / supervised,
    bound=report.roofline.mfu,
  )
