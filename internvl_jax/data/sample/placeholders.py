"""Placeholders of a line's images and frames in its turns: `<image>` and `<video>`."""

from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.data.sample import line_media
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER, human_texts, with_placeholder
from internvl_jax.data.where import Where

VIDEO_PLACEHOLDER = "<video>"


def with_places(
  conversations: Any, record: dict[str, Any], num_images: int, where: Where, frame_name: str
) -> Any:
  """Adds a place for every image or frame to a line's turns, where the line may leave it out.

  Args:
    conversations: the turns; left as they are.
    record: the line, for its video.
    num_images: images or frames that it has.
    where: the line, for errors.
    frame_name: the text before a frame's number.

  Raises:
    DataError: there are more places than videos.
  """
  if not isinstance(conversations, list):
    return conversations  # The tokenizer says what is wrong about it.
  if line_media.video_of(record, where):
    return with_frames(conversations, num_images, where, frame_name)
  if count := _videos_in(conversations):
    raise where.error(
      f"{count} {VIDEO_PLACEHOLDER} in the human turns but no video; name one in 'video', or take {VIDEO_PLACEHOLDER} out"
    )
  return with_placeholder(conversations) if num_images == 1 else conversations


def _videos_in(conversations: list[Any]) -> int:
  """How often the human turns say `<video>`."""
  return sum(
    turn["value"].count(VIDEO_PLACEHOLDER)
    for turn in conversations
    if isinstance(turn, dict) and turn.get("from") == "human" and isinstance(turn.get("value"), str)
  )


def with_frames(
  conversations: Sequence[Mapping[str, str]], num_frames: int, where: Where, frame_name: str = "Frame-"
) -> list[Mapping[str, str]]:
  r"""Writes a line for each frame into the turns, where the first human one with `<video>` has it.

  Where none has it, it is put with a line break before the first human turn, as `with_placeholder` does.

      human "<video>\nWho?" with 2 frames -> human "Frame-1: <image>\nFrame-2: <image>\nWho?"

  Args:
    conversations: the turns; left as they are.
    num_frames: of the video.
    where: the line, for errors.
    frame_name: the text before a frame's number.

  Raises:
    DataError: the human turns have more than one `<video>`, or an `<image>`.
  """
  turns = list(conversations)
  human = human_texts(turns)
  if not human:
    raise where.error(
      f"the line has a video but no human turn with a text where {VIDEO_PLACEHOLDER} could stand; add one"
    )
  videos, stills = (
    sum(text.count(mark) for text in human.values()) for mark in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
  )
  if videos > 1 or stills:
    raise where.error(
      f"{videos} {VIDEO_PLACEHOLDER} and {stills} {IMAGE_PLACEHOLDER} in the human turns but 1 video and no image; "
      f"write {VIDEO_PLACEHOLDER} once or leave it out"
    )
  place = next((i for i, text in human.items() if VIDEO_PLACEHOLDER in text), min(human))
  text = human[place] if videos else f"{VIDEO_PLACEHOLDER}\n{human[place]}"
  frames = "\n".join(f"{frame_name}{number}: {IMAGE_PLACEHOLDER}" for number in range(1, num_frames + 1))
  turns[place] = {**turns[place], "value": text.replace(VIDEO_PLACEHOLDER, frames)}
  return turns
