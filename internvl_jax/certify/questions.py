"""Questions of the mixture with our greedy answers, for whoever asks a server the same.

A line of questions.jsonl: {"id", "question", "pictures": [path], "answer", "answer_ids",
"prompt_tokens"}. Pictures come before the question, each with a line break behind it, as chat templates write them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl_jax.certify.ours import HOW, Ours
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER
from internvl_jax.data.source.files import absolute
from internvl_jax.data.source.media import join
from internvl_jax.data.source.meta import DatasetSpec, read_meta
from internvl_jax.data.source.records import first_read, open_records
from internvl_jax.data.where import Where
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.hf.generation import read_generation


def write(path: Path, ours: Ours, *, count: int, max_new_tokens: int) -> int:
  """Writes questions of the first lines that are fit for it; how many there are."""
  generation = read_generation(ours.source.folder, ours.source.raw, ours.source.config.text.vocab_size)
  decoder = GreedyDecoder(
    model=ours.source.model,
    how=HOW,
    normalize_type=ours.data.normalize_type,
    image_token_id=ours.tokenizer.image_token_id,
    stop_ids=tuple(dict.fromkeys((ours.tokenizer.stop_token_id, *generation.stop_ids))),
    max_new_tokens=max_new_tokens,
    batch_size=1,
  )
  lines = []
  for name, question, pictures, where in _asked(ours, count):
    record = {
      "image": pictures,
      "conversations": [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + question},
        {"from": "gpt", "value": "?"},
      ],
    }
    if not pictures:
      del record["image"]
    sample = ours.make(record, where, DatasetSpec(name=name, root="", annotation=where.file))
    prompt = Prompt(prompt_ids(sample), sample.tiles)
    (answer,) = decoder(ours.params, [prompt])
    entry = {
      "id": name,
      "question": question,
      "pictures": pictures,
      "answer": ours.tokenizer.decode_answer(answer).strip(),
      "answer_ids": answer.tolist(),
      "prompt_tokens": len(prompt.input_ids),
    }
    lines.append(json.dumps(entry, ensure_ascii=False))
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return len(lines)


def _asked(ours: Ours, count: int) -> Iterator[tuple[str, str, list[str], Where]]:
  """Up to `count` questions, as many of each dataset: an id, the text, the pictures' paths and the line."""
  specs = read_meta(ours.meta)
  for spec in specs:
    records, left = open_records(spec.annotation, spec.name, key=spec.key), -(-count // len(specs))
    lines = CONVERSATION_LINES.recognized(first_read(records))
    for number in range(len(records)):
      if not left:
        break
      where = records.where(number)
      found = _question(lines.plain(records.read(number), where), spec, where)
      if found is not None:
        left -= 1
        yield f"{spec.name}-{number + 1}", *found, where


def _question(record: Any, spec: DatasetSpec, where: Where) -> tuple[str, list[str]] | None:
  """The first question of a line and its pictures; None where a server cannot be asked it in the same words."""
  turns, images = record.get("conversations"), record.get("image") or []
  images = images if isinstance(images, list) else [images]
  if not turns or turns[0].get("from") != "human" or "video" in record:
    return None
  text = turns[0]["value"]
  marks = f"{IMAGE_PLACEHOLDER}\n" * len(images)
  if len(images) == 1 and IMAGE_PLACEHOLDER not in text:
    text = marks + text
  rest = text.removeprefix(marks)
  if not text.startswith(marks) or IMAGE_PLACEHOLDER in rest:
    return None
  paths = [join(spec.root, image, where) for image in images]
  # Pictures that are bytes of the data or in a zip have no path to send.
  named = [absolute(path) for path in paths if isinstance(path, str)]
  return (rest, named) if len(named) == len(paths) else None
