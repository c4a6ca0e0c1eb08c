"""A headless Chromium, spoken to over its debugging pipe: nothing but Chromium itself is needed.

FUSED_RESNET_CHROMIUM names it; else the first of NAMES on PATH is taken.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
)
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
TIMEOUT_S = 60
START_S = 120


def find() -> str | None:
    """The path of a Chromium, or None."""
    named = os.environ.get("FUSED_RESNET_CHROMIUM")
    return next((path for name in ([named] if named else NAMES) if (path := shutil.which(name))), None)


class Browser:
    """A page. `complaints`: errors and warnings of its console; `requests`: what it asked for."""

    def __init__(self, chromium: str, profile):
        reads, self.to = _pipe()
        self.back, writes = _pipe()
        self.complaints, self.requests, self.received, self.sent = [], [], b"", 0
        self.events: list[dict] = []
        # Chromium reads from descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec 3<&{reads} 4>&{writes} "$@"', "bash", chromium, *FLAGS, "about:blank"]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self.session = None
        targets = self.call("Target.getTargets", timeout=START_S)["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.to)  # Chromium ends when its pipe does
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.back)

    def call(self, method: str, timeout: float = TIMEOUT_S, **parameters) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self.sent:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                return answer["result"]

    def _receive(self, deadline: float, waiting_for: str) -> dict:
        while b"\0" not in self.received:
            if not select.select([self.back], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer from Chromium to {waiting_for}")
            chunk = os.read(self.back, 1 << 20)
            assert chunk, f"Chromium ended at {waiting_for}"
            self.received += chunk
        first, _, self.received = self.received.partition(b"\0")
        message = json.loads(first)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, found: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(found["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(found["args"])[:500])
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])

    def look(self, *, width: int, height: int = 900, dark=False, reduced=False) -> None:
        """The window's size, and what the user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        prefers = {
            "color-scheme": "dark" if dark else "light",
            "reduced-motion": "reduce" if reduced else "no-preference",
        }
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": f"prefers-{k}", "value": v} for k, v in prefers.items()]
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")  # a new hash alone would not load the page anew
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str):
        """The value of an expression, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.js(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            name = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **name, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **name)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """kind: mouseMoved, mousePressed or mouseReleased."""
        pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def screenshot(self, whole=False) -> bytes:
        """PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])


def _pipe() -> list[int]:
    """A pipe on descriptors that are not those which Chromium uses."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends
