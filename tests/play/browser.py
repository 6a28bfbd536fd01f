"""A headless Chromium, driven over the DevTools protocol: pages are opened, keys pressed, scripts asked, pictures kept.

Chromium is what the machine has (Debian: apt-get install chromium); the protocol is JSON over a WebSocket.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 90
"""Seconds after which a browser is given up."""
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}


def find() -> str | None:
    """Returns the program, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """An open page; what its console said stands in ``said``."""

    def __init__(self, connection: ClientConnection, folder: pathlib.Path):
        self._connection, self._number, self.folder = connection, 0, folder
        self.said: list[str] = []
        self.url = ""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=PATIENCE))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._listen(message)

    def _listen(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(about["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.said.append(f"{about['entry']['level']}: {about['entry']['text']} {about['entry'].get('url', '')}")
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.said.append(f"{about['type']}: {about['args']}")

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False, phone: bool = False) -> None:
        """Opens an address in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        if phone:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=theme)
        self.call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """Returns the value of an expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        """Waits until an expression holds."""
        end = time.monotonic() + PATIENCE
        while not self.ask(f"Boolean({script})"):
            assert time.monotonic() < end, f"gave up on: {script}; the console said {self.said}"
            time.sleep(0.05)

    def press(self, key: str, seconds: float = 0.0) -> None:
        """Presses a key for so long."""
        about = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        time.sleep(seconds)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def keep(self, path: pathlib.Path, *, whole: bool = False) -> None:
        """Writes what is seen, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def chromium(program: str, folder: pathlib.Path) -> Iterator[Tab]:
    """Starts a browser with an empty profile in ``folder``, and ends it."""
    # No sandbox: tests run as root in containers, where Chromium's needs what they do not have.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [program, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told, end = folder / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (told.exists() and told.read_text().strip()):
            assert process.poll() is None and time.monotonic() < end, "the browser did not start"
            time.sleep(0.05)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as reply:
            (page,) = (page for page in json.load(reply) if page["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, compression=None) as connection:
            yield Tab(connection, folder)
    finally:
        process.terminate()
        process.wait(PATIENCE)
