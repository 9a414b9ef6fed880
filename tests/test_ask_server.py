"""A server is asked a certificate's questions: what is sent, and what is made of the answers."""

import base64
import contextlib
import http.server
import json
import threading

import pytest

from tests.support.scripts import load
from tests.support.toy import REPOSITORY

ask_server = load(REPOSITORY / "scripts/ask_server.py")

QUESTIONS = [
  {
    "id": "a",
    "question": "What?",
    "pictures": ["one.png", "two.jpg"],
    "answer": "a cat",
    "answer_ids": [5, 6],
    "prompt_tokens": 9,
  },
  {
    "id": "b",
    "question": "Image-1: <image>\nImage-2: <image>\nWhich?",
    "pictures": ["one.png", "two.jpg"],
    "answer": "the <ref>left</ref> one",
    "answer_ids": [7, 8, 9, 5],
  },
  {"id": "c", "question": "Who?", "pictures": [], "answer": "me", "answer_ids": [4]},
]
PICTURES = {"one.png": b"\x89PNG and so on", "two.jpg": b"\xff\xd8\xff and so on"}
RIGHT = {
  "a": {"content": "a cat", "token_ids": [5, 6, 2], "finish_reason": "stop"},
  "b": {"content": "the <ref>left</ref> one", "token_ids": [7, 8, 9, 5], "finish_reason": "length"},
  "c": {"content": "me", "token_ids": [4, 2], "finish_reason": "stop"},
}


@pytest.fixture
def questions(tmp_path):
  for name, content in PICTURES.items():
    (tmp_path / name).write_bytes(content)
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
  return path


class StandIn(http.server.ThreadingHTTPServer):
  """A server that speaks OpenAI's protocol, and answers what it is told to."""

  def __init__(self, replies, *, strict=False):
    super().__init__(("127.0.0.1", 0), Handler)
    self.replies, self.strict = iter(replies), strict
    self.asked = []

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
  server: StandIn

  def do_GET(self):
    assert self.path == "/v1/models"
    self.send(200, {"data": [{"id": "tiny"}]})

  def do_POST(self):
    assert self.path == "/v1/chat/completions"
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    if self.server.strict and "top_logprobs" in body:
      self.send(422, {"detail": "Unexpected keys in the request"})
      return
    self.server.asked.append(body)
    reply = dict(next(self.server.replies))
    choice = {"message": {"role": "assistant", "content": reply.pop("content")}, **reply}
    self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 9}})

  def send(self, code, body):
    self.send_response(code)
    self.end_headers()
    self.wfile.write(json.dumps(body).encode())

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(replies, **options):
  with StandIn(replies, **options) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def ask(server, questions, *flags):
  return ask_server.main([f"--url={server.url}", f"--questions={questions}", *flags])


def test_all_answers_are_the_same(questions, tmp_path, capsys):
  with serving(RIGHT.values()) as server:
    assert (
      ask(server, questions, f"--output={tmp_path / 'theirs.jsonl'}", '--extra={"max_dynamic_patch": 6}') == 0
    )
  assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 answers are the same"
  theirs = [json.loads(line) for line in (tmp_path / "theirs.jsonl").read_text().splitlines()]
  assert [line["answer_ids"] for line in theirs] == [[5, 6, 2], [7, 8, 9, 5], [4, 2]]
  first, second, third = server.asked
  assert (first["model"], first["temperature"], first["max_tokens"]) == ("tiny", 0, 4)
  assert (first["repetition_penalty"], first["skip_special_tokens"]) == (1.0, False)
  assert all(body["max_dynamic_patch"] == 6 for body in server.asked)
  assert third["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
  content = second["messages"][0]["content"]
  assert [part.get("text") for part in content] == ["Image-1: ", None, "Image-2: ", None, "Which?"]
  assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "image_url", "text"]
  for body, places in ((first, (0, 1)), (second, (1, 3))):
    sent = [body["messages"][0]["content"][place]["image_url"]["url"] for place in places]
    kinds, data = zip(*(url.split(";base64,") for url in sent), strict=True)
    assert kinds == ("data:image/png", "data:image/jpeg")
    assert [base64.b64decode(part) for part in data] == list(PICTURES.values())


@pytest.mark.parametrize(
  ("changed", "words"),
  [
    ({"token_ids": [5, 7, 2]}, "differs at 1"),
    ({"token_ids": [5, 6, 8, 8], "finish_reason": "length"}, "differs at 2"),
    ({"token_ids": [5, 2]}, "differs at 1"),
    ({"token_ids": [5, 6], "finish_reason": "length"}, "goes on where ours ends"),
    # Without ids, by the text alone.
    ({"token_ids": None, "content": "a cow"}, "differs at 3"),
    ({"token_ids": None, "finish_reason": "length"}, "goes on where ours ends"),
  ],
)
def test_an_answer_that_differs_is_found(questions, capsys, changed, words):
  with serving([RIGHT["a"] | changed, RIGHT["b"], RIGHT["c"]]) as server:
    assert ask(server, questions) == 1
  out = capsys.readouterr().out
  assert words in out and "2 of 3 answers are the same" in out


def test_a_share_may_be_enough(questions):
  with serving([RIGHT["a"] | {"token_ids": [1]}, RIGHT["b"], RIGHT["c"]]) as server:
    assert ask(server, questions, "--least=0.6") == 0


def test_what_made_the_difference_is_told(questions, capsys):
  logprobs = {"content": [{"top_logprobs": [{"logprob": -0.75}, {"logprob": -0.5}]}]}
  wrong = RIGHT["a"] | {"token_ids": [3, 6, 2], "logprobs": logprobs}
  lines = [QUESTIONS[0] | {"prompt_tokens": 10}, *QUESTIONS[1:]]
  questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
  with serving([wrong, RIGHT["b"], RIGHT["c"]]) as server:
    assert ask(server, questions) == 1
  out = capsys.readouterr().out
  assert "prompt of 9 tokens, ours 10: template or tiles differ" in out
  assert "likelier than the next by 0.25 nats" in out


def test_a_server_that_takes_no_more_than_the_protocol_is_compared_by_text(questions, capsys):
  plain = [{**reply, "token_ids": None} for reply in RIGHT.values()]
  plain[1]["content"] = "the left one"
  with serving(plain, strict=True) as server:
    assert ask(server, questions) == 0
  assert "without special tokens" in capsys.readouterr().out
  assert server.asked[0].keys() == {"model", "messages", "temperature", "max_tokens"}


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ({"id": "a"}, "line 1: has no answer, pictures, question"),
    (QUESTIONS[0] | {"pictures": ["no.png"]}, "no.png is not there"),
    (QUESTIONS[2] | {"question": "<image>"}, "more <image> than pictures"),
  ],
)
def test_a_question_that_cannot_be_asked_is_named(questions, capsys, line, words):
  questions.write_text(json.dumps(line))
  with serving([]) as server:
    assert ask(server, questions) == 2
  assert words in capsys.readouterr().err


def test_no_server(questions, capsys):
  with serving([]) as server:
    url = server.url
  assert ask_server.main([f"--url={url}", f"--questions={questions}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"cannot ask: {url}/models: ")
