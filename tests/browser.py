"""A browser for tests: the system's chromium, without a window, by playwright. Skips where there is none."""

import base64
import io
import shutil
import time
from contextlib import contextmanager

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


class Tab:
    """A page that must not complain, and asks for nothing but what it is told to."""

    def __init__(self, browser, size: tuple[int, int] = (320, 240), **options):
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **options)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str) -> "Tab":
        self.page.goto("about:blank")  # else another #view of the same page would not load it anew
        self.page.goto(address)
        return self.wait()

    def wait(self) -> "Tab":
        """Until the picture of the newest view is there."""
        return self.until("window.__ready || window.__error")

    def until(self, script: str) -> "Tab":
        """A loop here: the page's own rules forbid the browser's one."""
        deadline = time.monotonic() + PATIENCE
        while not self.do(script):
            assert time.monotonic() < deadline, f"not {script} after {PATIENCE:.0f} s; {self.complaints}"
            self.page.wait_for_timeout(20)
        return self

    def do(self, script: str):
        return self.page.evaluate(script)

    def picture(self, canvas: str = "$.picture") -> np.ndarray:
        """[H, W, 3] uint8."""
        data = self.do(f"{canvas}.toDataURL().split(',')[1]")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self) -> None:
        self.page.close()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and b.std() > 10, "a blank picture would pass any test"
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean())))
