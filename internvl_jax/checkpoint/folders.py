"""Folders of checkpoints under way, on a disk and in a bucket: complete with their digests, or not there at all.

On a disk a folder has another name until it is complete. In a bucket nothing can be renamed: a last object says that the
others are there. Its digests are the store's own: see `digests`.
"""

import asyncio
import functools
import os
import time
from pathlib import Path
from typing import Any

import fsspec.config
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from internvl_jax import digests
from internvl_jax.outputs import COMMIT_FILE, checkpoint_steps, is_complete
from internvl_jax.storage import remote
from internvl_jax.storage.paths import AnyPath, BucketPath, remove_tree

METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file of what a checkpoint is."""


def opened(folder: AnyPath) -> epath.Path:
  """Orbax's path of a folder, after it has learned what it needs to know of buckets."""
  if isinstance(folder, BucketPath):
    # Listings that fsspec remembers lack what TensorStore, and other hosts, have written since.
    for scheme in ("gs", "gcs", "s3"):
      fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    _teach_s3()
    gcs_utils.is_hierarchical_namespace_enabled = _has_folders
  return epath.Path(str(folder))


def class_of_folders(folder: AnyPath) -> type:
  """The class of Orbax's temporary paths for checkpoints in a folder."""
  return _BucketFolder if isinstance(folder, BucketPath) else _DiskFolder


class _DiskFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """A checkpoint's folder under way, or that of a part of one."""

  async def finalize(self) -> None:
    """Gives the folder its name, once everything is in it: for a checkpoint, the digests of all files, too."""
    final = self.get_final()
    if not final.name.isdecimal():
      await super().finalize()
      return
    # Orbax writes a file or two at the very end, so the folder gets another temporary name before.
    self._final_path = final.parent / f"{self.get().name}-whole"
    await super().finalize()
    await asyncio.to_thread(_write_digests, Path(self._final_path))
    self._final_path.rename(final)
    self._final_path = final


class _BucketFolder(ocp.path.atomicity.CommitFileTemporaryPath):
  """A checkpoint's folder in a bucket, or that of a part of one."""

  async def finalize(self) -> None:
    """Commits: marks a folder as complete, after all of its files; a checkpoint's, after its digests."""
    folder = self.get()
    if folder.name.isdecimal():
      await asyncio.to_thread(self._write_metadata)
      await asyncio.to_thread(_write_object_digests, BucketPath(str(folder)))
    await super().finalize()

  def _write_metadata(self) -> None:
    """Does what Orbax would do after the digests."""
    store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
    if store is not None:
      store.wait_until_finished()
      store.update(file_path=self.get() / METADATA, commit_timestamp_nsecs=time.time_ns())
      store.wait_until_finished()


def _write_object_digests(folder: BucketPath) -> None:
  """Writes the digests of a checkpoint in a bucket, by the store's own sizes and checksums."""
  digests.write(folder, digests.of_objects(folder))


def settle(folder: BucketPath) -> None:
  """Completes or deletes the checkpoints of a bucket that lack their last object.

  Those that are whole by their digests are complete: they come from a disk, or a run was killed between the two objects.
  Those without digests were left by a killed run: they take space, and are never read.
  """
  for step in checkpoint_steps(str(folder.parent)):
    found = folder / str(step)
    if is_complete(found):
      continue
    damage = digests.find_damage(found)
    if damage == digests.UNKNOWN:
      logging.info("%s: was not written to its end, and is deleted", found)
      remove_tree(found)
    elif damage:
      logging.warning("%s: was not copied there as a whole (%s); it is left where it is", found, damage)
    else:
      logging.info("%s: is whole by its digests, and gets the %s that it lacks", found, COMMIT_FILE)
      for part in [*(path for path in found.iterdir() if path.is_dir()), found]:
        if not is_complete(part):
          (part / COMMIT_FILE).write_text("")


def _write_digests(folder: Path) -> None:
  """Writes the digests of a checkpoint; those that processes have computed are taken over."""
  known = {}
  for part in folder.glob("*/digests-*.txt"):
    found = digests.read(part.parent, part.name) or {}
    known |= {f"{part.parent.name}/{name}": value for name, value in found.items()}
    part.unlink()
  names = digests.files_in(folder)
  known = {name: known[name] for name in names if name in known}
  others = [name for name in names if name not in known]
  digests.write(folder, known | digests.of_files(folder, others, sync=True))


_ask_for_folders = gcs_utils.is_hierarchical_namespace_enabled


def _has_folders(path: epath.Path) -> bool:
  return str(path).startswith("gs://") and _bucket_has_folders(str(path).split("/")[2])


@functools.cache
def _bucket_has_folders(bucket: str) -> bool:
  """Whether a bucket of GCS has folders of its own, which are to be deleted, too.

  To ask needs a right (storage.buckets.get) that is not needed to write: without an answer, it is taken to have none.
  """
  try:
    return _ask_for_folders(epath.Path(f"gs://{bucket}/"))
  except Exception as error:
    if (reason := remote.reason(error)) is None:
      raise
    logging.info("gs://%s: its kind cannot be asked for (%s); empty folders may stay", bucket, reason)
    return False


# --- Orbax and S3 -------------------------------------------------------------------------------------------

_driver_of_gcs = gcs_utils.get_kvstore_for_gcs
_normalized = tensorstore_utils._normalize_path


def _teach_s3() -> None:
  """Lets Orbax take `s3://` for a bucket, as it does `gs://`; it would write to a folder called "s3:" else.

  TensorStore, which does the writing, knows S3. tests/test_bucket_checkpoints.py sees whether this still holds.
  """
  gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
  gcs_utils.get_kvstore_for_gcs = _driver
  tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(("gs://", "s3://"))
  tensorstore_utils._normalize_path = _normalize


def _normalize(path: str) -> str:
  return _normalized(path).replace("s3:/", "s3://") if path.startswith("s3://") else _normalized(path)


def _driver(path: Any) -> dict[str, Any]:
  """TensorStore's spec of a path in a bucket."""
  scheme, _, rest = str(path).partition("://")
  if scheme != "s3":
    return _driver_of_gcs(path)
  bucket, _, name = rest.partition("/")
  spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": name}
  if kind := _s3_credentials():
    spec["aws_credentials"] = {"type": kind}
  if endpoint := _s3_endpoint():
    # Of a store that is not Amazon's, the region cannot be asked for.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    spec |= {"endpoint": endpoint, "aws_region": region}
  return spec


def _s3_credentials() -> str | None:
  """Where the keys are, if that is known: TensorStore would complain, at every save, of all the places where none are."""
  named = os.environ.keys()
  if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= named:
    return "environment"
  files = ("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
  if "AWS_WEB_IDENTITY_TOKEN_FILE" in named or any(
    os.path.exists(os.path.expanduser(os.environ.get(name, usual))) for name, usual in files
  ):
    return None
  in_container = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} & named
  return "ecs" if in_container else "imds"


def _s3_endpoint() -> str | None:
  """The endpoint of an S3 store that is not Amazon's, from the settings of s3fs and boto."""
  options = fsspec.config.conf.get("s3", {})
  told = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
  return told or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
