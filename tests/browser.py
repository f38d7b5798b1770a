"""A headless Chromium, driven by ChromeDriver's own protocol (W3C WebDriver) over HTTP: no package is needed for it."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from conftest import free_port

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard
# The background's requests would be refused where there is no network, and would stand among the page's own.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,900"),
]


def missing() -> str | None:
    """Says what is not installed, None where a page can be opened."""
    if shutil.which("chromedriver") is None:
        return "no chromedriver on PATH (Debian: apt-get install chromium chromium-driver)"
    if not any(map(shutil.which, NAMES)):
        return f"none of {', '.join(NAMES)} on PATH (Debian: apt-get install chromium)"
    return None


class Browser:
    """One session: a window with an empty profile."""

    def __init__(self, server: str, profile: Path):
        self._server, self._base = server, ""
        options = {"binary": next(filter(None, map(shutil.which, NAMES)))}
        options["args"] = [*FLAGS, f"--user-data-dir={profile}"]
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        self._base = f"/session/{self.call('POST', '/session', capabilities={'alwaysMatch': always})['sessionId']}"

    def call(self, method: str, path: str, **body):
        """Sends one command and returns its value."""
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._server + self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, url: str) -> None:
        """Opens a page and waits until it is loaded."""
        self.call("POST", "/url", url=url)

    def run(self, script: str, *arguments):
        """Runs JavaScript in the page and returns what it returns."""
        return self.call("POST", "/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, seconds: float = 30):
        """Runs JavaScript until what it returns is true, and returns that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.run(script):
                return found
            time.sleep(0.1)
        raise TimeoutError(f"not true after {seconds} s: {script}\n{self.run('return document.body.innerText')}")

    def element(self, css: str) -> str:
        """Returns the path of an element, once it is there."""
        self.wait(f"return document.querySelector({json.dumps(css)}) !== null")
        return f"/element/{self.call('POST', '/element', using='css selector', value=css)[ELEMENT]}"

    def click(self, css: str) -> None:
        """Clicks on an element as a user does: it must be visible."""
        self.call("POST", self.element(css) + "/click")

    def type(self, css: str, text: str) -> None:
        """Types into a field, in the place of what it holds."""
        field = self.element(css)
        self.call("POST", field + "/clear")
        self.call("POST", field + "/value", text=text)

    def screenshot(self, path: Path) -> None:
        """Saves what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def log(self, kind: str) -> list[dict]:
        """Returns and forgets the entries of one of Chromium's logs."""
        return self.call("POST", "/se/log", type=kind)

    def requested(self) -> list[str]:
        """Returns the addresses that were asked for since the last call, by the page or for it."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


@contextlib.contextmanager
def browser(folder: Path):
    """Context manager: a `Browser`, which ends with its driver."""
    port = free_port()
    with open(folder / "chromedriver.log", "wb") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                one = Browser(f"http://127.0.0.1:{port}", folder / "profile")
                break
            except urllib.error.URLError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        try:
            yield one
        finally:
            one.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)
