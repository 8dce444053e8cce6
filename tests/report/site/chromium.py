"""A real headless Chromium, driven over two pipes with the standard library alone. Found on PATH or by
$WORKBENCH_CHROMIUM; without one the tests that need it are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--no-zygote",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--mute-audio",
)
WHY_NOT = "needs a Chromium: install one, or name it in WORKBENCH_CHROMIUM"


def executable() -> str | None:
    """The browser to test with, if there is one."""
    named = os.environ.get("WORKBENCH_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser and one tab of it. Every message of the console and every request is kept."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, limit_s: float = 30, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        ends = time.monotonic() + limit_s
        while time.monotonic() < ends:
            while b"\0" in self._buffer:
                whole, self._buffer = self._buffer.split(b"\0", 1)
                answer = json.loads(whole)
                if answer.get("id") == self._count:
                    assert "error" not in answer, (method, answer["error"])
                    return dict(answer["result"])
                self.events.append(answer)
            if select.select([self._read], [], [], 0.5)[0]:
                self._buffer += os.read(self._read, 1 << 20)
        raise TimeoutError(method)

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until all of it is there."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait(self, true: str) -> bool:
        """Whether an expression comes to be true: pages and links take their time."""
        return any(self(true) or time.sleep(0.02) for _ in range(600))

    def __call__(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """One key on the keyboard, as a person presses it."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def complaints(self) -> list[str]:
        """What the console was told: errors, warnings, exceptions, refused requests."""
        self("1")  # whatever is under way has arrived by then
        found = []
        for event in self.events:
            method, told = event.get("method"), event.get("params", {})
            kinds = ("error", "warning", "assert")
            if method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and told["type"] in kinds:
                found.append(str(told["args"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in kinds:
                found.append(told["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every URL that was asked for, `data:` left out."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`, gone when it is left."""
    program = executable()
    assert program is not None, WHY_NOT
    asks, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    # The protocol's pipes are descriptors 3 and 4; another process puts them there, without a fork of this one.
    place = (
        "import os, sys; asks, answers = (os.dup(os.dup(int(n))) for n in sys.argv[1:3]); os.dup2(asks, 103); "
        "os.dup2(answers, 104); os.dup2(103, 3); os.dup2(104, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    shell = [sys.executable, "-S", "-c", place, str(asks), str(answers), program]
    profile = f"--user-data-dir={folder / 'profile'}"
    with open(folder / "chromium.log", "wb") as log:
        child = subprocess.Popen(
            [*shell, *FLAGS, "--remote-debugging-pipe", profile, "about:blank"],
            pass_fds=(asks, answers),
            stdout=log,
            stderr=log,
        )
    os.close(asks)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        child.kill()
        child.wait(timeout=10)
        os.close(to_browser)
        os.close(from_browser)
