"""The command `generate`: what it refuses before a model is opened, and a file of questions."""

import json
import os

import pytest

from tests.support import forked
from tests.support.toy import CURVE


def generate(folder, *arguments):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  command = ["-m", "internvl_jax.generate", *map(str, arguments)]
  return forked.run(command, environment=environment, folder=folder)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "one of --question, --chat, --inputs is needed, there is none"),
    (("--question=?", "--chat"), "is needed, there is --question and --chat"),
    (("--inputs=q.jsonl",), "--inputs and --output go together"),
    (("--inputs=q.jsonl", "--output=a.jsonl"), "--inputs=q.jsonl: no such file"),
    (("--question=?", "--top_p=0.5"), "top_k and top_p have no effect at temperature=0"),
    (("--question=?", "--image=."), "--image=.: is a folder; name an image in it"),
  ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, message):
  done = generate(tmp_path, "--model=nowhere", *arguments)
  assert done.returncode == 1 and message in done.stderr and not done.stdout


def test_a_file_of_questions(tmp_path):
  image = next((CURVE / "data/images").iterdir()).name
  lines = [{"question": "What?", "image": image}, {"question": "What?", "image": "nowhere.png"}]
  (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  inputs, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
  options = ("--max_new_tokens=2", "--batch_size=2", f"--root={CURVE / 'data/images'}")
  done = generate(tmp_path, f"--model={CURVE / 'init'}", f"--inputs={inputs}", f"--output={output}", *options)
  assert done.returncode == 0 and f"1 lines could not be asked; {output} says why" in done.stderr, done.stderr
  found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
  assert found[0]["answer"] and "nowhere.png" in found[1]["error"]
