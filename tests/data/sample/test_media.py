"""Media as a person sees them: videos turned, values of many bits scaled, replaced files noticed, frames as a list."""

import json
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample import content, depth, images, notes, video, video_file
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.where import DataError
from internvl_jax.tasks.preference.lines import PairLines
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl

# --- Turned videos ------------------------------------------------------------------------------------------

COLORS = {"R": (230, 20, 20), "G": (20, 230, 20), "B": (20, 20, 230), "Y": (230, 230, 20)}
# (a, b, c, d) of the display matrix; the corners, row by row, and whether the sides change places. The first four were
# recorded with decord 0.6.0, of .mp4 and .mov files of 160 x 96, 161 x 97 and 98 x 150. It turns a mirrored video by the
# angle of (a, b) alone, upside down or on its side; here it is as FFmpeg's own program shows it.
TURNS = {
  "0": ((1, 0, 0, 1), "RGBY", False),
  "90": ((0, 1, -1, 0), "BRYG", True),
  "180": ((-1, 0, 0, -1), "YBGR", False),
  "270": ((0, -1, 1, 0), "GYRB", True),
  "left_right": ((-1, 0, 0, 1), "GRYB", False),
  "top_bottom": ((1, 0, 0, -1), "BYRG", False),
  "transpose": ((0, 1, 1, 0), "RBGY", True),
  "transverse": ((0, -1, -1, 0), "YGBR", True),
  "90_and_half_a_degree": ((-0.009, 1, -1, -0.009), "BRYG", True),
  "45": ((0.707, 0.707, -0.707, 0.707), "RGBY", False),
  "nothing": ((0, 0, 0, 0), "RGBY", False),
}


def corners(width, height):
  picture = np.zeros((height, width, 3), np.uint8)
  places = [
    (y, x)
    for y in (slice(0, height // 2), slice(height // 2, None))
    for x in (slice(0, width // 2), slice(width // 2, None))
  ]
  for place, color in zip(places, COLORS.values(), strict=True):
    picture[place] = color
  return picture


def matrix(a, b, c, d):
  return struct.pack(">9i", *(round(65536 * value) for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)


def write_corners(
  path, width=48, height=32, *, codec="png", pixels="rgb24", turn=None, tag=None, box=b"tkhd"
):
  """Writes a video of three equal frames, and into its header by how much it is to be turned."""
  with av.open(str(path), "w") as out:
    stream = out.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = width, height, pixels
    if tag is not None:
      stream.metadata["rotate"] = tag
    for _ in range(3):
      out.mux(stream.encode(av.VideoFrame.from_ndarray(corners(width, height), format="rgb24")))
    out.mux(stream.encode())
  if turn is not None:
    data = bytearray(path.read_bytes())
    place = data.index(matrix(1, 0, 0, 1), data.index(box))
    data[place : place + 36] = matrix(*turn)
    path.write_bytes(data)
  return path


def seen(path):
  """The size of a video's frames, and the colours of their corners; all frames are alike."""
  frames = video.read_frames(str(path), WHERE, min_num_frame=2, max_num_frame=2, rng=None)
  found = set()
  for frame in frames:
    pixels = np.asarray(frame, np.int64)
    places = [pixels[y, x] for y in (2, -3) for x in (2, -3)]
    names = [min(COLORS, key=lambda name: np.abs(place - COLORS[name]).sum()) for place in places]
    found.add((frame.size, "".join(names)))
  (one,) = found
  return one


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("name", TURNS)
def test_videos_are_turned_as_they_are_shown(tmp_path, name, suffix):
  turn, expected, crossed = TURNS[name]
  for size in ((48, 32), (49, 33), (34, 50)):
    path = write_corners(tmp_path / f"{size}.{suffix}", *size, turn=turn)
    assert seen(path) == (size[::-1] if crossed else size, expected)


def test_turns_of_the_whole_film_and_of_the_track_add_up(tmp_path):
  quarter = TURNS["90"][0]
  path = write_corners(tmp_path / "film.mp4", turn=quarter, box=b"mvhd")
  assert seen(path) == ((32, 48), "BRYG")
  data = path.read_bytes()
  place = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
  path.write_bytes(data[:place] + matrix(*quarter) + data[place + 36 :])
  assert seen(path) == ((48, 32), "YBGR")


@pytest.mark.parametrize(
  ("tag", "expected"), [("90", "BRYG"), ("-90", "GYRB"), ("180", "YBGR"), ("45", "RGBY"), ("x", "RGBY")]
)
def test_matroska_files_are_turned_by_their_tag(tmp_path, tag, expected):
  """As decord 0.6.0 does: FFmpeg wrote the tag when it could not write a matrix."""
  path = write_corners(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", tag=tag)
  assert seen(path)[1] == expected


def test_a_turned_video_becomes_the_tiles_of_its_turned_frames(tmp_path, tokenizer):
  write_corners(tmp_path / "a.mp4", turn=TURNS["90"][0])
  (tmp_path / "frames").mkdir()
  for number in range(3):
    Image.fromarray(np.rot90(corners(48, 32), -1)).save(tmp_path / f"frames/{number}.png")
  question = {"conversations": turns("<video>\nwhere is red?", "right")}
  pair = {"question": "<video>\nwhere is red?", "chosen": "right", "rejected": "left"}
  for line, lines in ((question, CONVERSATION_LINES), (pair, PairLines())):
    mixture = mixture_of(
      tmp_path, tokenizer, [{"video": v, **line} for v in ("a.mp4", "frames")], lines=lines
    )
    one, other = (mixture.decode(0, index) for index in range(2))
    np.testing.assert_array_equal(one.tiles, other.tiles)


def test_a_matrix_of_extreme_numbers_turns_nothing():
  for extreme in (-(1 << 31), (1 << 31) - 1):
    assert video_file.turn_of([extreme] * 9) == video_file.Turn()


# --- Data sets of a few lines -------------------------------------------------------------------------------


def mixture_of(folder, tokenizer, records, *, packed=False, lines=CONVERSATION_LINES):
  write_jsonl(folder / "toy.jsonl", records)
  (folder / "meta.json").write_text(json.dumps({"toy": {"root": str(folder), "annotation": "toy.jsonl"}}))
  rows = {"use_packed_ds": True, "max_packed_tokens": 512, "num_images_expected": 32} if packed else {}
  data = arguments(folder / "meta.json", min_num_frame=2, max_num_frame=2, max_seq_length=256, **rows)
  return Mixture(data, tokenizer, tokens_per_tile=4, seed=0, cache=folder / "cache", lines=lines)


def doctor(folder, tokenizer, lines, *, packed=True):
  """What the doctor finds: the sizes of the lines, why some are lost, and its notes."""
  mixture = mixture_of(folder, tokenizer, lines, packed=packed)
  mixture.index_sizes(folder / "cache", workers=0, quiet=True)
  (report,) = examine(mixture)
  shown = notes.NotesShown()
  lost = report.examples + list(decode_all(mixture, packed=packed, workers=0, noted=shown.add))
  return report.tiles.tolist(), lost, shown.lines()


def picture_line(name):
  return {"image": name, "conversations": turns("<image>\nwhat?", "red")}


# --- Images of many bits ------------------------------------------------------------------------------------


def ramp(top, dtype, bottom=0):
  return np.linspace(bottom, top, 600).reshape(20, 30).astype(dtype)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_divided_by_257(tmp_path, suffix):
  values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
  Image.fromarray(values).save(tmp_path / f"a.{suffix}")
  noted = []
  found = images.open_image(str(tmp_path / f"a.{suffix}"), WHERE, noted)
  assert found.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(found), np.repeat(np.rint(values / 257)[..., None], 3, 2))
  (note,) = noted
  assert note.kind == notes.SCALED and note.dataset == "toy"
  assert note.message.startswith(
    f"toy.jsonl:3 (dataset 'toy'): image {tmp_path}/a.{suffix} holds values of 0 to 65535"
  )


@pytest.mark.parametrize(
  ("values", "bottom", "top"),
  [
    (ramp(1, np.float32), 0, 1),
    (ramp(1.05, np.float32, -0.05), 0, 1),  # what resampling leaves of 0 to 1
    (ramp(60_000, np.float32), 0, 65535),
    (ramp(1, np.float32, -1), -1, 1),
    (ramp(3e38, np.float32, -3e38), -3e38, 3e38),
    (ramp(1e6, np.int32), 0, 1e6),
    (ramp(2**31 - 1, np.int32, -(2**31)), -(2**31), 2**31 - 1),
    (ramp(32767, np.int32, -32768), -32768, 32767),  # of a TIFF of signed 16 bits
    (np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf]], np.float32), 0, 1),
  ],
)
def test_values_are_scaled_by_the_least_range_that_holds_them(values, bottom, top):
  found, told = depth.to_rgb(Image.fromarray(values))
  wide = np.clip(np.nan_to_num(values.astype(np.float64), nan=bottom), bottom, top)
  expected = np.rint((wide - bottom) * (255 / (top - bottom)))
  assert np.abs(np.asarray(found)[..., 0] - expected).max() <= (top > 1e9)  # single precision of the ends
  assert "become 0 to 255" in told and ("not finite" in told) == (not np.isfinite(values).all())


@pytest.mark.parametrize(
  "values", [ramp(255, np.uint16), ramp(255, np.int32), ramp(254.6, np.float32), np.zeros((2, 3), np.int32)]
)
def test_values_that_fit_are_taken_as_pillow_takes_them(values):
  image = Image.fromarray(values)
  found, told = depth.to_rgb(image)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))
  assert not told


def test_values_without_a_range_are_black():
  for values in (np.full((2, 3), np.nan, np.float32), np.full((2, 3), -7, np.int32)):
    assert not np.asarray(depth.to_rgb(Image.fromarray(values))[0]).any()


def png(path, depth_, color, row):
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 10, 1, depth_, color, 0, 0, 0)
  data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_colour_keep_their_upper_eight(tmp_path, color, channels):
  values = np.linspace(0, 65535, 10).astype(">u2")
  png(tmp_path / "a.png", 16, color, np.repeat(values, channels).tobytes())
  found = np.asarray(images.open_image(str(tmp_path / "a.png"), WHERE))
  np.testing.assert_array_equal(found[0], np.repeat((values >> 8)[:, None], 3, 1))


# --- What is said of images ---------------------------------------------------------------------------------


def turned(path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (30, 20)).save(path, exif=exif)


def several(path):
  Image.new("RGB", (30, 20)).save(path, save_all=True, append_images=[Image.new("RGB", (30, 20), "red")])


def clear(mode):
  return lambda path: Image.new(mode, (30, 20), (0,) * len(mode)).save(path)


def clear_palette(path):
  Image.new("P", (30, 20)).save(path, transparency=0)


SAID = {
  "i16.png": (lambda path: Image.fromarray(ramp(65535, np.uint16)).save(path), "holds values of 0 to 65535"),
  "float.tif": (lambda path: Image.fromarray(ramp(1, np.float32)).save(path), "0 to 1 become 0 to 255"),
  "turned.jpg": (turned, "asks to be turned (EXIF orientation 6)"),
  "several.gif": (several, "has several frames or pages: the first is taken"),
  "several.png": (several, "has several frames"),
  "several.tif": (several, "has several frames"),
  "clear.png": (clear("RGBA"), "has transparent pixels"),
  "clear_palette.png": (clear_palette, "has transparent pixels"),
}
UNSAID = {
  "plain.png": lambda path: Image.new("RGB", (30, 20)).save(path),
  "plain.gif": lambda path: Image.new("P", (30, 20)).save(path),
  "opaque.png": lambda path: Image.new("RGBA", (30, 20), "red").save(path),
  "bits.png": lambda path: Image.new("1", (30, 20)).save(path),
  "print.jpg": lambda path: Image.new("CMYK", (30, 20)).save(path),
  "upright.jpg": lambda path: Image.new("RGB", (30, 20)).save(path, exif=Image.Exif()),
  "bad_exif.jpg": lambda path: Image.new("RGB", (30, 20)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
  "bad_profile.jpg": lambda path: Image.new("RGB", (30, 20)).save(path, icc_profile=b"rubbish" * 99),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_is_said_of_images_by_doctor_and_log(tmp_path, tokenizer, caplog):
  for name, make in (*((name, make) for name, (make, _) in SAID.items()), *UNSAID.items()):
    make(tmp_path / name)
  lines = [picture_line(name) for name in (*UNSAID, *SAID)]
  _, lost, said = doctor(tmp_path, tokenizer, lines)
  assert not lost and len(said) == len(SAID)
  for number, (name, (_, what)) in enumerate(SAID.items(), len(UNSAID) + 1):
    assert sum(f"toy.jsonl:{number} " in line and name in line and what in line for line in said) == 1, name
  # A run says the first of each kind of a dataset.
  loader = TrainLoader(
    mixture_of(tmp_path, tokenizer, lines).data,
    TrainingArguments(per_device_train_batch_size=4, num_train_epochs=2, max_steps=-1, disable_tqdm=True),
    LoaderConfig(shuffle=False),
    tokenizer,
    tokens_per_tile=4,
  )
  caplog.set_level("WARNING")
  assert len(list(loader)) == 8
  loader.close()
  told = [record.message for record in caplog.records if "once a dataset" in record.message]
  assert len(told) == 4 and all(
    sum(name in line for line in told) == 1 for name in ("i16", "turned", "clear.png")
  )


def test_the_doctor_names_a_few_and_counts_the_rest():
  shown = notes.NotesShown()
  for number in range(9):
    shown.add(notes.Note("a", notes.SCALED, f"image {number}"))
  shown.add(notes.Note("b", notes.SCALED, "image b"))
  assert shown.lines() == [*(f"image {n}" for n in range(5)), "and 4 more of dataset 'a' likewise", "image b"]


KINDS = {
  b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC",
  b"\0\0\0\x20ftypisom\0\0\2\0": "a video (MP4 or MOV)",
  b"\x1aE\xdf\xa3\1": "a video (Matroska or WebM)",
  b"RIFF\0\0\0\0AVI LIST": "a video (AVI)",
  b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>': "SVG",
  b"\n<!DOCTYPE html><html>": "an HTML page",
  "\ufeff<html>é".encode("utf-16-le"): "an HTML page",
  b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>": "an error message in XML",
  b'{"detail": "not found"}': "JSON",
  b"[1, 2]": "JSON",
  b"%PDF-1.7\n": "a PDF",
  b"PK\3\4\0\0": "a zip archive",
  b"\x1f\x8b\x08": "compressed by gzip",
  b"\0" * 128 + b"DICM": "a DICOM image",
  b"\0" * 300: "nothing but zero bytes",
  b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS, not the file it stands for",
  b"iVBORw0KGgoAAAANSUhEUgAA" * 4: "base64",
  b"data:image/png;base64,iVBO": "a data URL",
  "eine Zeile \u00fcber etwas".encode()[:-1] + b"\xc3": "text",
  b"\xff\xd8\xff\xe0\0\x10JFIF": None,
  b"\x93\xf1\x02\x88": None,
  b"": None,
}


@pytest.mark.parametrize("head", KINDS, ids=lambda head: str(KINDS[head]))
def test_files_are_named_by_what_they_are(head):
  assert content.kind_of(head) == KINDS[head]


# --- Files that were replaced -------------------------------------------------------------------------------


def write_pictures(folder, count, size):
  for number in range(count):
    Image.new("RGB", size).save(folder / f"{number}.png")
  return [picture_line(f"{number}.png") for number in range(count)]


def test_a_folder_of_images_that_was_replaced_is_measured_again(tmp_path, tokenizer):
  lines = write_pictures(tmp_path, 40, (64, 16))
  assert doctor(tmp_path, tokenizer, lines) == ([5] * 40, [], [])
  write_pictures(tmp_path, 40, (16, 16))
  assert doctor(tmp_path, tokenizer, lines) == ([1] * 40, [], [])


def test_a_gif_with_other_frames_is_measured_again(tmp_path, tokenizer):
  line = {"video": "a.gif", "conversations": turns("<video>\nwhat?", "red")}
  several(tmp_path / "a.gif")
  assert doctor(tmp_path, tokenizer, [line]) == ([2], [], [])
  Image.new("RGB", (30, 20)).save(tmp_path / "a.gif")
  assert doctor(tmp_path, tokenizer, [line]) == ([1], [], [])


def test_single_images_that_were_replaced_are_named_with_a_remedy_that_helps(tmp_path, tokenizer):
  lines = write_pictures(tmp_path, 100, (64, 16))
  doctor(tmp_path, tokenizer, lines)
  Image.new("RGB", (16, 16)).save(tmp_path / "1.png")  # no line that is looked at
  tiles, (lost,), _ = doctor(tmp_path, tokenizer, lines)
  assert tiles[1] == 5 and lost.startswith(f"{tmp_path}/toy.jsonl:2 (dataset 'toy'): it has ")
  assert "its files were replaced since they were measured; delete the cache of sizes, " in lost
  folder = lost.partition("cache of sizes, ")[2].partition(",")[0]
  assert folder.startswith(str(tmp_path / "cache"))
  for path in (tmp_path / "cache").iterdir():
    if str(path) == folder:
      for file in path.iterdir():
        file.unlink()
  tiles, lost, _ = doctor(tmp_path, tokenizer, lines)
  assert tiles[1] == 1 and not lost


def test_a_line_with_wrong_sizes_is_told_to_correct_them(tmp_path, tokenizer):
  Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
  _, (lost,), _ = doctor(tmp_path, tokenizer, [picture_line("a.png") | {"width": 64, "height": 16}])
  assert "correct the line's width and height" in lost and "cache" not in lost


# --- Frames as a list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_frames_as_a_list_are_those_of_a_folder(tmp_path, tokenizer, nested):
  (tmp_path / "clip").mkdir()
  names = [f"clip/{number}.png" for number in range(5)]
  for number, name in enumerate(names):
    Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(tmp_path / name)
  line = {"conversations": turns("<video>\nwhat?", "red")}
  listed = [[*names]] if nested else names
  mixture = mixture_of(
    tmp_path, tokenizer, [{"video": v, **line} for v in (listed, "clip/", ["clip/"], names[::-1], names[:1])]
  )
  one, folder, lone, backwards, single = (mixture.decode(0, index) for index in range(5))
  for sample in (lone, backwards):
    np.testing.assert_array_equal(sample.input_ids, folder.input_ids)
  assert one.tiles.shape == (2, 16, 16, 3) and single.tiles.shape == (1, 16, 16, 3)
  # Frames are drawn by the sample's number; in order, as they are listed.
  assert (
    one.tiles[0, 0, 0, 0] < one.tiles[1, 0, 0, 0]
    and backwards.tiles[0, 0, 0, 0] > backwards.tiles[1, 0, 0, 0]
  )


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (
      {"video": ["a.png", "b.mp4"]},
      "lists 2 files, ['a.png', 'b.mp4'], that are not all images; write a line for each",
    ),
    ({"video": ["a.png", 7]}, "'video' must be one path or those of its frames, got"),
    ({"video": ["gone.png", "gone.png"]}, "image not found"),
    (
      {"video": ["a.png", "a.png"], "clip": [0, 1]},
      "'clip' [0, 1] cuts a list of 2 images, which have no seconds",
    ),
    ({"video": ["a.png", "a.png"], "image": "a.png"}, "has both 'image' 'a.png' and 'video'"),
    ({"video": ["../a.png", "a.png"]}, "path '../a.png' leaves the dataset's root"),
  ],
)
def test_lists_that_are_none_are_named(tmp_path, tokenizer, line, message):
  Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
  mixture = mixture_of(tmp_path, tokenizer, [line | {"conversations": turns("<video>\nwhat?", "red")}])
  with pytest.raises(DataError) as caught:
    mixture.decode(0, 0)
  assert message in str(caught.value)
