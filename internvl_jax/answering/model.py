"""A checkpoint that is asked: single questions, batches, streams and conversations."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
from absl import logging

from internvl_jax.answering.prompts import ImageLike, Prompter, Question, VideoLike
from internvl_jax.errors import UserError
from internvl_jax.eval.compression import AUTO, read_rule
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.routing import make_router
from internvl_jax.eval.sampling import Sampling, make_decoder
from internvl_jax.inference import Inference

# Of checkpoints that say little about the length of answers, and of those that say too much.
_LONGEST, _USUAL_LONGEST = 2048, 128

_CUT = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character that is not complete are decoded as."""


class Settings(TypedDict, total=False):
  """How questions are answered, as keywords; all may be left out.

  Attributes:
    max_new_tokens: the longest answer; by default what generation_config.json says, at most 2048, or 128 where it says
      nothing.
    temperature: what logits are divided by before a token is drawn; 0, the default, takes the likeliest token.
    top_k: only so many of the likeliest tokens are drawn from; 0: all.
    top_p: only the fewest likeliest tokens whose probabilities sum to this are drawn from; 1: all.
    repetition_penalty: of tokens that the answer has; 1: none.
    seed: of the draws.
    max_tiles: of each image at most, its thumbnail not counted; by default as in training.
    frames: of each video; by default what training takes at most.
    compress: which tiles an InternVL3.5-Flash gives a quarter of the tokens: "auto" by its config.json's thresholds, "all",
      "none", or the relative and the absolute threshold, "0.3,0.5".
  """

  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  repetition_penalty: float
  seed: int
  max_tiles: int
  frames: int
  compress: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
  """`Settings`, checked."""

  sampling: Sampling
  max_new_tokens: int | None = None
  max_tiles: int | None = None
  frames: int | None = None
  compress: str = AUTO

  @classmethod
  def of(cls, settings: Settings) -> "How":
    fields = {field.name for field in dataclasses.fields(Sampling)}
    if unknown := settings.keys() - Settings.__annotations__.keys():
      known = ", ".join(Settings.__annotations__)
      raise UserError(f"{', '.join(sorted(unknown))}: no such setting of answers; there are {known}")
    sampling = Sampling(**{name: value for name, value in settings.items() if name in fields})  # pyright: ignore[reportArgumentType]
    others = {name: value for name, value in settings.items() if name not in fields}
    read_rule(settings.get("compress", AUTO))
    for name, value in others.items():
      if name != "compress" and (not isinstance(value, int) or value < 1):
        raise UserError(f"{name}={value}: must be a whole number from 1")
    return cls(sampling=sampling, **others)  # pyright: ignore[reportArgumentType]


class Model:
  """A checkpoint that answers questions; `internvl_jax.open_model` opens one."""

  def __init__(self, opened: Inference):
    """A model of an opened checkpoint."""
    self._opened = opened

  def answer(
    self,
    question: str | Question,
    *,
    images: Sequence[ImageLike] = (),
    videos: Sequence[VideoLike] = (),
    system: str | None = None,
    **settings: Unpack[Settings],
  ) -> str:
    """The answer to a question.

    Args:
      question: what is asked; `Question` says where its images and videos go. A whole `Question` has its own.
      images: paths, URLs, bytes, Pillow images or uint8 arrays [height, width, 3].
      videos: paths, URLs, bytes, folders of frames or lists of frames' paths.
      system: the system message; None: the checkpoint's.
      **settings: see `Settings`.

    Raises:
      UserError: an image or video cannot be read, or a setting cannot be.
    """
    return self.answers([_question(question, images, videos, system)], batch_size=1, **settings)[0]

  def answers(
    self, questions: Sequence[str | Question], *, batch_size: int = 8, **settings: Unpack[Settings]
  ) -> list[str]:
    """The answers to questions, which are asked in batches, each alone.

    Args:
      questions: what is asked.
      batch_size: questions at once.
      **settings: see `Settings`.

    Raises:
      UserError: as in `answer`.
    """
    how = How.of(settings)
    prompter, decoder = self.prompter(how.max_tiles, how.frames), self.decoder(how, batch_size)
    asked = list(enumerate(map(_question, questions)))
    answers = []
    # The tiles of all questions together might not fit the memory.
    for start in range(0, len(asked), batch_size):
      group = asked[start : start + batch_size]
      answers += self.decode([prompter.prompt(one, number=number) for number, one in group], decoder)
    return answers

  def stream(
    self,
    question: str | Question,
    *,
    images: Sequence[ImageLike] = (),
    videos: Sequence[VideoLike] = (),
    system: str | None = None,
    **settings: Unpack[Settings],
  ) -> Iterator[str]:
    """The answer to a question in parts, as they are decoded; end to end, they are what `answer` returns.

    Raises:
      UserError: as in `answer`.
    """
    how = How.of(settings)
    prompt = self.prompter(how.max_tiles, how.frames).prompt(_question(question, images, videos, system))
    decoder = self.decoder(how, 1)
    ids, told = np.zeros(0, np.int32), ""
    for new in decoder.stream(self._opened.params, prompt):
      ids = np.concatenate([ids, new])
      text = self._text_so_far(ids)
      if text.startswith(told) and text != told:
        yield text[len(told) :]
        told = text
    self._tell_ends(decoder, [ids])
    if rest := self._text(ids)[len(told) :]:
      yield rest

  def chat(self, *, system: str | None = None, **settings: Unpack[Settings]) -> "Chat":
    """A conversation, with a system message and `Settings` of its own."""
    return Chat(self, system, settings)

  def prompter(self, max_tiles: int | None = None, frames: int | None = None) -> Prompter:
    """What makes prompts of questions."""
    return Prompter(opened=self._opened, max_tiles=max_tiles, frames=frames)

  def decoder(self, how: How, batch_size: int) -> GreedyDecoder:
    """What answers prompts."""
    opened = self._opened
    forward: dict[str, Any] = {
      "model": opened.source.model,
      "how": opened.how,
      "normalize_type": opened.data.normalize_type,
      "image_token_id": opened.tokenizer.image_token_id,
    }
    return make_decoder(
      how.sampling,
      opened.source.config.text.vocab_size,
      **forward,
      router=make_router(opened.source.config, how.compress, **forward),
      stop_ids=opened.stop_ids,
      max_new_tokens=how.max_new_tokens or min(opened.max_new_tokens or _USUAL_LONGEST, _LONGEST),
      batch_size=batch_size,
    )

  def decode(self, prompts: Sequence[Prompt], decoder: GreedyDecoder) -> list[str]:
    """The answers to prompts; says which have ended unusually, and how many tiles were compressed."""
    found = decoder(self._opened.params, prompts)
    self._tell_ends(decoder, found)
    return [self._text(ids) for ids in found]

  def _tell_ends(self, decoder: GreedyDecoder, answers: Sequence[np.ndarray]) -> None:
    for line in decoder.unusual_ends(answers):
      logging.warning("%s", line)
    if decoder.router and (counts := decoder.router.take_counts()):
      logging.info("%s", counts.line())

  def _text(self, ids: np.ndarray) -> str:
    return self._opened.tokenizer.decode_answer(ids).strip()

  def _text_so_far(self, ids: np.ndarray) -> str:
    """What is sure of the text of an answer that goes on."""
    text, opening = self._text(ids), self._opened.tokenizer.template.answer_opening
    if opening and (text in opening or opening.startswith(text)):
      return ""
    return text.rstrip(_CUT).rstrip()


def _question(
  question: str | Question,
  images: Sequence[ImageLike] = (),
  videos: Sequence[VideoLike] = (),
  system: str | None = None,
) -> Question:
  if isinstance(question, str):
    return Question(question, images, videos, system=system)
  if len(images) or len(videos) or system is not None:
    raise UserError("a Question has its own images, videos and system message; give them to it")
  return question


class Chat:
  """A conversation with a model: each question is asked with all that was said before, as the reference's `chat` does.

  Attributes:
    history: the questions so far, each with its answer.
  """

  def __init__(self, model: Model, system: str | None, settings: Settings):
    """A conversation without a word yet."""
    self._model, self._system, self._settings = model, system, settings
    self.history: list[tuple[Question, str]] = []

  def ask(self, question: str, *, images: Sequence[ImageLike] = (), videos: Sequence[VideoLike] = ()) -> str:
    """The answer to the next question.

    Raises:
      UserError: as in `Model.answer`; the question is then not a part of the conversation.
    """
    return "".join(self.stream(question, images=images, videos=videos))

  def stream(
    self, question: str, *, images: Sequence[ImageLike] = (), videos: Sequence[VideoLike] = ()
  ) -> Iterator[str]:
    """The answer to the next question in parts, as they are decoded.

    Raises:
      UserError: as in `Model.answer`; the question is then not a part of the conversation.
    """
    asked = Question(question, tuple(images), tuple(videos))
    told = ""
    whole = dataclasses.replace(asked, history=tuple(self.history), system=self._system)
    for part in self._model.stream(whole, **self._settings):
      told += part
      yield part
    self.history.append((asked, told))

  def clear(self) -> None:
    """Forgets the conversation."""
    self.history.clear()
