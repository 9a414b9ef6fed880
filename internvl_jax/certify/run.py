"""Compares a recording with this program, and prints and writes what it finds."""

import dataclasses
from pathlib import Path

from internvl_jax.certify import certificate, questions
from internvl_jax.certify.comparison import compare, first_departure
from internvl_jax.certify.ours import open_ours
from internvl_jax.certify.recording import open_recording


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked of a comparison.

  Attributes:
    record: folder of the recording.
    model: the checkpoint; see `open_source`.
    meta: meta file of the mixture.
    output: folder of the certificate.
    tolerance: largest relative difference of activations, logits and losses.
    questions: how many questions are answered for servers.
    max_new_tokens: longest answer to them.
  """

  record: str
  model: str
  meta: str
  output: str = "certificate"
  tolerance: float = 1e-4
  questions: int = 8
  max_new_tokens: int = 32


def certify(request: Request) -> bool:
  """Compares, prints a table, and writes certificate.md, certificate.html and questions.jsonl; whether nothing departs.

  Raises:
    UserError: the recording, the checkpoint or the mixture cannot be used, or are not of each other.
  """
  recording = open_recording(request.record)
  ours = open_ours(request.model, request.meta, recording.manifest["settings"])
  findings = compare(recording, ours, request.tolerance)
  folder = Path(request.output)
  certificate.write(folder, findings, certificate.facts(recording, ours))
  print(certificate.table(findings))
  print(certificate.verdict(findings))
  if request.questions:
    path = folder / "questions.jsonl"
    count = questions.write(path, ours, count=request.questions, max_new_tokens=request.max_new_tokens)
    print(f"{path}: {count} questions with our answers")
  return first_departure(findings) is None
