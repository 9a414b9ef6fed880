"""Benchmarks of others ask our models by adapters: what they give them becomes questions, and answers come back in order.

The benchmarks' own packages are stood in for, by as much of them as the adapters use.
"""

import dataclasses
import importlib
import sys
import tomllib
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

import internvl_jax
from internvl_jax.errors import UserError
from tests.support.toy import REPOSITORY


class FakeModel:
  """Answers a question by its text, and keeps what it was asked."""

  def __init__(self, *opened, **settings):
    self.opened, self.settings = opened, settings
    self.asked = []

  def answers(self, questions, *, batch_size, **settings):
    self.asked += [(question, {"batch_size": batch_size, **settings}) for question in questions]
    return [f"answer to {question.text}" for question in questions]

  def answer(self, question, **settings):
    self.asked.append((question, settings))
    return f"answer to {question.text}"


def module(name, **entries):
  made: Any = types.ModuleType(name)
  made.__dict__.update(entries)
  return made


@pytest.fixture
def install(monkeypatch):
  """Puts modules into the place of a package, and imports an adapter anew."""
  monkeypatch.setattr(internvl_jax, "open_model", FakeModel)

  def install(adapter, **modules):
    for name, entries in modules.items():
      name = name.replace("__", ".")
      monkeypatch.setitem(sys.modules, name, module(name, **entries))
      parent, _, child = name.rpartition(".")
      if parent:
        setattr(sys.modules[parent], child, sys.modules[name])
    name = f"internvl_jax.integrations.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return loaded

  return install


# --- lmms-eval ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelManifest:
  model_id: str
  simple_class_path: str | None = None
  chat_class_path: str | None = None


class Cache:
  def __init__(self):
    self.kept = []

  def add_partial(self, *entry):
    self.kept.append(entry)


class Lmms:
  is_simple = True

  def __init__(self):
    self.cache_hook, self.task_dict = Cache(), {}


@pytest.fixture
def lmms_eval(install):
  return install(
    "lmms_eval",
    lmms_eval={},
    lmms_eval__api={},
    lmms_eval__api__model={"lmms": Lmms},
    lmms_eval__models={},
    lmms_eval__models__registry_v2={"ModelManifest": ModelManifest},
  )


def text(value):
  return {"type": "text", "text": value}


def image(url):
  return {"type": "image", "url": url}


PICTURES = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in (0, 9)]
DOCS: list[Any] = [
  [{"role": "user", "content": [image(PICTURES[0]), text("What?")]}],
  [{"role": "user", "content": [image(PICTURES[0]), image(PICTURES[1]), text("Which?")]}],
  [{"role": "user", "content": [text("This "), image(PICTURES[0]), text("or "), image(PICTURES[1])]}],
  [
    {"role": "system", "content": [text("Be brief.")]},
    {"role": "user", "content": [{"type": "video", "url": "a.mp4"}, text("Who?")]},
    {"role": "assistant", "content": [text("A dog.")]},
    {"role": "user", "content": [text("Why?")]},
  ],
]


def request(number, **kwargs):
  return types.SimpleNamespace(args=("context", lambda doc: doc, kwargs, number, "task", "test"))


def opened(lmms_eval, **arguments):
  model = lmms_eval.InternVLJax("DIR", **arguments)
  model.task_dict = {"task": {"test": DOCS}}
  return model


def test_lmms_eval_finds_the_model(lmms_eval):
  points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
  (place,) = points["lmms_eval.models"].values()
  assert place == f"{lmms_eval.__name__}:MANIFEST"
  assert lmms_eval.MANIFEST.model_id == "internvl_jax"
  path, _, name = lmms_eval.MANIFEST.chat_class_path.rpartition(".")
  assert path == lmms_eval.__name__ and issubclass(getattr(lmms_eval, name), Lmms)
  assert not getattr(lmms_eval, name).is_simple  # Else lmms-eval refuses it as a model of messages.


def test_messages_become_questions(lmms_eval):
  model = opened(lmms_eval, batch_size="2", bf16=False, device="cuda:0", frames=3)
  answers = model.generate_until([request(number, max_new_tokens=16) for number in range(4)])
  assert answers == [
    f"answer to {what}" for what in ("What?", "Which?", "This <image>\nor <image>\n", "Why?")
  ]
  assert model.model.opened == ("DIR",) and model.model.settings == {"bf16": False, "devices": 1}
  questions = [question for question, _ in model.model.asked]
  assert [list(question.images) for question in questions] == [PICTURES[:1], PICTURES, PICTURES, []]
  assert all(
    settings == {"batch_size": 2, "max_new_tokens": 16, "frames": 3} for _, settings in model.model.asked
  )
  (first, said), last = questions[3].history[0], questions[3]
  assert (first.text, list(first.videos), said, last.system) == ("Who?", ["a.mp4"], "A dog.", "Be brief.")
  assert model.cache_hook.kept[0] == (
    "generate_until",
    ("context", {"max_new_tokens": 16}),
    "answer to What?",
  )


def test_tasks_that_sample_are_asked_apart(lmms_eval):
  model = opened(lmms_eval)
  greedy = {"max_new_tokens": 8, "temperature": 0, "top_p": 0.5, "do_sample": False}
  drawn = {"temperature": 0.7, "top_p": 0.9, "do_sample": True}
  answers = model.generate_until([request(0, **greedy), request(1, **drawn), request(0, **greedy)])
  assert answers == ["answer to What?", "answer to Which?", "answer to What?"]
  settings = [kept for _, kept in model.model.asked]
  assert settings[0] == settings[1] == {"batch_size": 1, "max_new_tokens": 8}
  assert settings[2] == {"batch_size": 1, "max_new_tokens": 1024, "temperature": 0.7, "top_p": 0.9}


def test_what_lmms_eval_cannot_have_is_said(lmms_eval):
  with pytest.raises(UserError, match="the model internvl_jax has no max_pixels"):
    opened(lmms_eval, max_pixels=3)
  with pytest.raises(NotImplementedError, match="loglikelihood"):
    opened(lmms_eval).loglikelihood([])


# --- VLMEvalKit ---------------------------------------------------------------------------------------------


class InternVLChat:
  """The kit's: of its methods those that the adapter calls."""

  def set_max_num(self, dataset):
    self.total_max_num, self.max_num = 64, 24 if dataset == "OCRBench" else 6


def reorganize_prompt(message, image_num, dataset=None):
  texts = "\n".join(part["value"] for part in message if part["type"] == "text")
  return "<image>\n" * image_num + texts


@pytest.fixture
def vlmevalkit(install):
  utils = {
    "reorganize_prompt": reorganize_prompt,
    "build_video_prompt": lambda prompt, dataset: f"{prompt} (video)",
    "mpo_post_processing": lambda answer, dataset: f"{answer} of {dataset}",
  }
  return install(
    "vlmevalkit",
    vlmeval={},
    vlmeval__dataset={"DATASET_MODALITY": lambda name: "VIDEO" if name == "Video-MME" else "IMAGE"},
    vlmeval__vlm={},
    vlmeval__vlm__internvl={},
    vlmeval__vlm__internvl__internvl_chat={"InternVLChat": InternVLChat},
    vlmeval__vlm__internvl__utils=utils,
  )


@pytest.mark.parametrize(
  ("dataset", "pictures", "tiles", "answer"),
  [
    (None, 1, 6, "answer to <image>\nWhat?"),
    ("OCRBench", 1, 24, "answer to <image>\nWhat? of OCRBench"),
    ("OCRBench", 4, 16, "answer to <image>\n<image>\n<image>\n<image>\nWhat? of OCRBench"),
    ("Video-MME", 2, 6, "answer to <image>\n<image>\nWhat? (video)"),
    ("MMBench", 0, None, "answer to What?"),
  ],
)
def test_vlmevalkit_asks_with_its_own_prompts_and_tiles(vlmevalkit, dataset, pictures, tiles, answer):
  model = vlmevalkit.InternVLJax("DIR", use_mpo_prompt=True, max_new_tokens=7)
  message = [{"type": "image", "value": f"{number}.png"} for number in range(pictures)]
  assert model.generate_inner([*message, {"type": "text", "value": "What?"}], dataset) == answer
  ((question, settings),) = model.model.asked
  assert list(question.images) == [part["value"] for part in message]
  assert settings == {"max_new_tokens": 7} | ({} if tiles is None else {"max_tiles": tiles})


def test_the_first_picture_of_mmmu_is_doubled(vlmevalkit, tmp_path):
  PICTURES[1].save(tmp_path / "a.png")
  model = vlmevalkit.InternVLJax("DIR")
  message = [{"type": "image", "value": str(tmp_path / "a.png")}] * 2
  model.generate_inner([*message, {"type": "text", "value": "What?"}], "MMMU_DEV_VAL")
  first, second = model.model.asked[0][0].images
  assert first.size == (8, 8) and second == str(tmp_path / "a.png")


def test_the_kits_program_finds_the_model(vlmevalkit, tmp_path, monkeypatch):
  program = tmp_path / "run.py"
  program.write_text("import sys, vlmeval.vlm\nsys.found = (vlmeval.vlm.InternVLJax, sys.argv)")
  monkeypatch.setattr(sys, "argv", [])
  monkeypatch.setattr(sys, "found", None, raising=False)
  vlmevalkit.main([str(program), "--config", "c.json"])
  assert sys.found == (vlmevalkit.InternVLJax, [str(program), "--config", "c.json"])  # pyright: ignore[reportAttributeAccessIssue]
