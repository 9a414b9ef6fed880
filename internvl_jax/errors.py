"""What the user got wrong, apart from what we did; and what no message may repeat."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

# `user:password@` or `token@` of a URL. A password may have an unescaped `@`, and in the second form a `/`, too; what
# follows a host's colon as digits is a port. Cut off before its `@`, as long values are in messages, it is one still.
_USER = re.compile(
  r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)
  (?: [^\s/?\#"<>]*:[^\s/?\#"<>]*@
    | (?<=http://)[^\s/?\#"<>]+@
    | (?<=https://)[^\s/?\#"<>]+@
    | [^\s/?\#:@"\[<>]+:(?!\d{1,5}(?![^\s/?\#'"),;:\]}]))[^\s@"<>]*@
    | [^\s/?\#:@"\[<>]+:(?!\d{1,5}(?![^\s/?\#'"),;:\]}]))[^\s/?\#@"<>]+ )""",
  re.IGNORECASE | re.VERBOSE,
)
# Parts of a query or fragment that let who has the URL in: signatures of S3, GCS and Azure, tokens, keys.
_QUERY = re.compile(
  r"""(?P<name>(?:[?&;\#]|%3f|%26|%23)
  (?: [\w.-]*(?:token|signature|secret|passw|passphrase|pwd|credential|auth|api[_-]?key|access[_-]?key|hmac|jwt
        |session|security)[\w.-]*
    | sig|key|pass|policy|code )
  (?:=|%3d))
  [^\s&\#"'<>]+""",
  re.IGNORECASE | re.VERBOSE,
)


_called: dict[str, str] = {}


def call(path: str, name: str) -> None:
  """Lets messages name a folder by what the user named: the URL of which it is a copy."""
  _called[path] = name


def redacted(text: str) -> str:
  """Masks passwords, tokens and signatures of the URLs in a text; the rest, hosts and paths, stays.

  >>> redacted("https://me:secret@host/a.png?token=abc&size=3")
  'https://***@host/a.png?token=***&size=3'

  Folders have the names that `call` gave them.
  """
  for path, name in _called.items():
    text = text.replace(path, name)
  if "://" in text:
    text = _USER.sub(lambda found: found["scheme"] + ("***@" if found[0].endswith("@") else "***"), text)
  # Of a relative path, which a URL is the root of, the query alone may be quoted.
  return _QUERY.sub(r"\g<name>***", text)


def redacted_json(value: Any) -> Any:
  """Returns a JSON value with all of its texts `redacted`, for what is kept on disk."""
  if isinstance(value, str):
    return redacted(value)
  if isinstance(value, dict):
    return {key: redacted_json(entry) for key, entry in value.items()}
  return [redacted_json(entry) for entry in value] if isinstance(value, list | tuple) else value


class UserError(ValueError):
  """A mistake in a recipe, an argument, a data file or a checkpoint.

  Its message is all that the user sees, without a traceback: one line for each problem, saying what is wrong,
  with which values, and what to do about it. A bug of ours is any other exception and keeps its traceback. Secrets of
  URLs in it are masked.

  Attributes:
    everywhere: all processes of a run raise it, at the same time.
  """

  everywhere = False

  def __init__(self, *args: Any):
    super().__init__(*(redacted(arg) if isinstance(arg, str) else arg for arg in args))


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest of the known names, else the list of them."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def suggest(name: str, known: Iterable[str]) -> str:
  """A message's tail that names the closest known name, or nothing if none is close."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
  return f"; did you mean {close[0]}?" if close else ""
