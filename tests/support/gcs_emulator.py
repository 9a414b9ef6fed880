"""Runs gcp-storage-emulator with what TensorStore asks of GCS beside: generations and conditions. python gcs_emulator.py PORT.

OCDBT, TensorStore's database, writes its manifest only if nobody else has since it read it. The emulator sends no
generations and heeds no conditions.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_get, _insert, _list = objects.get, objects.insert, objects.ls


def _generation(request, storage, name):
  try:
    return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
  except NotFound:
    return "0"


def _asked(request, name):
  return request.query.get(name, [None])[0]


def _get_object(request, response, storage, *args, **kwargs):
  generation = _generation(request, storage, request.params["object_id"])
  if generation != "0":
    response["x-goog-generation"] = generation
    if _asked(request, "ifGenerationNotMatch") == generation:
      response.status = HTTPStatus.NOT_MODIFIED
      return
    if _asked(request, "ifGenerationMatch") not in (None, generation):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
  _get(request, response, storage)


def _insert_object(request, response, storage, *args, **kwargs):
  name, wanted = _asked(request, "name"), _asked(request, "ifGenerationMatch")
  if name is not None and wanted not in (None, _generation(request, storage, name)):
    response.status = HTTPStatus.PRECONDITION_FAILED
    return
  _insert(request, response, storage)


def _list_objects(request, response, storage, *args, **kwargs):
  start, end = _asked(request, "startOffset"), _asked(request, "endOffset")
  if start is None and end is None:
    _list(request, response, storage)
    return
  found, _ = storage.get_file_list(request.params["bucket_name"], None, None)
  items = [item for item in found if (start or "") <= item["name"] and (end is None or item["name"] < end)]
  response.json({"kind": "storage#objects", "prefixes": [], "items": items})


if __name__ == "__main__":
  # The server takes the handlers when it is imported.
  objects.get, objects.insert, objects.ls = _get_object, _insert_object, _list_objects
  from gcp_storage_emulator.server import create_server

  create_server("127.0.0.1", int(sys.argv[1]), in_memory=True).run()
