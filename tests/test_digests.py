"""Digests of files in pieces are those of the whole, and files of digests tell of their own damage."""

import zlib

import pytest

from internvl_jax import digests


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12288, 20000])
def test_pieces_make_the_digest_of_the_whole(tmp_path, monkeypatch, size, sync):
  monkeypatch.setattr(digests, "_PIECE", 4096)
  monkeypatch.setattr(digests, "_BLOCK", 1024)
  content = bytes((7 * i * i + i // 3) % 256 for i in range(size))
  (tmp_path / "a").write_bytes(content)
  (tmp_path / "b").write_bytes(b"b" * 5000)
  found = digests.of_files(tmp_path, ["a", "b"], sync=sync)
  assert found["a"] == (f"{zlib.crc32(content):08x}", size)
  assert found["b"] == (f"{zlib.crc32(b'b' * 5000):08x}", 5000)


def test_damage_is_named(tmp_path):
  assert digests.find_damage(tmp_path) == digests.UNKNOWN
  (tmp_path / "part").mkdir()
  for name in ("a", "part/b"):
    (tmp_path / name).write_bytes(b"0123456789")
  digests.write(tmp_path, digests.of_files(tmp_path, digests.files_in(tmp_path)))
  assert digests.find_damage(tmp_path) == ""
  assert digests.files_in(tmp_path) == ["a", "part/b"]
  for content, words in (
    (b"0123456780", "not the bytes"),
    (b"012345678", "9 bytes instead of 10"),
    (None, "missing"),
  ):
    (tmp_path / "part/b").unlink()
    if content is not None:
      (tmp_path / "part/b").write_bytes(content)
    assert words in digests.find_damage(tmp_path) and "part/b" in digests.find_damage(tmp_path)
  told = tmp_path / digests.FILE
  told.write_bytes(told.read_bytes().replace(b" a\n", b" c\n"))
  assert digests.find_damage(tmp_path) == f"{digests.FILE}: not what was written"
