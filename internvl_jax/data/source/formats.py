"""Files that are not JSON lines (jsonl), told by their first bytes: one message a file, not one a line."""

import json
import re
import shlex
from typing import BinaryIO, NamedTuple

# So much of a file is looked at, and so many of its lines.
_HEAD_BYTES = 1 << 16
_LINES = 10


class Format(NamedTuple):
  """A file's format.

  Attributes:
    name: in words, to follow "is".
    remedy: how it becomes jsonl; {path} is replaced by the file's path, {jsonl} by the new one's.
    kind: by which a kind of annotation file knows that it is its own; "" where there is none.
  """

  name: str
  remedy: str
  kind: str = ""

  def explain(self, path: str) -> str:
    """The message about a file of this format."""
    jsonl = re.sub(r"(\.jsonl?|\.\w{1,8})+$", "", path) + ".lines.jsonl"
    quoted = {"path": shlex.quote(path), "jsonl": shlex.quote(jsonl)}
    remedy = re.sub(r"\{(path|jsonl)\}", lambda found: quoted[found[1]], self.remedy)
    return f"it is {self.name}, not jsonl with one JSON object a line; {remedy}"


_AGAIN = "save it as jsonl"
_PYTHON = 'python -c "import json, sys; {}" {{path}} > {{jsonl}}'
_ARRAY = Format(
  "a JSON array (a list over the whole file)",
  "write a line for each entry: "
  + _PYTHON.format("[print(json.dumps(x)) for x in json.load(open(sys.argv[1], encoding='utf-8'))]"),
  "array",
)
_OBJECT = Format(
  "JSON of which an object goes over several lines",
  "write each object into one line: jq -c . {path} > {jsonl}",
)
_PYTHON_DICTS = Format(
  "lines of Python dicts (in single quotes)",
  "write them as JSON: "
  + _PYTHON.format(
    "import ast; [print(json.dumps(ast.literal_eval(x))) for x in open(sys.argv[1], encoding='utf-8')]"
  ),
)
_TABLE = Format(
  "a table of text (CSV or TSV)",
  "write a line for each row: "
  "python -c \"import pandas, sys; pandas.read_csv(sys.argv[1], sep=None, engine='python').to_json(sys.argv[2], "
  "orient='records', lines=True, force_ascii=False)\" {path} {jsonl}, and give its columns the names of docs/data.md",
)
_TEXT = Format("text without JSON", f"name the annotation file, or {_AGAIN}")
_BINARY = Format("binary data", f"name the annotation file, or {_AGAIN}")


def _packed(name: str, command: str, kind: str = "") -> Format:
  return Format(f"packed by {name}", f"unpack it: {command}", kind)


def _pandas(name: str, reader: str, kind: str = "") -> Format:
  return Format(
    name,
    f'write a line for each row: python -c "import pandas, sys; pandas.{reader}(sys.argv[1]).to_json(sys.argv[2], '
    "orient='records', lines=True, force_ascii=False)\" {path} {jsonl}; images in its columns must become files",
    kind,
  )


_ARROW_STREAM = Format(
  "an Arrow stream, as of Hugging Face datasets",
  'write a line for each row: python -c "import datasets, sys; '
  'datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])" {path} {jsonl}; images in its columns must become files',
  "arrow_stream",
)
_UTF16 = Format("text in UTF-16", "write it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > {jsonl}")
_UTF16_LE = Format("text in UTF-16", "write it as UTF-8: iconv -f UTF-16LE -t UTF-8 {path} > {jsonl}")
_UTF16_BE = Format("text in UTF-16", "write it as UTF-8: iconv -f UTF-16BE -t UTF-8 {path} > {jsonl}")
_UTF32 = Format("text in UTF-32", "write it as UTF-8: iconv -f UTF-32 -t UTF-8 {path} > {jsonl}")
_HTML = Format(
  "a page of HTML, as servers send in place of a file that needs a login or is not there", "fetch it again"
)

# What files begin with, the longer of two before the shorter.
_BEGINNINGS: tuple[tuple[bytes, Format], ...] = (
  (b"\x1f\x8b", _packed("gzip", "gunzip -c {path} > {jsonl}", "gzip")),
  (b"PK\x03\x04", _packed("zip", "unzip {path}")),
  (b"BZh", _packed("bzip2", "bunzip2 -c {path} > {jsonl}", "bzip2")),
  (b"\xfd7zXZ\0", _packed("xz", "xz -dc {path} > {jsonl}", "xz")),
  (b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -dc {path} > {jsonl}", "zstd")),
  (b"\x04\x22\x4d\x18", _packed("lz4", "lz4 -dc {path} > {jsonl}")),
  (b"7z\xbc\xaf\x27\x1c", _packed("7-Zip", "7z x {path}")),
  (b"Rar!\x1a\x07", _packed("RAR", "unrar x {path}")),
  (b"PAR1", _pandas("a Parquet table", "read_parquet", "parquet")),
  (b"ARROW1", _pandas("an Arrow (Feather) table", "read_feather", "arrow")),
  (b"FEA1", _pandas("a Feather table", "read_feather")),
  (b"ORC", _pandas("an ORC table", "read_orc")),
  (b"\xff\xff\xff\xff", _ARROW_STREAM),
  (b"\xff\xfe\0\0", _UTF32),
  (b"\0\0\xfe\xff", _UTF32),
  (b"\xff\xfe", _UTF16),
  (b"\xfe\xff", _UTF16),
  (b"\x89HDF", _pandas("an HDF5 file", "read_hdf")),
  (b"\xd0\xcf\x11\xe0", _pandas("an Excel table", "read_excel")),
  (b"SQLite format 3", Format("an SQLite database", _AGAIN)),
  (b"\x93NUMPY", Format("a numpy array", _AGAIN)),
  (b"\x89PNG", Format("an image (PNG)", "name the annotation file")),
  (b"\xff\xd8\xff", Format("an image (JPEG)", "name the annotation file")),
  (b"GIF8", Format("an image (GIF)", "name the annotation file")),
  (b"RIFF", Format("an image or a video (RIFF)", "name the annotation file")),
  (b"%PDF", Format("a PDF", "name the annotation file")),
  (b"version https://git-lfs", Format("a pointer of Git LFS, not the file itself", "fetch it: git lfs pull")),
  (
    b"/annex/objects/",
    Format("a pointer of git-annex, not the file itself", "fetch it: git annex get {path}"),
  ),
  (b"<?xml", Format("XML", _AGAIN)),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05].")
_MARKUP = re.compile(rb"<(!doctype|html|head|body)\b", re.IGNORECASE)


def recognized(file: BinaryIO) -> Format | None:
  """The format of a file that is no jsonl, and None where that cannot be told; its place stays.

  A jsonl of which some lines are broken is one still, as long as one of the first begins with `{`.
  """
  place = file.tell()
  file.seek(0)
  head = file.read(_HEAD_BYTES)
  file.seek(place)
  return _by_beginning(head) or _by_lines(head, whole=len(head) < _HEAD_BYTES)


def _by_beginning(head: bytes) -> Format | None:
  for beginning, found in _BEGINNINGS:
    if head.startswith(beginning):
      return found
  if head[257:262] == b"ustar":
    return _packed("tar", "tar xf {path}", "tar")
  if _PICKLE.match(head):
    return Format("a Python pickle (a PyTorch file or the like)", _AGAIN)
  even, odd = head[0:64:2].strip(b"\0"), head[1:64:2].strip(b"\0")
  if len(head) > 3 and bool(even) != bool(odd):  # ASCII in two bytes each
    return _UTF16_LE if even else _UTF16_BE
  return _HTML if _MARKUP.match(head.removeprefix(b"\xef\xbb\xbf").lstrip()) else None


def _by_lines(head: bytes, *, whole: bool) -> Format | None:
  """The format of text that is no jsonl, by its first lines."""
  lines = [line.rstrip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()][:_LINES]
  if not lines:
    return None
  first, others = lines[0].lstrip(), lines[1:]
  objects = [line for line in others if line.startswith(b"{")]
  if first.startswith(b"{"):
    return _of_objects(first, others, whole=whole)
  if first.startswith(b"["):  # A list of one line before an object is a bad line.
    continued = first == b"[" or (
      first.endswith(b",") and all(line.endswith((b",", b"]")) for line in lines[:-1])
    )
    return _ARRAY if continued or not objects else None
  if objects:
    return None
  return _of_text(head, lines) if others else None


def _of_objects(first: bytes, others: list[bytes], *, whole: bool) -> Format | None:
  """The format of text that begins with `{` and is no jsonl."""
  if re.match(rb"\{\s*'", first):
    return _PYTHON_DICTS if all(re.match(rb"\{\s*'", line) for line in others[:-1]) else None
  # The next line of a jsonl is an object of its own; that of a pretty object goes on with this one.
  goes_on = others and not others[0].startswith(b"{") and (whole or len(others) > 1)
  return _OBJECT if goes_on and not _is_json(first) else None


def _of_text(head: bytes, lines: list[bytes]) -> Format | None:
  try:
    head[: head.rfind(b"\n") + 1].decode()
  except UnicodeDecodeError:
    return _BINARY
  if b"\0" in head:
    return _BINARY
  if all(_is_json(line) for line in lines[:-1]):
    return None  # numbers, texts: each is named as a line that is no object
  counts = [{mark: line.count(mark) for mark in (b",", b"\t", b";", b"|")} for line in lines[:2]]
  tabular = any(counts[0][mark] and counts[0][mark] <= counts[1][mark] for mark in counts[0])
  return _TABLE if tabular else _TEXT


def _is_json(line: bytes) -> bool:
  try:
    json.loads(line)
  except (ValueError, RecursionError):
    return False
  return True
