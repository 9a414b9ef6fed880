"""Divides English texts into words by the rules of the Penn Treebank, as COCO's evaluation of captions does.

COCO's code starts Stanford's tokenizer (CoreNLP 3.4.1, in Java), makes its words lower case and drops punctuation. These are
its rules as far as captions need them: clitics (`dog's` is `dog 's`, `can't` is `ca n't`), numbers, abbreviations, marks.
"""

import re

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Words that are punctuation."""

_ABBREVIATIONS = """
  mr mrs ms dr prof st ave blvd rd inc ltd co corp jr sr vs etc gen gov sen rep capt col lt sgt maj adm rev hon pres
  jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mt ft dept est bros fig
"""

# Fused words, which are divided after so many letters.
_FUSED = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3, "'tis": 2, "'twas": 2}

_WRITTEN = {
  "(": "-lrb-",
  ")": "-rrb-",
  "[": "-lsb-",
  "]": "-rsb-",
  "{": "-lcb-",
  "}": "-rcb-",
  "½": "1/2",
  "¼": "1/4",
  "¾": "3/4",
  "€": "$",
  "£": "#",
  "¢": "cents",
  "—": "--",
  "–": "--",
  "…": "...",
}
"""Marks that are written otherwise."""

_STRAIGHT = str.maketrans("’‘“”«»", '\'\'""""')

_SIMPLE = r"(?:[^\W_]|[\u0300-\u036f])+"
_CLITIC = r"'(?:s|m|d|ll|re|ve)(?!\w)"

# A word before n't, and n't: no other division is looked for.
_NEGATED = re.compile(r"[^\W\d_]+(?=n't(?!\w))|n't(?!\w)", re.IGNORECASE)

# What may begin at a place of a text; the longest is taken, of equally long ones the first.
_KINDS = tuple(
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    r"</?[a-z]\w*(?:\s[^<>]*)?/?>",
    r"https?://[^\s<>\"]*[^\s<>\".,;:!?)]|www\.[^\s<>\"]*[^\s<>\".,;:!?)]|[\w.-]+\.(?:com|org|net|edu|gov)(?!\w)",
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    r"[#@][a-z]\w*",
    r"(?:[a-z]\.)+(?!\w)|(?:[a-z]\.){2,}",
    rf"(?:{'|'.join(_ABBREVIATIONS.split())})\.(?!\w)|no\.(?=\s*\d)",
    r"\d+[ ]\d+/\d+|[-+]?(?:\d*(?:[.,:]\d+)+|\d+)|\d+/\d+",
    _CLITIC,
    r"'n'?(?!\w)|'\d\d(?:s(?!\w)|(?=\s))|'t(?:is|was)(?!\w)|y'(?=all)|ma'am",
    # Hyphens and strokes within a word.
    rf"(?:[dol]')?{_SIMPLE}(?:[-/_]{_SIMPLE})*",
    r"(?-i:[A-Z]+(?:&[A-Z]+)+)",
    r"\.{2,}|-{2,}|[!?]+|\*+|_+|>+|\#+",
    # Stanford's tokenizer passes over characters beyond these, such as emojis.
    r"[^\s\U00010000-\U0010ffff]",
  )
)


def words(text: str) -> list[str]:
  """The words of a text in lower case, without punctuation.

  >>> words("A dog's ball isn't here, e.g. 3.5%.")
  ['a', 'dog', "'s", 'ball', 'is', "n't", 'here', 'e.g.', '3.5', '%']
  """
  found, place, text = [], 0, text.translate(_STRAIGHT)
  while place < len(text):
    token = _NEGATED.match(text, place) or max((kind.match(text, place) for kind in _KINDS), key=_length)
    if token is None:  # White space, or what is passed over.
      place += 1
      continue
    place = token.end()
    found += _written(token[0].lower())
  return [word for word in found if word not in DROPPED]


def _length(token: re.Match[str] | None) -> int:
  return token.end() - token.start() if token else 0


def _written(word: str) -> list[str]:
  """A token as it is written: fused words are divided, brackets and signs have names."""
  if cut := _FUSED.get(word):
    return [word[:cut], word[cut:]]
  if word in ('"', "...") or set(word) == {"."}:
    return []
  return [_WRITTEN.get(word, word).replace(" ", "\xa0")]
