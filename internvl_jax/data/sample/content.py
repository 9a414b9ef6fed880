"""The kind of a file by its first bytes, where it is none that Pillow or FFmpeg reads: its name is often wrong.

A download that failed leaves an error page, a checkout without its large files leaves pointers, a phone saves HEIC.
"""

import contextlib
import re

HEAD_BYTES = 1024
"""How many of a file's first bytes are enough."""

VIDEO = "a video"

# Brands of the ISO base media format, which begin with a box "ftyp": pictures, else a video.
_BRANDS = {
  "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"),
  "AVIF": (b"avif", b"avis"),
  "a raw photograph (CR3)": (b"crx ",),
}

# Bytes at an offset. Formats that Pillow reads are not among them: what is wrong about those it says itself.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
  (0, b"%PDF-", "a PDF"),
  (0, b"PK\x03\x04", "a zip archive"),
  (0, b"PK\x05\x06", "a zip archive"),
  (0, b"\x1f\x8b", "compressed by gzip"),
  (0, b"BZh", "compressed by bzip2"),
  (0, b"\xfd7zXZ\x00", "compressed by xz"),
  (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
  (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
  (0, b"Rar!\x1a\x07", "a rar archive"),
  (257, b"ustar", "a tar archive"),
  (0, b"PAR1", "a parquet file"),
  (0, b"\x93NUMPY", "a numpy array"),
  (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
  (0, b"SIMPLE  =", "a FITS image"),
  (128, b"DICM", "a DICOM image"),
  (0, b"\xff\x0a", "JPEG XL"),
  (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
  (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
  (0, b"#?RADIANCE", "a Radiance HDR image"),
  (0, b"8BPS", "a Photoshop file"),
  (0, b"%!PS", "PostScript"),
  (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
  (0, b"\x1aE\xdf\xa3", f"{VIDEO} (Matroska or WebM)"),
  (0, b"FLV\x01", f"{VIDEO} (FLV)"),
  (0, b"\x00\x00\x01\xba", f"{VIDEO} (MPEG)"),
  (0, b"\x00\x00\x01\xb3", f"{VIDEO} (MPEG)"),
  (0, b"0&\xb2u\x8ef\xcf\x11", f"{VIDEO} (ASF)"),
  (8, b"AVI ", f"{VIDEO} (AVI)"),
  (8, b"WAVE", "sound (WAV)"),
  (0, b"ID3", "sound (MP3)"),
  (0, b"OggS", "sound or a video (Ogg)"),
  (0, b"\x7fELF", "a program"),
)

_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = (
  (rb"<svg[\s>]", "SVG"),
  (rb"<!doctype html|<html[\s>]|<head[\s>]|<body[\s>]", "an HTML page"),
  (rb"<error>|<code>accessdenied", "an error message in XML"),
  (rb"\A<\?xml|\A<\w+[\s>]", "XML"),
)


def kind_of(head: bytes) -> str | None:
  """The kind of a file that begins with these bytes, to follow "is" in a message; None if that is not known.

  >>> kind_of(b"%PDF-1.4")
  'a PDF'

  Args:
    head: its first `HEAD_BYTES` bytes, or all if it has fewer.
  """
  if head.startswith(_LFS):
    return "a pointer of Git LFS, not the file it stands for"
  if head[4:8] == b"ftyp":
    return next((name for name, brands in _BRANDS.items() if head[8:12] in brands), f"{VIDEO} (MP4 or MOV)")
  for offset, magic, name in _MAGIC:
    if head[offset : offset + len(magic)] == magic:
      return name
  if head and not head.strip(b"\0"):
    return "nothing but zero bytes"
  return _kind_of_text(head)


def kind_of_file(path: str) -> str | None:
  """The kind of a file on a local disk; None if that is not known, or it cannot be read."""
  try:
    with open(path, "rb") as file:
      return kind_of(file.read(HEAD_BYTES))
  except (OSError, ValueError):
    return None


def _kind_of_text(head: bytes) -> str | None:
  text = _decoded(head).strip()
  if not text or not all(character.isprintable() or character in "\t\r\n\f" for character in text):
    return None
  lowered = text.lower().encode()
  for pattern, name in _MARKUP:
    if re.search(pattern, lowered):
      return name
  if re.match(r"data:\w+/[\w.+-]+;base64,", text):
    return "a data URL"
  if re.match(r'[{\[]\s*(["{\[\]}]|-?\d)', text):
    return "JSON"
  return "base64" if len(text) >= 64 and re.fullmatch(r"[A-Za-z0-9+/=\r\n]+", text) else "text"


def _decoded(head: bytes) -> str:
  """The text that some bytes are the beginning of; "" if they are none."""
  encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
  for cut in range(4):  # the last character may be there in part
    with contextlib.suppress(UnicodeError):
      return head[: len(head) - cut].decode(encoding)
  return ""


def remedy(kind: str, *, image: bool) -> str:
  """The remedy for a file of a kind in the place of an image, or else a video.

  Args:
    kind: as `kind_of` returns it.
    image: an image is wanted.
  """
  if kind.startswith("a pointer"):
    return "run git lfs pull"
  if image and kind.startswith(VIDEO):
    return "put it under 'video'"
  if kind in ("base64", "a data URL"):
    return "decode it to a file"
  if kind.startswith(("an HTML", "an error", "nothing")):
    return "download it again or delete the line"
  return f"convert it to {'PNG or JPEG' if image else 'MP4'} or delete the line"
