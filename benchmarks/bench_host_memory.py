"""Memory of the host: of a mixture of millions of lines, and of a large checkpoint read by one host of a pod.

  python benchmarks/bench_host_memory.py mixture [--lines 10000000] [--datasets 10]
  python benchmarks/bench_host_memory.py checkpoint [--size 2.5-78b] [--topology v5e:8x8] [--parameters REGEX]

Prints for each stage the peak of its own memory (anonymous: neither mapped from files nor there before), what arithmetic
expects of it, the peak of all resident memory, and what of it is mapped from files at the end.

The lines' sizes are drawn, not measured: neither images nor text are read. The rows of an epoch are not counted, which takes
minutes and holds no more than a look-ahead. The checkpoint's files are sparse, with the names and shapes of the published
model, and all zeros; its devices are described and not there (this needs libtpu): what would go to their memory is dropped.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import pickle
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]

sys.path.insert(0, str(REPOSITORY))

MIB = 1 << 20

_LINE = b'{"id": 0, "image": "a.jpg"}\n'


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage held.

  Attributes:
    name: of the stage.
    before: MiB of anonymous memory before it: interpreter, imports, and the stages before.
    own: MiB of anonymous memory on top of it, at most.
    expected: the same by arithmetic.
    resident: MiB of resident memory at most, files that are mapped included.
    mapped: MiB of files mapped by it at the end: the system takes them back where it needs the room.
    seconds: how long it took.
  """

  name: str
  before: float
  own: float
  expected: float
  resident: float
  mapped: float
  seconds: float


def _status(name: str) -> float:
  """A line of this process's status, in MiB."""
  found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
  return int(found[1]) / 1024 if found else 0.0


@contextlib.contextmanager
def measured(name: str, expected: float, found: list[Stage]) -> Iterator[None]:
  """Measures the body as a stage, and adds it; a thread looks at the anonymous memory every other millisecond."""
  before, mapped, start = _status("RssAnon"), _status("RssFile"), time.perf_counter()
  most, over = before, threading.Event()

  def look() -> None:
    nonlocal most
    while not over.wait(0.002):
      most = max(most, _status("RssAnon"))

  Path("/proc/self/clear_refs").write_text("5")  # The peak of resident memory begins anew.
  thread = threading.Thread(target=look)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
  found.append(
    Stage(
      name=name,
      before=before,
      own=max(most, _status("RssAnon")) - before,
      expected=expected / MIB,
      resident=_status("VmHWM"),
      mapped=max(0.0, _status("RssFile") - mapped),
      seconds=time.perf_counter() - start,
    )
  )


def apart(function: Callable[..., list[Stage]], *arguments: Any) -> list[Stage]:
  """What a function finds in a process of its own."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    return pool.submit(function, *arguments).result()


# --- A mixture ----------------------------------------------------------------------------------------------


def write_mixture(folder: Path, lines: int, datasets: int) -> None:
  """Writes annotation files of so many lines together, and the meta file that names them."""
  each, meta = lines // datasets, {}
  for number in range(datasets):
    with (folder / f"d{number}.jsonl").open("wb") as file:
      for start in range(0, each, 10_000):
        file.write(_LINE * min(10_000, each - start))
    meta[f"d{number}"] = {"root": "", "annotation": f"d{number}.jsonl", "length": each, "repeat_time": 1}
  (folder / "meta.json").write_text(json.dumps(meta))


def _settings(folder: Path) -> tuple[Any, Any, Any, Any]:
  """The settings of packed rows of a run over the mixture, and a tokenizer; sizes are drawn from now on."""
  import numpy as np

  from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
  from internvl_jax.data.load import row_count
  from internvl_jax.data.sample.tokenize import ChatTokenizer
  from internvl_jax.data.source.sizes import SIZE, MeasureLines
  from internvl_jax.hf.tokenizer import load_tokenizer

  def draw(self: MeasureLines, lines: range) -> tuple[np.ndarray, dict[int, str]]:
    records = np.zeros(len(lines), SIZE)
    drawn = np.arange(lines.start, lines.stop, dtype=np.uint64) * 2654435761 % (1 << 32)
    records["tokens"], records["tiles"], records["supervised"] = 300 + drawn % 3000, 1 + drawn % 12, 50
    return records, {}

  MeasureLines.__call__ = draw
  row_count.packing.count_rows = lambda sizes, packed, progress: max(1, len(sizes) // 4)
  data = DataTrainingArguments(
    meta_path=str(folder / "meta.json"),
    conv_style="internvl2_5",
    use_packed_ds=True,
    max_packed_tokens=16384,
    num_images_expected=48,
    max_seq_length=16384,
  )
  training = TrainingArguments(per_device_train_batch_size=1, max_steps=1000, disable_tqdm=True)
  loader = LoaderConfig(cache_dir=str(folder / "cache"))
  tokenizer = load_tokenizer(REPOSITORY / "tests" / "assets" / "tokenizer")
  return data, training, loader, ChatTokenizer(tokenizer, "internvl2_5")


def first_start(folder: Path, lines: int, datasets: int) -> list[Stage]:
  """The first start with new data: both indexes are built."""
  data, training, loader, tokenizer = _settings(folder)
  from internvl_jax.data.load.mixture import Mixture

  found: list[Stage] = []
  # Of a file at a time: the places of its line breaks, and where lines start and end, as int64.
  with measured("index of lines", 5 * 8 * lines / datasets, found):
    mixture = Mixture(
      data, tokenizer, tokens_per_tile=256, seed=training.seed, cache=loader.cache_dir, lines=_lines()
    )
  # What is measured goes to disk, block by block.
  with measured("index of sizes", 0, found):
    mixture.index_sizes(loader.cache_dir, workers=0, quiet=True)
  return found


def _lines() -> Any:
  from internvl_jax.data.load.task import CONVERSATIONS

  return CONVERSATIONS.lines


def later_start(folder: Path, lines: int) -> list[Stage]:
  """A start that finds both indexes, with its first rows; what workers are sent is left in the folder."""
  data, training, loader, tokenizer = _settings(folder)
  from internvl_jax.data.load.loader import TrainLoader

  found: list[Stage] = []
  with measured("start", lines * BYTES_OF_EPOCH, found):
    opened = TrainLoader(data, training, loader, tokenizer, tokens_per_tile=256)
  with measured("first rows", 0, found):
    opened.next_sizes()
  (folder / "sent").write_bytes(pickle.dumps((opened._samples, opened._cursor.micro_batches())))
  return found


BYTES_OF_EPOCH = 4 + 8 + 2 * 16
"""Of a sample, while the rows of an epoch are counted: its place in the order (int32, which stays), its index (int64), its
tokens and tiles (int64) as they are in the indexes and as the packer takes them."""


def worker(folder: Path, lines: int) -> list[Stage]:
  """What a process that decodes holds of the mixture."""
  _settings(folder)
  found: list[Stage] = []
  # The order of an epoch, and what it is shuffled from.
  with measured("each worker", lines * 2 * 4, found):
    _, rows = pickle.loads((folder / "sent").read_bytes())
    _ = rows[0]
  return found


def mixture(folder: Path, lines: int, datasets: int) -> list[Stage]:
  """All stages of a mixture."""
  write_mixture(folder, lines, datasets)
  found = apart(first_start, folder, lines, datasets)
  found += apart(later_start, folder, lines)
  return found + apart(worker, folder, lines)


# --- A checkpoint -------------------------------------------------------------------------------------------


def write_sparse(folder: Path, config: Any, tensors: dict[str, tuple[int, ...]], *, shard: int) -> int:
  """Writes a checkpoint of zeros in bfloat16 that takes no room on the disk; returns its bytes.

  Args:
    folder: where to.
    config: its config.json.
    tensors: their shapes.
    shard: bytes of a file, about.
  """
  (folder / "config.json").write_text(json.dumps(config))
  groups: list[dict[str, Any]] = [{}]
  total = at = 0
  for name, shape in tensors.items():
    size = 2
    for length in shape:
      size *= length
    if at + size > shard and groups[-1]:
      groups.append({})
      at = 0
    groups[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
    at, total = at + size, total + size
  where = {}
  for number, group in enumerate(groups, 1):
    name = f"model-{number:05}-of-{len(groups):05}.safetensors"
    header = json.dumps(group).encode()
    header += b" " * (-len(header) % 8)
    end = max(entry["data_offsets"][1] for entry in group.values())
    with (folder / name).open("wb") as file:
      file.write(len(header).to_bytes(8, "little") + header)
      file.truncate(8 + len(header) + end)
    where |= dict.fromkeys(group, name)
  index = {"metadata": {"total_size": total}, "weight_map": where}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return total


def tensors_of(source: Any) -> dict[str, tuple[int, ...]]:
  """The names and shapes of a model's tensors in the layout that its config.json says."""
  from internvl_jax.hf import weights

  found = {}
  for path, leaf in source.model.shapes.items():
    names = weights.names_of(path, leaf.shape, source.table)
    transform = names.row.transform
    shapes = (transform.shapes or weights.shapes_of(transform.save))(leaf.shape[names.lead :])
    for cell in names.keys.reshape(-1, names.keys.shape[-1]):
      found |= dict(zip(cell.tolist(), shapes, strict=True))
  return found


def one_host(folder: Path, topology: str, parameters: str) -> list[Stage]:
  """What the first host of a slice holds while it reads its part of a checkpoint, of some parameters."""
  import numpy as np
  from jax import ShapeDtypeStruct

  from internvl_jax.aot.target import open_target
  from internvl_jax.arguments import MeshConfig
  from internvl_jax.hf import weights
  from internvl_jax.hf.arrangement import reading_sharding
  from internvl_jax.hf.model import open_source
  from internvl_jax.parallel import mesh as meshes
  from internvl_jax.parallel import rules

  target = open_target(topology)
  found: list[Stage] = []
  with measured("open", 0, found):
    source = open_source(str(folder))
  shapes = {
    path: ShapeDtypeStruct(leaf.shape, np.dtype("bfloat16")) for path, leaf in source.model.shapes.items()
  }
  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=-1), target.devices)
  places = rules.state_shardings(source.model.axes, shapes, set(shapes), mesh).params
  names = {path: weights.names_of(path, leaf.shape, source.table) for path, leaf in shapes.items()}
  checkpoint = source.checkpoint
  assert checkpoint is not None
  plans, largest = [], 0
  for path, leaf in shapes.items():
    if not re.search(parameters, path):
      continue
    transform, lead = names[path].row.transform, names[path].lead
    sharding = reading_sharding(transform, lead, leaf.shape, places[path], far=False)
    indices = {str(index): index for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
    plans.append((path, leaf, indices.values()))
    largest = max(largest, 2 * int(np.prod(sharding.shard_shape(leaf.shape))))
  # The largest part of a tensor; of a stack of layers, a layer more.
  with measured("read", largest, found):
    for path, leaf, indices in plans:
      for index in indices:
        weights.read_shard(checkpoint, names[path], leaf, index)  # To a device, which is not there.
  return found


def checkpoint(folder: Path, size: str, topology: str, parameters: str) -> list[Stage]:
  """All stages of a published model's checkpoint."""
  from internvl_jax.hf import published
  from internvl_jax.hf.model import source_of_config

  config = published.config_of(size)
  total = write_sparse(folder, config, tensors_of(source_of_config(config)), shard=5 << 30)
  print(f"{size}: {total / 1e9:.1f} GB in {len(list(folder.glob('*.safetensors')))} files")
  return apart(one_host, folder, topology, parameters)


def table(stages: list[Stage]) -> list[str]:
  """The stages as lines, in MiB."""
  columns = ("before", "own", "expected", "resident", "mapped")
  lines = [f"{'stage, MiB':<18}" + "".join(f"{name:>10}" for name in (*columns, "seconds"))]
  for one in stages:
    numbers = "".join(f"{getattr(one, name):>10.0f}" for name in columns)
    lines += [f"{one.name:<18}{numbers}{one.seconds:>10.1f}"]
  return lines


def main() -> None:
  """Measures what was asked for."""
  parser = argparse.ArgumentParser(description="Memory of the host, by stage.")
  parts = parser.add_subparsers(dest="part", required=True)
  of_data = parts.add_parser("mixture")
  of_data.add_argument("--lines", type=int, default=10_000_000)
  of_data.add_argument("--datasets", type=int, default=10)
  of_weights = parts.add_parser("checkpoint")
  of_weights.add_argument("--size", default="2.5-78b")
  of_weights.add_argument("--topology", default="v5e:8x8")
  of_weights.add_argument("--parameters", default="", help="reads those alone whose path has this in it")
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    if asked.part == "mixture":
      found = mixture(Path(folder), asked.lines, asked.datasets)
    else:
      found = checkpoint(Path(folder), asked.size, asked.topology, asked.parameters)
  print("\n".join(table(found)))


if __name__ == "__main__":
  main()
