"""What a comparison finds: a line of the certificate for each stage between a line of data and an update."""

import dataclasses
import enum
import math


class Status(enum.Enum):
  """How a stage compares: it agrees, differs in a way that the docs tell, departs, or was not recorded."""

  AGREES = "agrees"
  KNOWN = "known difference"
  DEPARTS = "departs"
  ABSENT = "not compared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """One stage.

  Attributes:
    stage: its name.
    status: how it compares.
    compared: what was compared.
    difference: the largest relative difference; None where things are equal or not.
    where: where it first departs.
    cause: what is probably the cause, or why nothing was compared.
  """

  stage: str
  status: Status
  compared: str = ""
  difference: float | None = None
  where: str = ""
  cause: str = ""

  @property
  def digits(self) -> str:
    """To how many digits both agree."""
    if self.difference is None:
      return {Status.AGREES: "equal", Status.ABSENT: "-"}.get(self.status, "differs")
    if not math.isfinite(self.difference):
      return "none"
    if self.difference == 0:
      return "equal"
    return f"{max(0.0, -math.log10(self.difference)):.1f} digits"


def absent(stage: str, why: str) -> Finding:
  """The line of a stage that was not compared."""
  return Finding(stage=stage, status=Status.ABSENT, cause=why)
