"""Four real processes of which one differs: all end, with a line that names what differs."""

import json

import pytest

from tests.parallel.test_agreement import ended
from tests.support.hosts import Job, make_world

ODD = 2

# Of large files parts are compared when the data are opened; these are large here.
_SAMPLED = """
from internvl_jax import consistency
consistency.WHOLE_BYTES, consistency.SAMPLES, consistency.SAMPLE_BYTES = 1 << 10, 2, 16
"""


def rate(world):
  return ("training.learning_rate=1e-5",)


def seed(world):
  return ("training.seed=7",)


def answers(world):
  path = world / "data.jsonl"
  path.write_text(path.read_text().replace('"circle', '"square', 1))
  return ()


def tokenizer(world):
  path = world / "model/tokenizer.json"
  content = json.loads(path.read_text())
  vocabulary = content["model"]["vocab"]
  first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  path.write_text(json.dumps(content))
  return ()


def weights(world):
  """One byte in the middle of a file, where no sample is taken."""
  path = world / "model/model.safetensors"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return ()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("differ", "named"),
  [
    (rate, "training.learning_rate is 0.001 on "),
    (seed, "training.seed is 42 on "),
    (answers, "the content of data.jsonl (dataset 'shapes') is "),
    (tokenizer, "the tokenizer is "),
    (weights, "have read different weights: the checksum of "),
  ],
)
def test_all_of_four_end_with_a_line_that_names_it(tmp_path, differ, named):
  worlds = [make_world(tmp_path / f"host{i}") for i in range(4)]
  recipe = worlds[0] / "recipe.py"
  recipe.write_text(recipe.read_text() + _SAMPLED)
  only = {ODD: differ(worlds[ODD])}
  here = ("data.meta_path=meta.json", "model.model_name_or_path=model")
  copies = ("mesh.data=4", "mesh.fsdp=1")
  job = Job(worlds[0], *here, *copies, processes=4, only=only, folders=tuple(worlds))
  errors = ended(job)
  assert len(errors[0]) == 1 and errors == [errors[0]] * 4
  assert named in errors[0][0] and f"(process {ODD})" in errors[0][0]
