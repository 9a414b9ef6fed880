"""A web server and object stores on this machine, over a folder: they fail where a test wants them to."""

import contextlib
import html
import http.server
import os
import pathlib
import re
import threading
import time
import urllib.parse

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from internvl_jax.storage import remote


class WebServer(http.server.ThreadingHTTPServer):
  """Serves a folder; knows ranges, HEAD, ETags and pages of links.

  Attributes:
    folder: that is served.
    url: of the folder.
    log: (method, path, status) of every request.
    served: bytes of content sent.
    faults: what goes wrong with the next requests of a path, one after another: a status, "cut" (half of the
      content and an end), "reset" (an end at once) or "silence".
    ranges: answer a request for a part with the part, not with the whole file.
    versions: send ETags.
  """

  daemon_threads = True
  request_queue_size = 64  # Clients that find it full wait for seconds.

  def __init__(self, folder):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.folder = pathlib.Path(folder)
    self.url = f"http://127.0.0.1:{self.server_port}"
    self.log, self.served, self.faults = [], 0, {}
    self.ranges = self.versions = True

  def requests(self, path):
    """Returns (method, status) of the requests of a path."""
    return [(method, status) for method, asked, status in self.log if asked == path]

  def handle_error(self, request, client_address):
    """Says nothing of clients that went away."""


@contextlib.contextmanager
def web_server(folder):
  server = WebServer(folder)
  # Asked often whether to stop: the default, twice a second, is felt in tests.
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()
  thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: WebServer

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.answer()

  def do_GET(self):
    self.answer()

  def answer(self):
    path = urllib.parse.unquote(self.path.partition("?")[0])
    faults = self.server.faults.get(path)
    fault = faults.pop(0) if faults else None
    file = self.server.folder / path.lstrip("/")
    if fault == "silence":
      time.sleep(1)
    if fault in ("silence", "reset"):
      self.close_connection = True
    elif isinstance(fault, int):
      self.send(path, fault, b"told by the test")
    elif file.is_dir() and not path.endswith("/"):
      self.send(path, 301, b"", Location=f"{self.path}/")
    elif file.is_dir():
      links = "".join(f'<a href="{urllib.parse.quote(entry)}">{entry}</a>' for entry in os.listdir(file))
      self.send(path, 200, f'<a href="../">..</a><a href="?C=N">name</a>{links}'.encode(), kind="text/html")
    elif not file.is_file():
      self.send(path, 404, html.escape(path).encode())
    else:
      self.send_file(path, file, cut=fault == "cut")

  def send_file(self, path, file, cut):
    content, headers = file.read_bytes(), {}
    if self.server.versions:
      headers["ETag"] = f'"{file.stat().st_mtime_ns:x}"'
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not found or not self.server.ranges:
      return self.send(path, 200, content, cut=cut, **headers)
    start, end = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
    if start >= len(content):
      return self.send(path, 416, b"")
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return self.send(path, 206, content[start:end], cut=cut, **headers)

  def send(self, path, status, content, *, kind="application/octet-stream", cut=False, **headers):
    self.server.log.append((self.command, path, status))
    self.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(content), **headers}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command == "GET":
      content = content[: len(content) // 2] if cut else content
      self.close_connection = self.close_connection or cut
      self.server.served += len(content)  # before the client has it and asks
      self.wfile.write(content)


def object_store(monkeypatch, scheme, folder):
  """Makes the content of a folder that of `<scheme>://bucket`, for one test."""

  class Store(LocalFileSystem):
    protocol = (scheme,)

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(re.sub(rf"^{scheme}://bucket", str(folder), os.fspath(path)))

  monkeypatch.setitem(_registry, scheme, Store)
  monkeypatch.setattr(remote, "_systems", {})
  return f"{scheme}://bucket"
