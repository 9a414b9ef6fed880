"""Lines of annotation files: what people write, what other trainers read, and what goes wrong in both."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.fuzz import odd

ASKED = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a red circle"}]
SHOWN = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}]
FILMED = [{"from": "human", "value": "<video>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}]

GOOD = {"conversations": ASKED}
BASES = (
  GOOD,
  {"id": 7, "image": "a.png", "conversations": SHOWN},
  {"image": "a.png", "width": 40, "height": 24, "conversations": SHOWN},
  {
    "image": ["a.png", "b.jpg"],
    "width_list": [40, 30],
    "height_list": [24, 50],
    "conversations": SHOWN[:1] + SHOWN,
  },
  {
    "image": ["a.png", "b.jpg"],
    "conversations": [{"from": "human", "value": "<image> or <image>?"}, ASKED[1]],
  },
  {"image": "a.png", "conversations": [{"from": "system", "value": "be brief"}, *SHOWN, *ASKED]},
  {"video": "v.gif", "conversations": FILMED},
  {"video": "v.mp4", "clip": [0, 0.2], "conversations": ASKED},
  {"video": "frames", "conversations": FILMED},
)

GOOD_PAIR = {"question": "what is it?", "chosen": "a red circle", "rejected": "no"}
PAIRS = (
  GOOD_PAIR,
  {**GOOD_PAIR, "image": "a.png", "id": "x"},
  {**GOOD_PAIR, "image": ["a.png", "b.jpg"], "question": "<image> or <image>?"},
  {**GOOD_PAIR, "image": "a.png", "question": "<image>\nwhat?", "system": "be brief"},
  {**GOOD_PAIR, "video": "v.mp4", "clip": [0, 0.2]},
  {**GOOD_PAIR, "video": "v.gif", "system_prompt": "be brief"},
)

_OPENAI = [{"role": "user", "content": "<image>what is it?"}, {"role": "assistant", "content": "red"}]
_PARTS = [
  {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
  {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
OTHERS = (
  {"messages": _OPENAI, "images": ["a.png"]},  # ms-swift, LLaMA-Factory
  {"messages": _PARTS},  # OpenAI, TRL
  {"messages": _OPENAI, "images": [{"bytes": None, "path": "a.png"}], "rejected_response": "no"},
  {"query": "<image>what?", "response": "red", "history": [["hi", "yes"]], "images": ["a.png"]},
  {"instruction": "what?", "input": "", "output": "red", "system": "be brief"},
  {"conversations": ASKED, "system": "be brief", "tools": "[]", "images": ["a.png"]},
  {"conversations": SHOWN, "images": ["a.png"], "videos": [], "audios": []},
  {"conversations": {"from": ["human", "gpt"], "value": ["what?", "red"]}},
  {"conversation": [{"user": "what?", "assistant": "red"}]},
  {"prompt": _OPENAI[:1], "chosen": _OPENAI[1:], "rejected": _OPENAI[1:], "images": ["a.png"]},  # TRL
  {"prompt": "what?", "chosen": "red", "rejected": "no"},
  {"conversations": ASKED[:1], "chosen": ASKED[1], "rejected": ASKED[1]},
  {"question": "what?", "answer": "red", "image_path": "a.png"},
)

# Keys that stand in lines or in turns, here or elsewhere.
_LINE_KEYS = (
  "image",
  "images",
  "video",
  "videos",
  "image_path",
  "audio",
  "system",
  "system_prompt",
  "tools",
  "clip",
)
_LINE_KEYS += (
  "width",
  "height",
  "width_list",
  "height_list",
  "id",
  "conversations",
  "messages",
  "weight",
  "loss_mask",
  "task",
)
_TURN_KEYS = (
  "from",
  "value",
  "role",
  "content",
  "loss",
  "weight",
  "train",
  "mask",
  "image",
  "name",
  "tool_calls",
)
_ROLES = ("human", "gpt", "system", "user", "assistant", "tool", "observation", "function_call", "Human", "")
_PATHS = (
  "gone.png",
  "cut.png",
  "text.jpg",
  "empty.png",
  "a.gif",
  "frames",
  "nothing",
  "v.mp4",
  "cut.mp4",
  "./a.png",
  "../a.png",
)


def line_key(rng: np.random.Generator, record: Any) -> Any:
  """Gives a line a key of some trainer, with an odd value."""
  if isinstance(record, dict):
    record[odd.pick(rng, _LINE_KEYS)] = odd.value(rng)
  return record


def turn_key(rng: np.random.Generator, record: Any) -> Any:
  """Gives a turn a key of some trainer, with an odd value, or a value that other trainers know."""
  turns = record.get("conversations") if isinstance(record, dict) else None
  turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
  if turns:
    known = odd.pick(rng, (False, True, 0, 1, 0.5, None))
    odd.pick(rng, turns)[odd.pick(rng, _TURN_KEYS)] = odd.pick(rng, (known, odd.value(rng)))
  return record


def role(rng: np.random.Generator, record: Any) -> Any:
  """Gives a turn another role."""
  found = [(node, key) for node, key in odd.places(record) if key in ("from", "role")]
  if found:
    node, key = odd.pick(rng, found)
    node[key] = odd.pick(rng, _ROLES)
  return record


def path(rng: np.random.Generator, record: Any) -> Any:
  """Names another file, or files."""
  if isinstance(record, dict):
    names = odd.pick(rng, _PATHS)
    record[odd.pick(rng, ("image", "video"))] = odd.pick(rng, (names, [names], ["a.png", names]))
  return record


def clip(rng: np.random.Generator, record: Any) -> Any:
  """Cuts the video at odd times."""
  if isinstance(record, dict):
    record |= {"video": odd.pick(rng, ("v.mp4", "v.gif", "frames")), "clip": [odd.value(rng), odd.value(rng)]}
    record.pop("image", None)
  return record


def sides(rng: np.random.Generator, record: Any) -> Any:
  """States sizes of images in other forms, or such as no image has."""
  if isinstance(record, dict):
    right, none = ([40, 30], [24, 50]), ([0, -1], [1 << 40, 24])
    wide, high = odd.pick(rng, (right, right, none))
    wide, high = odd.pick(rng, ((wide, high), (wide[:1], high[:1]), (wide[0], high[0]), (wide, high[0])))
    record |= (
      {"width": wide, "height": high} if rng.random() < 0.5 else {"width_list": wide, "height_list": high}
    )
  return record


RECORDS = (*odd.RECORDS, *odd.RECORDS, line_key, turn_key, role, path, clip, sides, sides)


def in_utf16(rng: np.random.Generator, content: bytes) -> bytes:
  return content.decode("ascii", "replace").encode(odd.pick(rng, ("utf-16", "utf-16-le", "utf-8-sig")))


def nest(rng: np.random.Generator, content: bytes) -> bytes:
  """Many brackets, or many digits."""
  return odd.pick(
    rng, (b"[" * 100_000, b'{"a":' * 100_000, content[:1] + b'"n":' + b"9" * 5000 + b"," + content[1:])
  )


def twice(rng: np.random.Generator, content: bytes) -> bytes:
  """Keys that stand twice, or two records in a line."""
  return odd.pick(rng, (content + content, content[:-1] + b"," + content[1:]))


TEXTS = (*odd.BYTES, in_utf16, nest, twice)


def make(rng: np.random.Generator, *, pairs: bool) -> tuple[bytes, list[str]]:
  """Returns the bytes of a line without its line break, and what was done to it."""
  mine, other = (PAIRS, BASES) if pairs else (BASES, PAIRS)
  base = odd.pick(rng, odd.pick(rng, (*[mine] * 8, OTHERS, other)))
  if rng.random() < 0.1:
    return odd.dumps(base).encode(), []
  record, done = odd.changed(rng, base, RECORDS, most=int(odd.pick(rng, (1, 1, 3))))
  text = odd.dumps(record).encode()
  if rng.random() < 0.15:
    text, more = odd.changed(rng, text, TEXTS, most=1)
    done += more
  return text.replace(b"\n", b" ") or b"0", done


def write_media(folder: Path) -> None:
  """Writes the files that lines name."""
  rng = np.random.default_rng(0)

  def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

  picture(40, 24).save(folder / "a.png")
  picture(30, 50).save(folder / "b.jpg")
  pictures = [picture(32, 24) for _ in range(6)]
  pictures[0].save(folder / "v.gif", save_all=True, append_images=pictures[1:], duration=50)
  (folder / "frames").mkdir()
  for number, frame in enumerate(pictures[:3]):
    frame.save(folder / "frames" / f"{number}.png")
  with av.open(str(folder / "v.mp4"), "w") as container:
    out = container.add_stream("mpeg4", rate=25)
    out.width, out.height, out.pix_fmt = 32, 24, "yuv420p"
    for frame in pictures:
      container.mux(out.encode(av.VideoFrame.from_image(frame)))
    container.mux(out.encode(None))
  (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:900])
  (folder / "cut.mp4").write_bytes((folder / "v.mp4").read_bytes()[:2000])
  (folder / "text.jpg").write_text("<html>404</html>")
  (folder / "empty.png").write_bytes(b"")
  (folder / "nothing").mkdir()


def write_dataset(folder: Path, lines: list[bytes], **entry: Any) -> Path:
  """Writes an annotation file and its meta file."""
  (folder / "toy.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
  meta = folder / "meta.json"
  meta.write_text(
    json.dumps({"toy": {"root": str(folder), "annotation": str(folder / "toy.jsonl"), **entry}})
  )
  return meta
