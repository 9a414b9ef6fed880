"""Passwords, tokens and signatures of URLs are in no message, log or file."""

import io
import logging as stdlib_logging
import sys

import pytest

from internvl_jax import cli
from internvl_jax.config import TrainConfig, to_json
from internvl_jax.data.where import DataError, Where
from internvl_jax.errors import UserError, redacted

MASKED = {
  "https://me:secret@host/a.png": "https://***@host/a.png",
  "ftp://me:sec@ret@host/x": "ftp://***@host/x",
  "https://me:sec/ret@host/x": "https://***@host/x",
  "https://me:12345@host/": "https://***@host/",
  "https://ghp_secret@github.com/x": "https://***@github.com/x",
  "HTTPS://ME:secret@HOST": "HTTPS://***@HOST",
  "'https://me:secr' is cut off": "'https://*** is cut off",
  "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Credential=secret&X-Amz-Signature=secret&x=1": (
    "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Credential=***&X-Amz-Signature=***&x=1"
  ),
  "https://a.blob.core.windows.net/c/x.jpg?sv=2020&sig=secret%3D&se=2": (
    "https://a.blob.core.windows.net/c/x.jpg?sv=2020&sig=***&se=2"
  ),
  "https://host/x?token=secret#access_token=secret": "https://host/x?token=***#access_token=***",
  "path 'a.png?token=secret'": "path 'a.png?token=***'",
}
KEPT = (
  "http://127.0.0.1:9000/b/img@2x.png",
  "'http://host:80', (http://[::1]:8080/x)",
  "s3://bucket/a@b.png",
  "abfs://container@account.dfs.core.windows.net/x",
  "hf://datasets/u/r@rev/x",
  "file://C:/x",
  "https://host/x?size=3&page=2",
  "http://host:8080 and me@host",
  "a: b@c, key=3",
)


@pytest.mark.parametrize("text", MASKED)
def test_secrets_are_masked(text):
  assert redacted(text) == MASKED[text]
  assert str(UserError(text)) == MASKED[text]
  assert MASKED[text] in str(Where("d", "d.jsonl", 1).error(text))


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text):
  assert redacted(text) == text


def test_long_addresses_are_shortened_without_their_secrets():
  assert "aaaa" not in str(DataError(f"image https://me:{'a' * 900}@host/x.png"))


def test_secrets_are_neither_logged_nor_saved(monkeypatch, capsys):
  url = "https://me:secret@host/x"
  config = TrainConfig()
  config.data.meta_path = f"{url}?sig=secret"
  assert to_json(config)["data"]["meta_path"] == "https://***@host/x?sig=***"
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  record = stdlib_logging.LogRecord("x", 20, "x", 1, "Copying %s", (url,), None)
  cli._BarAwareHandler().emit(record)
  cli.report(FileNotFoundError(2, "No such file", url))
  cli.report(RuntimeError(f"cannot connect to {url}"))
  told = sys.stderr.getvalue()
  assert told.count("https://***@host/x") == 3 and "secret" not in told
