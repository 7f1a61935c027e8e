"""A headless Chromium spoken to over a pipe: what a page looks like at a width, light or dark, and what it asks for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str | None:
    """The program, $RAYCAP_BROWSER first; None where there is none."""
    return os.environ.get("RAYCAP_BROWSER") or next((found for n in NAMES if (found := shutil.which(n))), None)


class Chromium:
    """One browser with one page; DevTools messages end with a zero byte, on its file descriptors 3 and 4."""

    def __init__(self, program: str):
        self._home = tempfile.TemporaryDirectory(prefix="raycap-browser-")
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                   "--no-first-run", "--disable-background-networking", f"--user-data-dir={self._home.name}",
                   "--remote-debugging-pipe"]  # fmt: skip
        # The shell puts the pipes where Chromium looks for them, whatever numbers they have here.
        line = f'exec "$0" "$@" 3<&{there} 4>&{back}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *options, "about:blank"],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self._left, self._number, self._session = b"", 0, ""
        self.asked: list[str] = []
        """Addresses that the page has asked for."""
        self.errors: list[str] = []
        """What its scripts threw, and what its policy refused."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self._note(found)

    def open(
        self, file: Path, width_px: int, height_px: int = 900, *, dark: bool = False, mobile: bool = False
    ) -> None:
        self.asked, self.errors = [], []
        self.send("Emulation.setDeviceMetricsOverride", width=width_px, height=height_px,
                  deviceScaleFactor=1, mobile=mobile)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=file.resolve().as_uri())
        until = time.monotonic() + 30
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            if time.monotonic() > until:
                raise TimeoutError(f"{file} did not load in 30 s")
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of an expression, as JSON has it."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(self, file: Path, *, selector: str = "") -> Path:
        """The whole page as PNG, or one element of it."""
        script = f"(() => {{const r = document.querySelector({json.dumps(selector or 'html')}).getBoundingClientRect();"
        box = self.run(script + "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}})()")
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip={**box, "scale": 1})
        file.write_bytes(base64.b64decode(found["data"]))
        return file

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._home.cleanup()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, found: dict[str, Any]) -> None:
        method, values = found.get("method"), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            chunk = os.read(self._in, 1 << 16)
            if not chunk:
                raise RuntimeError(f"the browser ended with {self._process.wait()}")
            self._left += chunk
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
