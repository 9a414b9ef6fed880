"""Checkpoints named by their id on the Hugging Face hub or by their URL in a bucket, as folders of this machine."""

import os
import re
from pathlib import Path

from internvl_jax.errors import UserError
from internvl_jax.hf.files import JSON_BYTES, PICKLED, PICKLES
from internvl_jax.storage import remote
from internvl_jax.storage.paths import SCHEMES, BucketPath, is_bucket
from internvl_jax.storage.snapshots import snapshot

_NAME = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?P<id>{_NAME}/{_NAME})(?:@(?P<revision>[\w./-]+))?", re.ASCII)

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Config, weights, tokenizer; Python files only so that an export can carry them on, they are never run."""

_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
_LARGE = ("*.safetensors", *(f"*{suffix}" for suffix in PICKLED))
"""What is copied from a bucket, and what is read there by ranges; pickles are only listed."""

_PICKLE_BYTES = 2**30
"""Largest pickle that is copied: the projector of the largest model has 350 MB."""

_LOCAL_REMEDY = "download it elsewhere and give its folder"


def is_hub_id(name: str) -> bool:
  """Whether a name has the form of a hub id, `org/name` or `org/name@revision`; looks nothing up."""
  found = _HUB_ID.fullmatch(name)
  return found is not None and not re.search(r"--|\.\.|\.git$", found["id"])


def is_elsewhere(name: str) -> bool:
  """Whether a name has the form of a hub id or of a bucket's URL; looks nothing up."""
  return is_bucket(name) or is_hub_id(name)


def unread_url(name: str) -> str | None:
  """Why a URL names no checkpoint, whatever is there; None if it is a bucket's, or no URL."""
  scheme = remote.scheme(name)
  if scheme in SCHEMES and not re.match(r"\w+://[^/\s]+(/|$)", name):
    return f"{name!r}: names no bucket; write {scheme}://bucket/folder"
  if not scheme or scheme in SCHEMES:
    return None
  return (
    f"{name!r}: no checkpoint is read from {scheme}://; give a folder, a hub id (org/name), or the URL of a bucket "
    f"({', '.join(f'{known}://' for known in SCHEMES)})"
  )


def local_folder(name: str, *, with_weights: bool = True) -> Path:
  """The folder of a checkpoint.

  Args:
    name: a folder, taken as it is; or the URL of one in a bucket, of which small files are brought and weights are
      pointers (see `snapshots`); or a hub id, `org/name` or `org/name@revision`. Its files are fetched to the hub's
      cache (HF_HOME sets where) unless they are there.
    with_weights: False does not fetch the weights.

  Raises:
    UserError: no such folder, and not a hub id or one that cannot be fetched.
  """
  if problem := unread_url(name):
    raise UserError(problem)
  if is_bucket(name):
    folder = _of_bucket(BucketPath(name))
    if folder.is_file():
      raise UserError(f"{name!r}: is a file; give the folder that it is in")
    return folder
  if os.path.isdir(name):
    return Path(name)
  if not is_hub_id(name):
    raise UserError(f"{name!r}: no such folder; give a checkpoint's folder or its hub id, org/name")
  # Imported here: who only asks `is_hub_id` should not wait for an HTTP client.
  import huggingface_hub
  from huggingface_hub import errors

  found = _HUB_ID.fullmatch(name)
  assert found is not None
  try:
    # Folders are left out: they hold the weights once more, in the forms of other programs.
    ignored = ["*/*"] if with_weights else ["*/*", "*.safetensors"]
    folder = huggingface_hub.snapshot_download(
      found["id"], revision=found["revision"], allow_patterns=list(_WANTED), ignore_patterns=ignored
    )
  except errors.GatedRepoError:
    raise UserError(
      f"{name!r}: access to this model must be granted; ask for it on the model's page, then log in by "
      f"`hf auth login`, or {_LOCAL_REMEDY}"
    ) from None
  except errors.RevisionNotFoundError:
    raise UserError(f"{name!r}: the model has no revision {found['revision']!r}; name another") from None
  except errors.RepositoryNotFoundError:
    raise UserError(
      f"{name!r}: no such folder, and no such model on the hub; correct the name, or log in by `hf auth login` if "
      "the model is private"
    ) from None
  except errors.LocalEntryNotFoundError as error:
    raise UserError(
      f"{name!r}: no such folder, the hub's cache lacks it or a part of it, and the hub cannot be reached "
      f"({_first_line(error)}); {_LOCAL_REMEDY}, or set HF_HOME to a cache that holds it"
    ) from None
  # HTTPError is the HTTP client's own: a broken connection is no error of the hub, nor an OSError.
  except (errors.HTTPError, OSError) as error:
    raise UserError(
      f"{name!r}: could not be fetched from the hub ({_first_line(error)}); try again, or {_LOCAL_REMEDY}"
    ) from None
  return Path(folder)


def local_weights(name: str) -> Path:
  """The folder or file of weights without a config: a path, or a URL of a bucket, of which a pickle is copied whole.

  Raises:
    UserError: it is a URL, and nothing is there.
  """
  if problem := unread_url(name):
    raise UserError(problem)
  return _of_bucket(BucketPath(name)) if is_bucket(name) else Path(name)


def _of_bucket(url: BucketPath) -> Path:
  if url.suffix in PICKLES:
    return snapshot(url, brought=("*",), pointed=(), most_bytes=_PICKLE_BYTES)
  return snapshot(url, brought=_SMALL, pointed=_LARGE, most_bytes=JSON_BYTES)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
