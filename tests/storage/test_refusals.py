"""What is said of a bucket that refuses, by the real clients: one line with what was wanted, why, and what to do."""

import http.server
import threading
from pathlib import Path

import pytest
import tensorstore

from internvl_jax import lease
from internvl_jax.errors import UserError
from internvl_jax.outputs import explained, write_json
from internvl_jax.storage import paths, remote
from internvl_jax.storage.paths import BucketPath, Mirror

RUN = BucketPath("s3://closed/run")


class _Refusing(http.server.BaseHTTPRequestHandler):
  """A store that answers all requests with one status."""

  status, body = 403, b""

  def do_GET(self):
    self.send_response(self.status)
    self.send_header("Content-Length", str(len(self.body)))
    self.send_header("Content-Type", "application/xml")
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(self.body)

  do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

  def log_message(self, *args):
    pass


@pytest.fixture(
  params=[(403, "AccessDenied"), (400, "ExpiredToken"), (404, "NoSuchBucket")], ids=lambda p: p[1]
)
def refusal(request, monkeypatch):
  """The code of a store's answer to everything."""
  status, code = request.param
  body = f"<Error><Code>{code}</Code><Message>The {code} of a test.</Message></Error>".encode()
  handler = type("Handler", (_Refusing,), {"status": status, "body": body})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
  for name, value in (keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(remote, "_systems", {})
  monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
  yield code
  server.shutdown()


def told(error: Exception, code: str) -> None:
  """Whether an error is a line that says all."""
  assert isinstance(error, UserError) and "s3://closed/run" in str(error) and "\n" not in str(error)
  assert ("bucket" if code == "NoSuchBucket" else "credentials") in str(error), error


def test_a_run_cannot_begin(refusal):
  place = lease.place_in(RUN)
  with (
    pytest.raises(UserError) as caught,
    lease.held(place, "training.output_dir='s3://closed/run'", wait=lambda _: None),
  ):
    pytest.fail("it cannot be held")
  told(caught.value, refusal)


def test_what_is_written_is_named(refusal, tmp_path):
  (file := tmp_path / "x").write_text("x")
  for write in (
    lambda: write_json(RUN / "trainer_state.json", {}),
    lambda: paths.put(file, RUN / "model.safetensors"),
  ):
    with pytest.raises(UserError) as caught:
      write()
    told(caught.value, refusal)


def test_logs_that_cannot_be_sent_do_not_end_a_run(refusal, caplog):
  with Mirror.of(RUN / "tensorboard") as mirror:
    (Path(mirror.folder) / "events").write_text("x")
    assert mirror.is_due()
    mirror.send()
    assert not mirror.is_due()
  assert all("s3://closed/run/tensorboard/events" in record.getMessage() for record in caplog.records)
  assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


def test_what_tensorstore_says_of_it(refusal, monkeypatch):
  from internvl_jax.checkpoint.folders import _driver

  store = tensorstore.KvStore.open(_driver(str(RUN / "checkpoints"))).result()
  with (
    pytest.raises(UserError) as caught,
    explained(RUN, "the checkpoint", lambda: "start the same command again"),
  ):
    store.write("x", b"1").result()
  told(caught.value, refusal)
  assert "the checkpoint could not be written (" in str(caught.value)
