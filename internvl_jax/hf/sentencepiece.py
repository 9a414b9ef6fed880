"""Sentencepiece models (tokenizer.model) as fast tokenizers.

    tokenizer.model --read_model--> SentencePieceModel --build_tokenizer--> tokenizers.Tokenizer

Most checkpoints with an InternLM2 or LLaMA language model have no other file, and the code that they bring to
read it is never run here. The ids equal those of sentencepiece itself, which the reference tokenizes with.
"""

import dataclasses
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from internvl_jax.errors import UserError

SPACE = "▁"
"""What sentencepiece writes for a space."""

# Numbers of sentencepiece_model.proto: kinds of models and of pieces.
_BPE = 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
  """What of a tokenizer.model decides about ids.

  Attributes:
    path: the file, for errors.
    pieces: text of each piece, by id.
    scores: score of each piece; of two possible merges that with the higher score comes first.
    kinds: kind of each piece.
    unk: piece of unknown text, or None.
    bos: piece that begins a text, or None.
    eos: piece that ends a text, or None.
    byte_fallback: characters without a piece are written as bytes.
    charsmap: character normalization, compiled; empty for none.
    add_dummy_prefix: a space is put before the text.
    remove_extra_whitespaces: spaces at the ends are dropped, runs of them become one.
  """

  path: Path
  pieces: Sequence[str]
  scores: Sequence[float]
  kinds: Sequence[int]
  unk: str | None
  bos: str | None
  eos: str | None
  byte_fallback: bool
  charsmap: bytes
  add_dummy_prefix: bool
  remove_extra_whitespaces: bool


def read_model(path: str | Path) -> SentencePieceModel:
  """Reads a tokenizer.model.

  The few fields needed are taken from the file by hand: the reader that the sentencepiece package generates
  refuses every protobuf older than the one it was generated with (0.2.3 wants 7.36).

  Raises:
    UserError: not a sentencepiece model, or of a kind that no supported language model uses.
  """
  path = Path(path)
  try:
    model = list(_fields(path.read_bytes()))
    pieces = [dict(_fields(value)) for field, value in model if field == 1]
    trainer = dict(_fields(b"".join(value for field, value in model if field == 2)))
    normalizer = dict(_fields(b"".join(value for field, value in model if field == 3)))
    texts = [piece[1].decode("utf-8") for piece in pieces]
    texts = texts if trainer else []  # It comes last, so a file cut short lacks it.
  except (ValueError, KeyError, TypeError, AttributeError, struct.error):
    texts = []
  if not texts:
    raise UserError(f"{path}: not a sentencepiece model, or a damaged one; download it again") from None
  if trainer.get(3) != _BPE or trainer.get(24) or not normalizer.get(5, True):
    raise UserError(
      f"{path}: only BPE models that write spaces before words are supported; give a tokenizer.json beside it"
    )

  def piece_at(field: int, default: int) -> str | None:
    index = trainer.get(field, default)
    return texts[index] if index < len(texts) else None  # -1 is none, and is written as a huge number

  return SentencePieceModel(
    path=path,
    pieces=texts,
    scores=[struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
    kinds=[piece.get(3, _NORMAL) for piece in pieces],
    unk=piece_at(40, 0),
    bos=piece_at(41, 1),
    eos=piece_at(42, 2),
    byte_fallback=bool(trainer.get(35, False)),
    charsmap=normalizer.get(2, b""),
    add_dummy_prefix=bool(normalizer.get(3, True)),
    remove_extra_whitespaces=bool(normalizer.get(4, True)),
  )


def build_tokenizer(
  model: SentencePieceModel, added: Mapping[int, AddedToken], *, prefix: Literal["each", "first", "never"]
) -> Tokenizer:
  """A tokenizer that gives the ids which sentencepiece gives to the text between added tokens.

  Args:
    model: the model.
    added: tokens that are split off before anything else, by id. At the id of a piece they take its place, as
      InternLM2's <|im_start|> does with a piece kept for such use.
    prefix: where the model puts a space of its own: before each text between added tokens, only before the
      first, if no token is before it, or nowhere.

  Raises:
    UserError: the ids of the added tokens leave a gap, or a token has an id already.
  """
  pieces, kinds = list(model.pieces), list(model.kinds)
  known = {piece: index for index, piece in enumerate(pieces)}
  for index, token in added.items():
    if known.get(token.content, index) != index:
      raise UserError(
        f"{model.path}: {token.content!r} has id {known[token.content]}, but the files beside it say {index}; "
        "take them all from one checkpoint"
      )
    if index < len(pieces):
      pieces[index], kinds[index] = token.content, _CONTROL
  vocabulary = {piece: index for index, piece in enumerate(pieces)}
  tokenizer = Tokenizer(
    BPE(
      vocabulary,
      _merges(vocabulary, model.scores, kinds),
      unk_token=None if model.unk is None else pieces[model.pieces.index(model.unk)],
      fuse_unk=True,
      byte_fallback=model.byte_fallback,
    )
  )
  fixed = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _USER_DEFINED]
  tokenizer.normalizer = _normalizer(model, fixed, prefix)
  if prefix == "first":
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
  strip = [decoders.Strip(" ", 1, 0)] if prefix != "never" else []
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  # Pieces that sentencepiece never splits. It looks for them in the normalized text, and puts no space before
  # the text that follows.
  tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in fixed])
  tokenizer.add_tokens([token for _, token in sorted(added.items())])
  for index, token in added.items():
    if (found := tokenizer.token_to_id(token.content)) != index:
      raise UserError(
        f"{model.path}: {token.content!r} would get id {found}, but the files beside it say {index}; the ids of "
        f"added tokens must go on without a gap from {len(pieces)}"
      )
  return tokenizer


def _merges(
  vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
  """Every way to put a piece together from two others, the highest score first."""
  normal = {piece for piece, index in vocabulary.items() if kinds[index] == _NORMAL}
  ordered = sorted(normal, key=lambda piece: (-scores[vocabulary[piece]], vocabulary[piece]))
  return [
    (piece[:cut], piece[cut:])
    for piece in ordered
    for cut in range(1, len(piece))
    if piece[:cut] in normal and piece[cut:] in normal
  ]


def _normalizer(model: SentencePieceModel, fixed: Sequence[str], prefix: str) -> normalizers.Normalizer:
  steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
  if model.remove_extra_whitespaces:
    # A literal ▁ counts as a space at the end only.
    steps.insert(0, normalizers.Replace(Regex(r"\A +"), ""))
    steps.insert(1, normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
  if model.charsmap:
    steps.insert(0, normalizers.Precompiled(model.charsmap))
  if prefix == "each" and fixed:
    # The library normalizes the fixed pieces too, to look for them; they must not get the space.
    names = "|".join(re.escape(piece.replace(" ", SPACE)) for piece in fixed)
    steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{names})\z)"), SPACE))
  elif prefix == "each":
    steps.append(normalizers.Prepend(SPACE))
  return normalizers.Sequence(steps)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
  """The fields of a protobuf message in order, as numbers (varint) or bytes (all else).

  See protobuf.dev/programming-guides/encoding.
  """
  at = 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      if at >= len(message):
        raise ValueError("ends within a number")
      byte = message[at]
      at += 1
      value |= (byte & 0x7F) << shift
      if byte < 0x80:
        return value
      shift += 7

  while at < len(message):
    key = varint()
    kind = key & 7
    if kind == 0:
      yield key >> 3, varint()
      continue
    if kind not in (1, 2, 5):
      raise ValueError(f"no such wire type: {kind}")
    length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
    if at + length > len(message):
      raise ValueError("ends within a field")
    yield key >> 3, message[at : at + length]
    at += length
