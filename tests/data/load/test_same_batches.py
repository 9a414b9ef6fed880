"""One small dataset, in every kind of file and every form of conversation: the same batches, to the bit."""

import hashlib
import json

import numpy as np
import pytest

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.loader import TrainLoader
from tests.support.data_kinds import lines_of, records_of, write_kinds, write_tables
from tests.support.data_toys import arguments, write_dataset

COUNT = 11
PACKED = {"use_packed_ds": True, "max_packed_tokens": 600, "num_images_expected": 12, "strict_mode": False}


def digest_of(folder, entry, tokenizer, **data):
  """SHA-256 of all bytes of three batches."""
  (folder / "meta.json").write_text(json.dumps({"toy": entry}))
  loader = TrainLoader(
    arguments(folder / "meta.json", **data),
    TrainingArguments(per_device_train_batch_size=2, max_steps=3, disable_tqdm=True),
    LoaderConfig(cache_dir=str(folder / "cache")),
    tokenizer,
    tokens_per_tile=4,
  )
  digest, tiles = hashlib.sha256(), 0
  for batch in loader:
    tiles += int(batch.tiles.any(axis=(-1, -2, -3)).sum())
    for array in batch:
      digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
  assert tiles
  line = loader.dataset_lines()[0]
  loader.close()
  return digest.hexdigest(), line


def messages_of(record, content):
  roles = {"human": "user", "gpt": "assistant"}
  return [
    {"role": roles[turn["from"]], "content": content(turn["value"])} for turn in record["conversations"]
  ]


def parts_of(text, **image):
  """A text with `<image>` in front of it as parts."""
  before, mark, after = text.partition("<image>\n")
  assert not before or not mark
  found = [{"type": "image", **image}] if mark else []
  return [*found, {"type": "text", "text": after if mark else before}]


def in_form(record, form):
  """A record of toy.jsonl in another form."""
  rest = {key: value for key, value in record.items() if key not in ("conversations", "image")}
  image = {"image": record["image"]} if "image" in record else {}
  question, answer = (turn["value"] for turn in record["conversations"])
  match form:
    case "llava":
      image = {key: [path] for key, path in image.items()}
      return {**rest, **image, "conversations": record["conversations"]}
    case "images":
      return {**rest, "images": list(image.values()), "conversations": record["conversations"]}
    case "messages":
      return {**rest, **image, "messages": messages_of(record, str)}
    case "parts":
      return {**rest, "images": list(image.values()), "messages": messages_of(record, parts_of)}
    case "qwen":
      return {**rest, "messages": messages_of(record, lambda text: parts_of(text, **image))}
    case "sharegpt":
      return {**rest, **image, "conversations": messages_of(record, str)}
    case "swift":
      return {**rest, "images": list(image.values()), "query": question, "response": answer, "history": []}
    case "question":
      return {**rest, **image, "question": question.removeprefix("<image>\n"), "answer": answer}
    case "prompt":
      return {**rest, **image, "prompt": question, "completion": answer}
    case "prompt_messages":
      asked, answered = messages_of(record, str)
      return {**rest, **image, "prompt": [asked], "completion": [answered]}
  raise AssertionError(form)


FORMS = {
  "llava": "'conversations' of 'from'",
  "images": "'conversations' of 'from'",
  "messages": "'messages' of",
  "parts": "'messages' of",
  "qwen": "'messages' of",
  "sharegpt": "'conversations' with roles",
  "swift": "'query' and",
  "question": "'question' and",
  "prompt": "'prompt' and",
  "prompt_messages": "'prompt' and",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  found = tmp_path_factory.mktemp("same")
  write_dataset(found, COUNT)
  return found


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
  entry = {"root": "", "annotation": "toy.jsonl"}
  return {
    packed: digest_of(folder, entry, tokenizer, **(PACKED if packed else {}))[0] for packed in (True, False)
  }


def test_every_kind_of_file_makes_the_same_batches(folder, tokenizer, expected):
  assert expected[True] != expected[False]
  for name, entry in write_kinds(folder).items():
    for packed in (True, False):
      found, _ = digest_of(folder, entry, tokenizer, **(PACKED if packed else {}))
      assert found == expected[packed], f"{name}, packed: {packed}"


def test_tables_make_the_same_batches(folder, tokenizer, expected):
  pytest.importorskip("datasets")
  for name, entry in write_tables(folder).items():
    for packed in (True, False):
      found, _ = digest_of(folder, entry, tokenizer, **(PACKED if packed else {}))
      assert found == expected[packed], f"{name}, packed: {packed}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_conversation_makes_the_same_batches(folder, tokenizer, expected, form):
  records = [in_form(record, form) for record in records_of(folder)]
  (folder / f"{form}.jsonl").write_bytes(lines_of(records))
  for packed in (True, False):
    found, line = digest_of(
      folder, {"root": "", "annotation": f"{form}.jsonl"}, tokenizer, **(PACKED if packed else {})
    )
    assert found == expected[packed]
    assert f"{form}.jsonl (jsonl, {FORMS[form]}" in line


def test_forms_in_tables_make_the_same_batches(folder, tokenizer, expected):
  """Structs have all fields in every row, null where a record has none."""
  pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  for form in ("qwen", "swift", "parts"):
    table = pyarrow.Table.from_pylist([in_form(record, form) for record in records_of(folder)])
    parquet.write_table(table, folder / f"{form}.parquet")
    entry = {"root": "", "annotation": f"{form}.parquet"}
    assert digest_of(folder, entry, tokenizer)[0] == expected[False], form
