"""A recording of the reference's code agrees in everything; of twelve planted faults each is found, and named."""

import re

import pytest

from internvl_jax.certify import certificate
from internvl_jax.certify.comparison import compare, first_departure
from internvl_jax.certify.findings import Status
from internvl_jax.certify.ours import open_ours
from tests.certify.recorded import META, RECORDINGS, opened, with_fault
from tests.support.planted import FAULTS
from tests.support.toy import CURVE

TOLERANCE = 1e-4

STAGES = (
  *(
    "token ids",
    "labels",
    "tiles",
    "pixels",
    "vision tower",
    "projector",
    "language model",
    "output embedding",
  ),
  *("logits", "loss", "loss of a micro-batch", "gradients", "packed row", "weight decay", "AdamW update"),
)


def test_the_reference_agrees_in_all_stages(tmp_path):
  """Recorded from internvl_chat's own dataset, model and packed row, with transformers 4.49."""
  recording = opened(RECORDINGS / "reference")
  assert recording.manifest["pipeline"] == "internvl_chat"
  ours = open_ours(str(CURVE / "init"), str(META), recording.manifest["settings"])
  findings = compare(recording, ours, TOLERANCE)
  assert tuple(finding.stage for finding in findings) == STAGES
  assert [finding for finding in findings if finding.status is not Status.AGREES] == []
  assert certificate.verdict(findings).startswith("Agrees; the largest relative difference is ")
  certificate.write(tmp_path, findings, certificate.facts(recording, ours))
  page = (tmp_path / "certificate.html").read_text()
  assert page.count("✓") == len(STAGES) + 1 and "✗</td>" not in page  # One is in the key.
  assert not re.search(r"src=|href=|https?://|url\(", page)  # Nothing is loaded.
  assert (tmp_path / "certificate.md").read_text().count("| ✓ |") == len(STAGES)


def test_transformers_agrees_but_for_what_is_known(hf_ours):
  findings = compare(opened(RECORDINGS / "transformers"), hf_ours, TOLERANCE)
  assert first_departure(findings) is None
  known = {finding.stage: finding.cause for finding in findings if finding.status is Status.KNOWN}
  assert known.keys() == {"pixels", "weight decay"}
  assert "torchvision" in known["pixels"] and "rule of transformers 4.55" in known["weight decay"]
  assert not [finding for finding in findings if finding.status is Status.ABSENT]


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_located(name, hf_ours, tmp_path):
  fault = FAULTS[name]
  recording = opened(with_fault(name, tmp_path / "record"))
  first = first_departure(compare(recording, hf_ours, TOLERANCE))
  assert first is not None
  assert first.stage == fault.stage
  assert re.search(fault.where, first.where)
  assert re.search(fault.cause, first.cause)


def test_twelve_are_planted():
  assert len(FAULTS) == 12
