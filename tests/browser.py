"""Browsers for tests: the system's chromium by playwright, without a window, and Firefox on a screen that
nobody sees. Tests skip where there is none.
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
PATIENCE = 60.0  # seconds


@contextmanager
def chromium():
    """The browser, drawing on the CPU."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Shown:
    """A page of ours in some browser: do() runs a script in it."""

    complaints: list[str]

    def do(self, script: str):
        raise NotImplementedError

    def pause(self) -> None:
        time.sleep(0.02)

    def wait(self):
        """Until the picture of the newest view is there."""
        return self.until("!!(window.__ready || window.__error)")

    def until(self, script: str):
        """A loop here: the page's own rules forbid the browser's one."""
        deadline = time.monotonic() + PATIENCE
        while not self.do(script):
            assert time.monotonic() < deadline, f"not {script} after {PATIENCE:.0f} s; {self.complaints}"
            self.pause()
        return self

    def picture(self, canvas: str = "$.picture") -> np.ndarray:
        """[H, W, 3] uint8."""
        data = self.do(f"{canvas}.toDataURL().split(',')[1]")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


class Tab(Shown):
    """A page that must not complain, and asks for nothing but what it is told to."""

    def __init__(self, browser, size: tuple[int, int] = (320, 240), **options):
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **options)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str) -> "Tab":
        """Another #view of the same page does not load it anew."""
        page, _, view = address.partition("#")
        if self.page.url.partition("#")[0] == page:
            self.do(f"window.__ready = false, location.hash = '{view}', 0")
        else:
            self.page.goto(address)
        return self.wait()

    def pause(self) -> None:
        self.page.wait_for_timeout(20)  # and hears what the page says

    def do(self, script: str):
        return self.page.evaluate(script)

    def close(self) -> None:
        self.page.close()


@contextmanager
def firefox(folder: Path) -> Iterator["Fox"]:
    """Its WebGL needs a screen, so that of Xvfb. `folder` becomes its profile."""
    for program in ("firefox-esr", "Xvfb"):
        if not shutil.which(program):
            pytest.skip(f"there is no {program}")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ExitStack() as stack:
        read, write = os.pipe()
        screen = subprocess.Popen(["Xvfb", "-displayfd", str(write)], pass_fds=[write], **quiet)
        stack.callback(lambda: (screen.kill(), screen.wait()))
        os.close(write)
        with os.fdopen(read) as told:
            surroundings = os.environ | {"DISPLAY": f":{told.readline().strip()}", "HOME": str(folder)}
        (folder / "user.js").write_text(
            'user_pref("marionette.port", 0);\nuser_pref("webgl.force-enabled", true);'
        )
        command = ["firefox-esr", "--marionette", "--no-remote", "--profile", str(folder)]
        running = subprocess.Popen(command, env=surroundings, **quiet)
        stack.callback(lambda: (running.kill(), running.wait()))
        port, deadline = folder / "MarionetteActivePort", time.monotonic() + PATIENCE
        while not (port.is_file() and port.read_text().strip()):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        wire = stack.enter_context(socket.create_connection(("127.0.0.1", int(port.read_text())), PATIENCE))
        yield Fox(wire)


class Fox(Shown):
    """The only tab of a Firefox, by its Marionette protocol: JSON behind its length."""

    def __init__(self, wire: socket.socket):
        self._wire, self._file, self.complaints = wire, wire.makefile("rb"), []
        self._heard()
        self._ask("WebDriver:NewSession", {})

    def open(self, address: str) -> "Fox":
        self._ask("WebDriver:Navigate", {"url": address})
        return self.wait()

    def do(self, script: str):
        eval_it = {"script": "return window.eval(arguments[0])", "args": [script]}
        return self._ask("WebDriver:ExecuteScript", eval_it)["value"]

    def _ask(self, command: str, values: dict) -> dict:
        message = json.dumps([0, 1, command, values]).encode()
        self._wire.sendall(b"%d:%b" % (len(message), message))
        error, answer = self._heard()[2:]
        assert error is None, error
        return answer

    def _heard(self):
        size = b""
        while not size.endswith(b":"):
            size += self._file.read(1)
        return json.loads(self._file.read(int(size[:-1])))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and b.std() > 10, "a blank picture would pass any test"
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean())))
