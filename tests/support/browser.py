"""A page in headless Chromium: what it asks for, what it says, how wide it is, and a picture of it."""

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(
  (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@dataclasses.dataclass
class Seen:
  """What was seen of a page.

  Attributes:
    requests: URLs that were asked for.
    errors: what the console said, refusals by the page's own policy included.
    answers: values of the expressions.
    picture: of the whole page, as PNG.
  """

  requests: list[str]
  errors: list[str]
  answers: list[Any]
  picture: bytes


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[str]:
  """Starts the browser, with a profile in `folder`; yields where its page is spoken to."""
  assert BROWSER is not None
  command = [BROWSER, *_FLAGS, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    try:
      place, until = folder / "DevToolsActivePort", time.monotonic() + 60
      while not place.exists() or not place.read_text().strip():
        if time.monotonic() > until or process.poll() is not None:
          raise TimeoutError("the browser did not start")
        time.sleep(0.05)
      yield f"http://127.0.0.1:{place.read_text().split()[0]}"
    finally:
      process.terminate()


def look(at: str, page: Path, *, width: int, expressions: tuple[str, ...] = (), dark: bool = False) -> Seen:
  """Opens a file at a width, as a telephone or a desktop would."""
  return asyncio.run(_look(at, page, width, expressions, dark))


async def _look(at: str, page: Path, width: int, expressions: tuple[str, ...], dark: bool) -> Seen:
  seen = Seen([], [], [], b"")
  async with aiohttp.ClientSession() as session:
    async with session.get(f"{at}/json/list") as response:
      (target,) = [one for one in await response.json() if one["type"] == "page"]
    async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
      numbers = itertools.count(1)

      async def call(method: str, **values: Any) -> dict[str, Any]:
        number = next(numbers)
        await socket.send_json({"id": number, "method": method, "params": values})
        return await until(lambda message: message.get("id") == number)

      async def until(found: Any) -> dict[str, Any]:
        while True:
          message = await asyncio.wait_for(socket.receive_json(), 60)
          _note(seen, message)
          if found(message):
            return message.get("result", {})

      for domain in ("Page", "Network", "Runtime", "Log"):
        await call(f"{domain}.enable")
      scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
      await call("Emulation.setEmulatedMedia", features=scheme)
      size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
      await call("Emulation.setDeviceMetricsOverride", **size)
      await call("Page.navigate", url=page.resolve().as_uri())
      await until(lambda message: message.get("method") == "Page.loadEventFired")
      # Observers of sizes are called, and what they draw is there, two frames later.
      frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
      for expression in (frames, *expressions):
        answer = await call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        seen.answers.append(answer["result"].get("value"))
      shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
      seen.picture = base64.b64decode(shot["data"])
      del seen.answers[0]
  return seen


def _note(seen: Seen, message: dict[str, Any]) -> None:
  method, values = message.get("method"), message.get("params", {})
  if method == "Network.requestWillBeSent":
    seen.requests.append(values["request"]["url"])
  elif method == "Log.entryAdded":
    seen.errors.append(values["entry"]["text"])
  elif method == "Runtime.exceptionThrown":
    seen.errors.append(str(values["exceptionDetails"]))
