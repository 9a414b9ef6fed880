"""Requests to the file systems of URLs: time-outs, what is tried again, and what is said of what fails."""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import fsspec
import fsspec.config

from internvl_jax.errors import did_you_mean

T = TypeVar("T")

WEB = ("http", "https")
"""Schemes of web servers, whose paths are URLs in the full sense: quoted, with a query and no folders."""

OTHER_FOLDER = "make room, or name another folder: TMPDIR for videos, loader.cache_dir for annotation files"
"""The remedy where there is no space for a copy."""

# Seconds without a byte after which a request has failed.
_TIMEOUT = 30
# How often a request is made, how many seconds lie between the first two (then twice as many each time), and after how
# many seconds none is made any more: some packages try again by themselves, each time for a minute.
_TRIES = 5
_FIRST_WAIT = 0.5
_PATIENCE = 120

_PACKAGES = {
  "gs": "gcsfs",
  "gcs": "gcsfs",
  "s3": "s3fs",
  "s3a": "s3fs",
  "http": "aiohttp",
  "https": "aiohttp",
}
_KNOWN = ("gs", "hf", "http", "https", "s3")

# Errors that may pass, by package and class: the packages are not imported to ask.
_PASSING = {
  ("aiohttp", "ClientConnectionError"),
  ("aiohttp", "ClientPayloadError"),
  ("botocore", "ConnectionError"),
  ("botocore", "HTTPClientError"),
  ("gcsfs", "ChecksumError"),
  ("google", "TransportError"),
  ("requests", "ConnectionError"),
  ("requests", "Timeout"),
}
# What s3fs makes of 503 and 500; only Linux has a number of its own for the second.
_PASSING_ERRNO = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO)}
_PASSING_STATUS = {408, 425, 429}

# Packages whose errors are a store's, and what TensorStore's errors hold.
_STORES = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "s3fs"}
_TENSORSTORE = re.compile(
  r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b"
  r"|\[http_response_code='(?P<code>\d+)'\]"
)
_DENIED = "check the credentials, and who may read and write there"
# gcsfs would ask for the kind of a bucket before every request as long as it gets no answer, which needs a permission of
# its own, and warn of it each time. Buckets of the zonal kind need it: who has one sets this to "true".
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# These tell where they found credentials and where they found none, and every error with its traceback before it is raised.
for _logger, _level in (
  ("aiobotocore", logging.WARNING),
  ("botocore", logging.WARNING),
  ("fsspec", logging.WARNING),
  ("gcsfs", logging.CRITICAL),
  ("google.auth", logging.ERROR),
):
  logging.getLogger(_logger).setLevel(_level)

# One a process for each scheme: each has connections of its own.
_systems: dict[Any, Any] = {}
_random = random.Random()


class FetchError(OSError):
  """A remote file cannot be read; the message has the cause and what to do, and follows the file's name.

  Attributes:
    may_pass: it was tried several times, and may succeed later.
  """

  def __init__(self, message: str, *, may_pass: bool = False):
    super().__init__(message)
    self.may_pass = may_pass


def scheme(path: str) -> str:
  """Returns the scheme of a URL in lower case; "" for a local path."""
  found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
  return found[1].lower() if found else ""


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL (gs://, s3://, https://, ...), and so not a file of this machine."""
  return scheme(os.fspath(path)) != ""


def ask(url: str, request: Callable[[Any], T]) -> T:
  """Returns what a request to the URL's file system returns, made again where what went wrong may pass.

  Args:
    url: of the file, for errors too.
    request: called with the file system (fsspec's `AbstractFileSystem`).

  Raises:
    FileNotFoundError: there is no such file.
    FetchError: it cannot be had.
  """
  system = file_system(url)
  start, wait, tries = time.monotonic(), _FIRST_WAIT, 0
  while True:
    tries += 1
    try:
      return request(system)
    except Exception as raised:  # Packages raise errors of any type; all of them are reported.
      error = _behind(raised)
      if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from raised
      spent = time.monotonic() - start
      if not _passes(error):
        raise FetchError(_explain(error)) from raised
      if tries >= _TRIES or spent + wait > _PATIENCE:
        what = f"{_reason(error)}, {tries} tries in {spent:.0f} s"
        raise FetchError(
          f"{what}; try again later, or copy the data to a local disk", may_pass=True
        ) from raised
    # Workers that failed together do not come back together.
    time.sleep(wait * _random.uniform(0.75, 1.25))
    wait *= 2


def file_system(url: str) -> Any:
  """Returns the file system of a URL, created if this process has none for its scheme; no file is accessed.

  Raises:
    FetchError: its package is not installed, or does not know the way.
  """
  name = scheme(url)
  try:
    kind = fsspec.get_filesystem_class(name)
  except ImportError as error:
    package = _PACKAGES.get(name)
    remedy = f"pip install {package}" if package else str(error)
    cause = str(error.__cause__ or error)
    raise FetchError(f"{name}:// needs a package that is not installed ({cause}): {remedy}") from error
  except ValueError as error:
    raise FetchError(f"unknown scheme {name!r}{did_you_mean(name, _KNOWN)}") from error
  try:
    told = kind._get_kwargs_from_urls(url)  # A host or an account, where file systems are many.
    told.pop("version_aware", None)  # gcsfs: the folder "frames #1" would be the version 1 of "frames ".
  except ValueError as error:  # of half a bracket, say
    raise FetchError(f"not a URL: {error}; correct it") from error
  key = (os.getpid(), name, repr(sorted(told.items())))
  if key not in _systems:
    try:
      # Two threads may both make one here; the one that is not kept has no connection yet.
      _systems.setdefault(key, kind(**_options(kind, name), **told))
    except Exception as error:
      raise FetchError(_explain(error)) from error
  return _systems[key]


def _options(kind: Any, name: str) -> dict[str, Any]:
  # fsspec would keep a file system for each thread, and remember listings for ever.
  options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
  if name in WEB:
    options["get_client"] = _web_client
  if name in ("gs", "gcs"):
    options["requests_timeout"] = _web_timeout()  # gcsfs has none of its own
  if name in ("s3", "s3a"):
    options["max_concurrency"] = 1  # with more, s3fs asks for a file's size before it gets it
  for protocol in (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol:
    options |= fsspec.config.conf.get(protocol, {})  # the user's settings override ours
  return options


def _web_timeout() -> Any:
  import aiohttp

  # No limit on the whole: a large file takes its time.
  return aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)


async def _web_client(*, headers: Any = None, **options: Any) -> Any:
  """Returns the session of a web file system; options are the user's `client_kwargs`."""
  import aiohttp

  # Compressed answers would have other sizes than the files. Proxies are those of the environment.
  headers = {"Accept-Encoding": "identity", **(headers or {})}
  return aiohttp.ClientSession(
    **{"timeout": _web_timeout(), "trust_env": True, "headers": headers, **options}
  )


def reason(error: BaseException) -> str | None:
  """Returns why a store refused and what to do; None where an error is of something else.

  For errors of libraries that speak to stores by themselves: Orbax and TensorStore, beside those of fsspec.
  """
  seen: set[int] = set()
  found: BaseException | None = error
  while found is not None and id(found) not in seen:
    seen.add(id(found))
    if isinstance(found, FetchError):
      return str(found)
    if isinstance(found, Exception) and (isinstance(found, OSError) or _packages(found) & _STORES):
      return _explain(_behind(found))
    if _TENSORSTORE.search(str(found)):
      return _explain_tensorstore(str(found))
    found = found.__cause__ or found.__context__
  return None


def _explain_tensorstore(text: str) -> str:
  """Returns the cause and the remedy of an error of TensorStore's, which has made requests again where that may help."""
  codes = [int(found["code"]) for found in _TENSORSTORE.finditer(text) if found["code"]]
  reason = " ".join(
    re.sub(
      r"\s*\[(http_response_\w+|tensorstore_spec|source locations?)=.*", "", text, flags=re.DOTALL
    ).split()
  )[:300]
  if 404 in codes:
    return f"{reason}; is the bucket there?"
  if set(codes) & {400, 401, 403} or re.search("PERMISSION_DENIED|UNAUTHENTICATED", text):
    return f"{reason}; {_DENIED}"
  return f"{reason}; try again later, and check the network"


# --- Errors -------------------------------------------------------------------------------------------------


def _behind(error: Exception) -> Exception:
  """Returns what is behind an error.

  fsspec calls whatever goes wrong on the web a missing file, and says nothing of an answer that does not come.
  """
  cause = error.__cause__
  hidden = isinstance(error, FileNotFoundError) and (_passes(cause) or "aiohttp" in dict(_kinds(cause)))
  if hidden or (isinstance(error, TimeoutError) and cause is not None):
    error = cast(Exception, cause)
  return FileNotFoundError() if _code(error) in (404, 410) else error


def _passes(error: BaseException | None) -> bool:
  """Whether a request that failed with this error may succeed if it is repeated."""
  kinds = _kinds(error)
  if ("aiohttp", "ClientSSLError") in kinds:
    return False
  code = _code(error) or 0
  known = isinstance(error, ConnectionError | TimeoutError) or bool(kinds & _PASSING)
  return known or code in _PASSING_STATUS or code >= 500 or getattr(error, "errno", None) in _PASSING_ERRNO


def _packages(error: BaseException) -> set[str]:
  return {package for package, _ in _kinds(error)}


def _kinds(error: BaseException | None) -> set[tuple[str, str]]:
  """Returns package and name of an error's class and of those above it."""
  return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}


def _code(error: BaseException | None) -> int | None:
  """Returns the HTTP status of an error of aiohttp or gcsfs."""
  for attribute in ("status", "code"):
    code = str(getattr(error, attribute, ""))
    if re.fullmatch(r"[1-5]\d\d", code):
      return int(code)
  return None


def _reason(error: Exception) -> str:
  """Returns an error's message, with its type where the message is short."""
  text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
  if (code := _code(error)) is not None:
    return f"{code} {getattr(error, 'message', text)}"
  return f"no answer in time ({text})" if isinstance(error, TimeoutError) else text


def _explain(error: Exception) -> str:
  """Returns the cause and the remedy of an error that a retry would not fix."""
  reason = _reason(error)
  # gcsfs raises Forbidden without a type or a status.
  if isinstance(error, PermissionError) or _code(error) in (401, 403) or str(error).startswith("Forbidden"):
    return f"permission denied ({reason}); {_DENIED}"
  if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
    return f"{reason}; {OTHER_FOLDER}"
  return f"{reason}; check the address and the credentials"
