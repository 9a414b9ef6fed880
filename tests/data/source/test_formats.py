"""Annotation files that are no jsonl: one message a file that says what it is; and jsonl with bad lines stays jsonl."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import pytest

from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.where import DataError
from tests.support.data_toys import turns

ROWS = [{"image": "a.png", "conversations": turns("<image>\nwhat, now?", "red")}] * 3
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def archived(kind):
  buffer = io.BytesIO()
  if kind == "zip":
    with zipfile.ZipFile(buffer, "w") as archive:
      archive.writestr("a.jsonl", TEXT)
  else:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
      archive.addfile(tarfile.TarInfo("a.jsonl"))
  return buffer.getvalue()


OTHER = {
  "pretty_array": (json.dumps(ROWS, indent=2).encode(), "a JSON array"),
  "array": (json.dumps(ROWS).encode(), "a JSON array"),
  "array_of_lines": (("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]").encode(), "a JSON array"),
  "array_bom": (b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), "a JSON array"),
  "pretty_object": (
    json.dumps(ROWS[0], indent=2).encode(),
    "JSON of which an object goes over several lines",
  ),
  "python": ("".join(f"{row}\n" for row in ROWS).encode(), "lines of Python dicts"),
  "gzip": (gzip.compress(TEXT.encode()), "packed by gzip"),
  "bzip2": (bz2.compress(TEXT.encode()), "packed by bzip2"),
  "xz": (lzma.compress(TEXT.encode()), "packed by xz"),
  "zip": (archived("zip"), "packed by zip"),
  "tar": (archived("tar"), "packed by tar"),
  "parquet": (b"PAR1" + bytes(range(256)), "a Parquet table"),
  "arrow": (b"ARROW1\0\0" + bytes(range(256)), "an Arrow (Feather) table"),
  "arrow_stream": (b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow stream"),
  "pickle": (pickle.dumps(ROWS), "a Python pickle"),
  "utf16": (TEXT.encode("utf-16"), "text in UTF-16"),
  "utf16_le": (TEXT.encode("utf-16-le"), "text in UTF-16"),
  "utf16_be": (TEXT.encode("utf-16-be"), "text in UTF-16"),
  "utf32": (TEXT.encode("utf-32"), "text in UTF-32"),
  "csv": (b"image,question,answer\na.png,what?,red\n", "a table of text"),
  "tsv": (b"image\tquestion\na.png\twhat?\n", "a table of text"),
  "html": (b"\n<!DOCTYPE html>\n<html>", "a page of HTML"),
  "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
  "binary": (b"\x01\x02\xfe\n\xff\n", "binary data"),
  "text": (b"annotations of\nmy data\n", "text without JSON"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_that_is_no_jsonl(tmp_path, name):
  content, what = OTHER[name]
  path = tmp_path / "my data.jsonl"
  path.write_bytes(content)
  with pytest.raises(DataError) as caught:
    JsonlFile(path, "toy", cache=tmp_path / "cache")
  assert str(caught.value).startswith(f"{path}: dataset 'toy': it is {what}")
  assert "not jsonl with one JSON object a line; " in str(caught.value)


JSONL = {
  "plain": TEXT.encode(),
  "bom_crlf": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
  "first_is_text": b"hello\n" + TEXT.encode(),
  "first_is_list": b"[1, 2]\n" + TEXT.encode(),
  "first_is_cut": b'{"a": 1,\n' + TEXT.encode(),
  "first_is_nul": b"\0" * 40 + b"\n" + TEXT.encode(),
  "one_cut": b'{"a": 1,',
  "long": b'{"page": "' + b"x" * 200_000 + b'"}\n{"a": 1}\n',
  "spaced": b'\n\n {"a": 1}\n\n {"b": 2}',
}


@pytest.mark.parametrize("name", JSONL)
def test_jsonl_with_odd_lines_stays_jsonl(tmp_path, name):
  path = tmp_path / "a.jsonl"
  path.write_bytes(JSONL[name])
  file = JsonlFile(path, "toy")
  assert len(file) == sum(bool(line.strip()) for line in JSONL[name].split(b"\n"))
  file.close()
