"""The tiny model that servers are tried with is written in both layouts, with questions that they can be asked."""

import json

from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from tests.support.scripts import load
from tests.support.toy import REPOSITORY


def test_the_model_and_its_questions_are_written(tmp_path):
  toy, ask_server = (load(REPOSITORY / f"scripts/{name}.py") for name in ("server_toy", "ask_server"))
  folder = tmp_path / "toy"
  toy.main([str(folder)])
  assert [open_source(folder / name).layout for name in ("internvl", "hf")] == [INTERNVL, HF]
  questions = ask_server.read_questions(folder / "questions.jsonl")
  assert len(questions) == len(toy.QUESTIONS)
  for question in questions:
    pictures = [(folder / name).read_bytes() for name in question["pictures"]]
    content = ask_server.content_of(question["question"], pictures)
    assert sum(part["type"] == "image_url" for part in content) == len(pictures)
  lengths = [len(question["answer_ids"]) for question in questions]
  assert max(lengths) == toy.MAX_NEW_TOKENS and min(lengths) < toy.MAX_NEW_TOKENS  # One ends by itself.
  heads = json.loads((folder / "hf/config.json").read_text())["text_config"]
  assert heads["hidden_size"] // heads["num_attention_heads"] == 64
