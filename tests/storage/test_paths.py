"""Paths of folders and of buckets: the same methods, the same files."""

import contextlib
import os

import pytest

from internvl_jax.storage import paths
from internvl_jax.storage.paths import BucketPath, path_of
from tests.support.buckets import names_in


def test_a_name_is_a_path_of_this_machine_or_of_a_bucket():
  assert path_of("a/b") == paths.Path("a/b")
  for url in ("gs://bucket/run", "S3://bucket/run/"):
    path = path_of(url)
    assert isinstance(path, BucketPath) and path.name == "run" and str(path / "a") == f"{path}/a"
  assert str(path_of("S3://Bucket/Run/").parent) == "s3://Bucket"
  assert not paths.is_bucket("https://host/run")


def test_what_knows_no_buckets_makes_no_folder_of_that_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(TypeError):
    os.makedirs(path_of("gs://bucket/run"))  # pyright: ignore[reportArgumentType]
  assert not os.listdir(tmp_path)


def test_bucket_does_what_a_folder_does(bucket, tmp_path):
  seen = []
  for root in (tmp_path / "run", path_of(f"{bucket}/run")):
    assert not root.exists() and not list(root.iterdir() if isinstance(root, BucketPath) else ())
    root.mkdir(parents=True, exist_ok=True)
    (root / "sub").mkdir()
    paths.write_whole(root / "a.json", b"{}")
    (root / "sub" / "b.txt").write_text("ä", encoding="utf-8")
    paths.write_whole(root / "a.json", b"[1]")
    found = [
      (path.name, path.is_dir(), path.is_file()) for path in sorted(root.iterdir(), key=lambda p: p.name)
    ]
    globbed = [path.name for path in root.glob("*.json")]
    text, size = (root / "sub" / "b.txt").read_text(encoding="utf-8"), (root / "a.json").stat().st_size
    with pytest.raises(FileNotFoundError):
      (root / "c").read_bytes()
    with pytest.raises(FileNotFoundError):
      (root / "c").stat()
    (root / "c").unlink(missing_ok=True)
    (root / "a.json").unlink()
    gone = (root / "a.json").exists()
    paths.remove_tree(root / "sub")
    seen.append((found, globbed, text, size, gone, (root / "sub").exists()))
  assert seen[0] == seen[1]


def test_folder_that_a_library_fills_is_sent_at_its_end(bucket, tmp_path):
  for root in (tmp_path / "run", path_of(f"{bucket}/run")):
    with paths.filled(root) as local:
      (local / "deep").mkdir()
      (local / "deep" / "x.bin").write_bytes(b"x" * 10)
      (local / "y").write_bytes(b"y")
    assert (root / "deep" / "x.bin").read_bytes() == b"x" * 10
  assert names_in(f"{bucket}/run") == ["deep/x.bin", "y"]


def test_nothing_is_sent_of_what_failed(bucket):
  with contextlib.suppress(ZeroDivisionError), paths.filled(path_of(f"{bucket}/other")) as local:
    (local / "z").write_bytes(b"z")
    raise ZeroDivisionError
  assert not path_of(f"{bucket}/other").exists()


def test_checksum_of_an_object_changes_with_its_content(bucket):
  path = BucketPath(f"{bucket}/x")
  checksums = set()
  for content in (b"1", b"2"):
    path.write_bytes(content)
    (found,) = paths.objects(path.parent).values()
    assert found == path.stat() and found.st_size == 1
    checksums.add(found.checksum)
  assert len(checksums) == 2 and "" not in checksums
