"""Scripts run where they can change nothing, in namespaces and in restricted bash."""

import socket
from pathlib import Path

import pytest

from internvl_jax.errors import UserError
from internvl_jax.from_script import sandbox
from internvl_jax.from_script.launches import read_script
from internvl_jax.from_script.sandbox import Request, run
from tests.support.launch_scripts import LORA, script_of


@pytest.fixture(params=["namespaces", "restricted"], autouse=True)
def way(request, tmp_path, monkeypatch):
  if request.param == "restricted":
    monkeypatch.setattr(sandbox, "has_namespaces", lambda: False)
  elif not sandbox.has_namespaces():
    pytest.skip("no namespaces here")
  monkeypatch.chdir(tmp_path)
  return request.param


HARM = """
rm -rf {canary}; rm -rf "$HOME/canary"; echo gone > {canary}; : > {canary}
cp /etc/passwd {canary}; mv {canary} elsewhere; ln -sf x {canary}; touch {folder}/new; mkdir -p {folder}/new2
echo x | tee {folder}/new3; sed -i s/there/gone/ {canary}; find {folder} -delete
/bin/rm -f {canary}; /usr/bin/env rm -f {canary}; command -p rm -f {canary}; bash -c 'rm -f {canary}; echo > {canary}'
bash +r -c 'echo > {canary}'; cd {folder} && rm -f canary
exec > {folder}/log; echo hello
torchrun --x
"""


def test_a_script_changes_nothing(tmp_path):
  canary = tmp_path / "canary"
  canary.write_text("there")
  Path("mine.sh").write_text(HARM.format(canary=canary, folder=tmp_path))
  run(Request(script="mine.sh", environ={"HOME": str(tmp_path)}))
  assert canary.read_text() == "there"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "mine.sh"]


def test_no_program_is_executed(tmp_path):
  program = tmp_path / "torchrun"
  program.write_text(f"#!/bin/sh\necho ran > {tmp_path}/ran\n")
  program.chmod(0o755)
  Path("mine.sh").write_text(
    f'PATH={tmp_path}:$PATH\n./torchrun\n{program}\npython3 -c \'open("{tmp_path}/ran", "w")\'\ncurl x\n'
  )
  outcome = run(Request(script="mine.sh"))
  assert not (tmp_path / "ran").exists()
  assert [(call.program, call.found, call.line) for call in outcome.calls if call.program != "torchrun"] == [
    ("python3", True, 4),
    ("curl", False, 5),
  ]


def test_a_published_script_is_read(way):
  Path("mine.sh").write_text(script_of(LORA))
  (launch,) = read_script("mine.sh").launches
  assert (launch.launcher, launch.devices, launch.folder) == ("torchrun", 2, "")
  assert launch.words[launch.words.index("--output_dir") + 1].startswith("work_dirs/")
  Path("mine.sh").write_text(script_of(LORA).replace("OUTPUT_DIR=", "OUTPUT_DIR=$(pwd)/"))
  (again,) = read_script("mine.sh").launches
  assert again.words == launch.words


def test_a_script_that_does_not_end_is_stopped(monkeypatch):
  monkeypatch.setattr(sandbox, "SECONDS", 0.5)
  Path("mine.sh").write_text("while true; do sleep 1; done\n")
  with pytest.raises(UserError, match=r"mine.sh: did not end in 0.5 s"):
    read_script("mine.sh")


def test_the_environment_is_not_the_users(monkeypatch):
  monkeypatch.setenv("SECRET", "hidden")
  Path("mine.sh").write_text('echo "secret: ${SECRET:-none}"\n')
  assert "secret: none" in run(Request(script="mine.sh")).told
  assert "secret: mine" in run(Request(script="mine.sh", environ={"SECRET": "mine"})).told


def test_there_is_no_network(way):
  if way == "restricted":
    pytest.skip("restricted bash may read from /dev/tcp; no program that does is there")
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    Path("mine.sh").write_text(f"(: < /dev/tcp/127.0.0.1/{port}) && echo reached\n")
    assert "reached" not in run(Request(script="mine.sh")).told


def test_restricted_bash_says_what_it_does_not_do(way):
  if way == "namespaces":
    pytest.skip("nothing is refused there")
  Path("mine.sh").write_text(f"cd ..\necho > x\n{script_of(LORA)}")
  with pytest.raises(UserError) as error:
    read_script("mine.sh")
  first, second = str(error.value).splitlines()
  assert first.startswith("mine.sh, line 1: cd: restricted (this machine has no way")
  assert second.startswith("mine.sh, line 2: x: restricted: cannot redirect output")
