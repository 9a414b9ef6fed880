"""Large annotation files of several kinds: time to the first batch, and memory, at two sizes.

  python benchmarks/bench_forms.py [--records 1000000] [--kinds parquet,tar] [--folder DIR]

Writes records with a tiny picture each and a question, a tenth as many and all of them, and opens each file in a process of its own
twice: with an empty cache, and with what the first has left there. Time is from the loader's beginning, after imports, to its
first batch of 8 rows of one sample (streams: 2 packed rows); memory is what the process holds beyond its imports, at most, files that
are mapped into it not counted.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_host_memory as memory

REPOSITORY = Path(__file__).parents[1]

sys.path.insert(0, str(REPOSITORY))

TOKENIZER = REPOSITORY / "tests/assets/tokenizer"
ROWS = 8
_PICTURES = 64
_PART = 10_000
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Opening:
  """One start of a loader.

  Attributes:
    kind: of file.
    records: in it.
    start: "cold", or "warm" with what a cold one has left in the cache.
    seconds: to the first batch.
    processor: seconds of the processor, which other programs on the machine do not lengthen.
    megabytes: of memory on top of what was there before, at most.
    size: of the file, in bytes.
  """

  kind: str
  records: int
  start: str
  seconds: float
  processor: float
  megabytes: float
  size: int


# --- Files --------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
  """Some pictures of 8 x 8 pixels, as PNG."""
  import numpy as np
  from PIL import Image

  found, rng = [], np.random.default_rng(0)
  for _ in range(_PICTURES):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    found.append(out.getvalue())
  return found


def texts(number: int) -> list[dict[str, str]]:
  """The conversation of a record."""
  return [
    {"from": "human", "value": f"<image>\nWhat is {number} + 1?"},
    {"from": "gpt", "value": str(number + 1)},
  ]


def write_parquet(path: Path, count: int) -> None:
  """A table with the bytes of pictures, all rows in one group: the worst case for reading by number."""
  import pyarrow
  import pyarrow.parquet

  images = pictures()
  batches = (
    pyarrow.RecordBatch.from_pylist(
      [
        {"id": i, "image": {"bytes": images[i % _PICTURES], "path": f"{i}.png"}, "conversations": texts(i)}
        for i in range(start, min(start + _PART, count))
      ]
    )
    for start in range(0, count, _PART)
  )
  first = next(batches)
  # One call writes one group, of a table that is not copied.
  table = pyarrow.Table.from_batches([first, *batches])
  # Neither packed nor as a dictionary: pictures of a real table are not alike.
  options = {"compression": "none", "use_dictionary": False}
  pyarrow.parquet.write_table(table, path, row_group_size=max(count, 1), **options)


def write_tar(path: Path, count: int) -> None:
  """A tar as WebDataset's, pictures beside their JSON."""
  images = pictures()
  with path.open("wb", buffering=1 << 22) as out:
    for i in range(count):
      record = json.dumps({"id": i, "conversations": texts(i)}).encode()
      for name, content in ((f"{i:09}.json", record), (f"{i:09}.png", images[i % _PICTURES])):
        out.write(_header(name, len(content)))
        out.write(content + b"\0" * (-len(content) % _BLOCK))
    out.write(b"\0" * 2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
  fields = (
    name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
  )
  rest = b"0" + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
  total = sum(fields) + sum(rest) + 8 * ord(" ")
  return fields + b"%06o\0 " % total + rest


def write_array(path: Path, count: int) -> None:
  """A JSON array of records without pictures, which would be files."""
  with path.open("w") as out:
    for i in range(count):
      text = json.dumps({"id": i, "question": f"What is {i} + 1?", "answer": str(i + 1)})
      out.write(("[" if i == 0 else ",\n") + text)
    out.write("]")


# kind -> what writes its file, its suffix, the key of the meta file.
KINDS: dict[str, tuple[Callable[[Path, int], None], str, str]] = {
  "parquet": (write_parquet, ".parquet", "annotation"),
  "tar": (write_tar, ".tar", "annotation"),
  "array": (write_array, ".json", "annotation"),
  "stream of parquet": (write_parquet, ".parquet", "stream"),
  "stream of a tar": (write_tar, ".tar", "stream"),
}


# --- Measuring ----------------------------------------------------------------------------------------------


def first_batch(meta: str, cache: str, streamed: bool) -> dict[str, float]:
  """Opens the data and makes a batch: seconds, those of the processor, and MB of memory."""
  import transformers

  from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
  from internvl_jax.data.load.loader import TrainLoader
  from internvl_jax.data.sample.tokenize import ChatTokenizer

  tokenizer = ChatTokenizer(transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER), "internvl2_5")
  packed: dict[str, Any] = {"use_packed_ds": streamed, "max_packed_tokens": 512, "num_images_expected": 16}
  data = DataTrainingArguments(
    meta_path=meta, conv_style="internvl2_5", force_image_size=16, max_seq_length=256, **packed
  )
  training = TrainingArguments(
    per_device_train_batch_size=2 if streamed else ROWS, max_steps=4, disable_tqdm=True
  )
  found: list[Any] = []
  start, used = time.perf_counter(), time.process_time()
  with memory.measured("first batch", 0.0, found):
    loader = TrainLoader(data, training, LoaderConfig(cache_dir=cache), tokenizer, tokens_per_tile=4)
    batch = next(loader)
    seconds, used = time.perf_counter() - start, time.process_time() - used
  assert batch.input_ids.shape[1] == training.per_device_train_batch_size
  loader.close()
  return {"seconds": seconds, "processor": used, "megabytes": found[0].own * memory.MIB / 1e6}


def measure(kind: str, folder: Path, records: int) -> Iterator[Opening]:
  """Writes a file, and opens it cold and warm."""
  write, suffix, key = KINDS[kind]
  path, cache = folder / f"{records}{suffix}", folder / f"cache-{kind.replace(' ', '-')}-{records}"
  if not path.exists():
    write(path, records)
  meta = folder / "meta.json"
  meta.write_text(json.dumps({"large": {"root": "", key: str(path)}}))
  for start in ("cold", "warm"):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
      found = pool.apply(first_batch, (str(meta), str(cache), key == "stream"))
    yield Opening(kind, records, start, **found, size=path.stat().st_size)


def main(argv: list[str]) -> list[Opening]:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--records", type=int, default=1_000_000)
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument(
    "--folder", type=Path, help="where files are written, and kept; default: a temporary one"
  )
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.folder or Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    print(
      f"{'kind':<20}{'records':>10}{'MB':>8}{'start':>7}{'seconds':>9}{'processor':>11}{'memory, MB':>12}"
    )
    for kind in args.kinds.split(","):
      for records in (max(args.records // 10, 1), args.records):
        for one in measure(kind, folder, records):
          found.append(one)
          print(
            f"{one.kind:<20}{one.records:>10}{one.size / 1e6:>8.0f}{one.start:>7}{one.seconds:>9.2f}"
            f"{one.processor:>11.2f}{one.megabytes:>12.0f}",
            flush=True,
          )
  return found


if __name__ == "__main__":
  main(sys.argv[1:])
