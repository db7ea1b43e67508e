"""Chromium without a window, asked through its DevTools protocol over a pipe: what a reader of a page sees of it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.debian import program

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
PATIENCE_S = 120


@dataclass(frozen=True)
class Seen:
    """An opened page. complaints: of the console, with exceptions and dialogs. fetched: addresses, other than its own.

    page_width: what can be scrolled to, in CSS pixels. outside: elements that reach beyond the screen and are in no box
    that scrolls by itself. ground, ink: colours of the page as computed.
    """

    complaints: list[str]
    fetched: list[str]
    page_width: int
    outside: list[str]
    ground: str
    ink: str


_LOOK = """(() => {
  const page = document.documentElement, outside = []
  const scrolls = element => element && (getComputedStyle(element).overflowX !== 'visible'
    || scrolls(element.parentElement))
  for (const element of document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect()
    if ((box.right > innerWidth + 1 || box.left < -1) && !scrolls(element.parentElement))
      outside.push(element.tagName + ' ' + element.textContent.slice(0, 40))
  }
  const style = getComputedStyle(document.body)
  return {page_width: page.scrollWidth, outside, ground: style.backgroundColor, ink: style.color}
})()"""


class Browser:
    """A running Chromium; see `browser`."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int):
        self._process, self._commands, self._answers = process, commands, answers
        self._number = 0
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}  # until there is a page, the browser itself is spoken to
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, *, width: int, dark: bool = False, picture: Path | None = None) -> Seen:
        """Opens a page of this machine on a screen of this width. picture: where to put one of all of it."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        url = path.resolve().as_uri()
        self._ask("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        look = self._ask("Runtime.evaluate", expression=_LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            self.shoot(picture)
        complaints, fetched = [], []
        for event in self._events:
            about = event["params"]
            if event["method"] == "Page.javascriptDialogOpening":
                complaints.append(f"{about['type']}: {about['message']}")
            elif event["method"] == "Runtime.exceptionThrown":
                complaints.append(about["exceptionDetails"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                complaints.append(f"{about['type']}: {about['args']}")
            elif event["method"] == "Log.entryAdded":
                complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")
            elif event["method"] == "Network.requestWillBeSent":
                address = about["request"]["url"]
                if address != url and not address.startswith("data:"):
                    fetched.append(address)
        return Seen(complaints, fetched, **look)

    def shoot(self, picture: Path) -> None:
        """Puts a picture of all of the open page there, in the form of its suffix (.png, .webp)."""
        form = picture.suffix.removeprefix(".")
        shot = self._ask("Page.captureScreenshot", captureBeyondViewport=True, format=form)
        picture.write_bytes(base64.b64decode(shot["data"]))

    def run(self, expression: str) -> Any:
        """What JavaScript finds in the page that is open."""
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._number

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, **parameters)
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "Chromium does not answer"
            read = os.read(self._answers, 1 << 20)
            assert read, f"Chromium ended with status {self._process.wait()}"
            self._unread += read
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        if message.get("method") == "Page.javascriptDialogOpening":
            self._send("Page.handleJavaScriptDialog", accept=True)  # a page waits for that
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for the block. Skips the test where there is no Chromium and none can be installed."""
    chromium = program(("chromium", "chromium-browser", "google-chrome"), "chromium")
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    # The protocol is spoken over descriptors 3 and 4, whatever these are called here.
    given = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (to_browser, from_browser)]
    for descriptor in (to_browser, from_browser):
        os.close(descriptor)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [chromium, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        shell = ["bash", "-c", f'exec "$@" 3<&{given[0]} 4>&{given[1]}', "bash", *words]
        process = subprocess.Popen(shell, pass_fds=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for descriptor in given:
            os.close(descriptor)
        try:
            yield Browser(process, commands, answers)
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(answers)
