"""One dataset, written as every kind of annotation file: records in jsonl, JSON arrays, tables, tars, ..."""

import base64
import bz2
import gzip
import io
import json
import lzma
import pathlib
import tarfile
import zipfile


def records_of(folder: pathlib.Path, name: str = "toy") -> list[dict]:
  """The records of a jsonl that `data_toys.write_dataset` wrote."""
  return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def lines_of(records: list[dict]) -> bytes:
  return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_tar(path: pathlib.Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> None:
  with tarfile.open(path, "w", format=form) as tar:
    for name, content in files:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def members_of(records: list[dict], folder: pathlib.Path) -> list[tuple[str, bytes]]:
  """The records as members of a WebDataset tar, pictures beside their JSON."""
  files = []
  for number, record in enumerate(records):
    image = record.get("image")
    rest = {key: value for key, value in record.items() if key != "image"}
    files.append((f"{number:04}.json", json.dumps(rest).encode()))
    if image:
      files.append((f"{number:04}.png", (folder / image).read_bytes()))
  return files


def with_images(records: list[dict], folder: pathlib.Path, make) -> list[dict]:
  """The records with what `make(path, bytes)` makes of their image."""
  return [
    {**record, "image": make(record["image"], (folder / record["image"]).read_bytes())}
    if "image" in record
    else record
    for record in records
  ]


def as_struct(path: str, content: bytes) -> dict:
  return {"bytes": content, "path": path}


def as_url(path: str, content: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(content).decode()


def write_kinds(folder: pathlib.Path) -> dict[str, dict]:
  """Writes toy.jsonl and its images as all kinds that need no package; returns what a meta file says of each."""
  records = records_of(folder)
  lines, half = lines_of(records), len(records) // 2
  write = {
    "array.json": json.dumps(records).encode(),
    "pretty.json": json.dumps(records, indent=2).encode(),
    "lines.jsonl.gz": gzip.compress(lines),
    "lines.jsonl.bz2": bz2.compress(lines),
    "array.json.xz": lzma.compress(json.dumps(records).encode()),
    "urls.jsonl": lines_of(with_images(records, folder, as_url)),
    "base64.jsonl": lines_of(with_images(records, folder, lambda *x: base64.b64encode(x[1]).decode())),
    "part-0.jsonl": lines_of(records[:half]),
    "part-1.jsonl": lines_of(records[half:]),
    "in_zip.jsonl": lines_of(
      [{**r, "image": f"images.zip/a/{r['image']}"} if "image" in r else r for r in records]
    ),
  }
  for name, content in write.items():
    (folder / name).write_bytes(content)
  with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for record in records:
      if "image" in record:
        archive.write(folder / record["image"], f"a/{record['image']}")
  members = members_of(records, folder)
  write_tar(folder / "all.tar", members)
  for shard, chosen in enumerate((members[: len(members) // 2], members[len(members) // 2 :])):
    # A record is in one shard: both members of the one in the middle are in the first.
    if shard == 1 and chosen[0][0].endswith(".png"):
      chosen = chosen[1:]
    elif shard == 0 and members[len(chosen)][0].endswith(".png"):
      chosen = [*chosen, members[len(chosen)]]
    write_tar(folder / f"shard-{shard:03}.tar", chosen, tarfile.PAX_FORMAT)
  names = {name: {"root": "", "annotation": name} for name in write if not name.startswith("part")}
  return {
    **names,
    "parts": {"root": "", "annotation": "part-*.jsonl"},
    "list": {"root": "", "annotation": ["part-0.jsonl", "part-1.jsonl"]},
    "zip_root": {"root": "images.zip/a", "annotation": "toy.jsonl"},
    "tar": {"annotation": "all.tar"},
    "shards": {"annotation": "shard-{000..001}.tar"},
  }


def write_tables(folder: pathlib.Path) -> dict[str, dict]:
  """Writes them as what pyarrow, datasets and zstandard write; returns what a meta file says of each."""
  import datasets
  import pyarrow.feather
  import pyarrow.parquet
  import zstandard

  records = records_of(folder)
  table = pyarrow.Table.from_pylist(with_images(records, folder, as_struct))
  pyarrow.parquet.write_table(table, folder / "bytes.parquet", row_group_size=3)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "paths.parquet")
  pyarrow.feather.write_feather(table, folder / "bytes.arrow")
  with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
    writer.write_table(table, max_chunksize=4)
  saved = datasets.Dataset.from_list(with_images(records, folder, as_struct))
  saved.save_to_disk(folder / "saved")
  saved.cast_column("image", datasets.Image()).save_to_disk(folder / "pictures")
  (folder / "hub").mkdir(exist_ok=True)  # the hub knows a folder's files by their splits
  saved.to_parquet(folder / "hub/train.parquet")
  (folder / "lines.jsonl.zst").write_bytes(zstandard.compress(lines_of(records)))
  names = ("bytes.parquet", "bytes.arrow", "stream.arrow", "saved", "pictures")
  return {
    **{name: {"annotation": name} for name in names},
    "by_name": {"dataset": f"{folder}/hub:train"},
    "paths.parquet": {"root": "", "annotation": "paths.parquet"},
    "zstd": {"root": "", "annotation": "lines.jsonl.zst"},
  }
