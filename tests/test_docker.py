"""The Dockerfiles copy files that there are, install extras that there are, and run a command that there is."""

import re
import shlex
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.toy import REPOSITORY

FILES = sorted((REPOSITORY / "docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(path):
  """The instructions of a Dockerfile, in order: (word, the rest)."""
  text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
  lines = [line.strip() for line in text.splitlines()]
  return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def values(path, word):
  return [rest for name, rest in instructions(path) if name == word]


def arguments(path):
  return dict(rest.split("=", 1) for rest in values(path, "ARG"))


def test_there_is_one_for_each_device():
  assert [path.suffix for path in FILES] == [".cpu", ".cuda", ".tpu"]
  extras = [arguments(path)["EXTRAS"].split(",") for path in FILES]
  assert [set(names) - {"remote", "decode"} for names in extras] == [set(), {"cuda"}, {"tpu"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_what_is_copied_is_there_and_not_ignored(path):
  kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
  sources = [source for rest in values(path, "COPY") for source in shlex.split(rest)[:-1]]
  assert {"pyproject.toml", "internvl_jax", "configs"} <= set(sources)
  for source in sources:
    assert (REPOSITORY / source).exists(), source
    assert any(source == name or source.startswith(f"{name}/") for name in kept), source
  # What pyproject.toml reads when a wheel is made.
  assert {PROJECT["readme"], *PROJECT["license-files"]} <= set(sources)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_what_is_installed_is_there(path):
  given = arguments(path)
  assert set(given["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
  python = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", given["BASE"])[1]
  assert python in SpecifierSet(PROJECT["requires-python"])
  (constraints,) = set(re.findall(r"constraints/py\d+\.txt", path.read_text()))
  assert constraints == f"constraints/py{python.replace('.', '')}.txt"
  # JAX asks for a libtpu of its own, which that of plans would contradict.
  assert "libtpu" not in (REPOSITORY / constraints).read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_it_trains_as_a_user_that_is_not_root(path):
  (user,) = values(path, "USER")
  assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
  assert values(path, "ENTRYPOINT") == ['["python", "-m", "internvl_jax.train"]']
  assert f"docker build -f docker/{path.name}" in path.read_text()


def test_they_differ_in_nothing_else():
  """One that is changed alone is a mistake."""

  def steps(path):
    return [(word, rest) for word, rest in instructions(path) if word not in ("ARG", "ENV", "LABEL")]

  first, *others = ([(word, " ".join(rest.split())) for word, rest in steps(path)] for path in FILES)
  assert all(other == first for other in others)
