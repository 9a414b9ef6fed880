"""A conversation at a terminal, or by lines that are piped in."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from internvl_jax.answering.model import Chat
from internvl_jax.errors import UserError

HELP = """\
/image PATH    show an image with the next question; again for another
/video PATH    show a video
/clear         forget what was said
/exit          end, as Ctrl-D does
"""


def talk(chat: Chat, lines: Iterator[str], out: TextIO) -> None:
  """Answers line by line, each token as it comes, until the lines end or one is /exit.

  Args:
    chat: the conversation.
    lines: what is typed: questions, and the commands of `HELP`.
    out: where answers go.
  """
  images: list[str] = []
  videos: list[str] = []

  def clear(_: str) -> None:
    chat.clear()
    images.clear()
    videos.clear()

  commands: dict[str, Callable[[str], object]] = {
    "/image": images.append,
    "/video": videos.append,
    "/clear": clear,
    "/help": lambda _: _say(HELP.rstrip()),
  }
  for line in lines:
    command, _, rest = line.strip().partition(" ")
    if command == "/exit":
      return
    if command in commands:
      if command in ("/image", "/video") and not rest.strip():
        _say(f"{command} needs a path")
        continue
      commands[command](rest.strip())
    elif command.startswith("/") and command[1:].isalpha():
      _say(f"{command}: no such command\n{HELP.rstrip()}")
    elif command:
      _answer(chat, line.strip(), images, videos, out)


def _answer(chat: Chat, question: str, images: list[str], videos: list[str], out: TextIO) -> None:
  """Asks a question with the images and videos that wait for one, which are then gone, also where they cannot be read."""
  shown = {"images": tuple(images), "videos": tuple(videos)}
  images.clear()
  videos.clear()
  try:
    for part in chat.stream(question, **shown):
      out.write(part)
      out.flush()
  except UserError as error:
    _say(str(error))
    return
  out.write("\n")
  out.flush()


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def typed_lines(prompt: str = "> ") -> Iterator[str]:
  """The lines of the standard input; at a terminal with a prompt, and with the keys that edit and repeat lines."""
  if not sys.stdin.isatty():
    yield from sys.stdin
    return
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (gives `input` its keys)
  while True:
    try:
      yield input(prompt)
    except EOFError:
      print(file=sys.stderr)
      return
