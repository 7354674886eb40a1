"""The server behind the page: Python's own, for this machine alone.

Every request needs the token that is printed at the start, and a Host that is this machine: pages of
strangers in the same browser know neither. Nothing is served but what the table below names.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import math
import secrets
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

from gaussian_renderer import looks
from scene.formats import arrays, spz
from scene.formats.ply import save_ply
from scene.gaussian_model import GaussianModel
from utils.files import DataError, write_json
from utils.image import PNG_LEVEL, to_uint8
from utils.terminal import say
from viewer.live import NoTrainer, Trainer
from viewer.page import around, page, scene_view
from viewer.pictures import Ask, Pictures, camera_at
from viewer.views import folder_view

THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
MAX_PIXELS = 16 * 1024 * 1024
FARTHEST = 1e12  # a coordinate that may be meant seriously
LONGEST_BODY = 4 * 1024 * 1024
JPEG_QUALITY = 80  # of a view that moves
FINE_QUALITY = 95  # of a run that goes on, and soon has another picture
SILENCE = 20.0  # seconds after which a connection that says nothing is closed
NAME = Path("splats")  # in messages
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; "
    "style-src 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; frame-ancestors 'none'",
}


class Refused(Exception):
    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Reply(NamedTuple):
    kind: str
    body: bytes
    headers: dict = {}  # noqa: RUF012


class Site:
    """What can be asked for. One picture is computed at a time."""

    def __init__(self, pictures: Pictures, trainer: Trainer | None = None):
        self._pictures, self._trainer = pictures, trainer
        self._one_at_a_time = threading.Lock()
        self.token = secrets.token_urlsafe(16)
        self.gets: dict[str, Callable[[dict], Reply]] = {
            "/": self.page, "/frame": self.frame, "/photo": self.photo, "/splats": self.splats,
            "/state": self.state,
        }  # fmt: skip
        self.posts: dict[str, Callable[[dict, bytes], Reply]] = {"/pause": self.pause, "/path": self.path}

    def page(self, query: dict) -> Reply:
        folder, iterations = self._pictures.folder, self._pictures.iterations
        view = folder_view(folder, iterations[0] if iterations else -1) if folder else scene_view()
        if iterations and self._pictures.of_splats and len(view["cameras"]) < 2:
            view = around(view, self._pictures.splats(iterations[0]))
        live = self._trainer is not None and self._trainer.there()
        own = {
            "token": self.token,
            "iterations": iterations,
            "sources": self._sources(live, bool(iterations)),
            "photos": bool(self._pictures.photos),
            "live": live,
            "splats": self._pictures.of_splats,
            "saves": folder is not None,
        }
        text = page(f"{self._pictures.source}", view=view | {"server": own})
        return Reply("text/html; charset=utf-8", text.encode())

    def _sources(self, live: bool, saved: bool) -> list[tuple[str, str]]:
        browser = [("browser", "drawn by the browser"), ("floats", "by the browser, all digits")]
        browser *= self._pictures.of_splats
        exact = [("exact", "drawn by our rasterizer")]
        finished = [*exact, *browser] if self._pictures.device.type == "cuda" else [*browser, *exact]
        return [("training", "the run as it trains")] * live + finished * saved

    def frame(self, query: dict) -> Reply:
        ask, still = parse_ask(query, self._pictures.device), _flag(query, "still", True)
        if query.get("source") == "training":
            return self._live_frame(ask, still)
        ask.iteration = self._iteration(query)
        with self._one_at_a_time:
            image = to_uint8(self._pictures.picture(ask)).permute(1, 2, 0).contiguous().cpu().numpy()
        return _picture(image, still)

    def _live_frame(self, ask: Ask, still: bool) -> Reply:
        if self._trainer is None:
            raise Refused(404, "there is no run to look at")
        camera = self._pictures.listed(ask)
        image, wait = self._trainer.picture(camera, ask.mode, ask.scale, ask.degree, still)
        exact, quality = still and self._trainer.paused, FINE_QUALITY if still else JPEG_QUALITY
        return _picture(image, exact, quality, {"X-Next": f"{wait:.2f}"})

    def photo(self, query: dict) -> Reply:
        image = self._pictures.photo(_whole(query, "camera", 0, 1 << 30))
        return _picture(image.permute(1, 2, 0).contiguous().cpu().numpy(), exact=True)

    def splats(self, query: dict) -> Reply:
        iteration, exact = self._iteration(query), _flag(query, "exact", False)
        with self._one_at_a_time:
            gaussians = self._pictures.splats(iteration)
            body = _ply(gaussians) if exact else spz.packed(arrays.from_model(gaussians, NAME), NAME)
        return Reply("application/octet-stream", body)

    def state(self, query: dict) -> Reply:
        if self._trainer is None or not self._trainer.there():
            return _json({"live": False, "iterations": self._pictures.iterations})
        return _json({"live": True} | self._trainer.state())

    def pause(self, query: dict, body: bytes) -> Reply:
        if self._trainer is None:
            raise Refused(404, "there is no run to pause")
        self._trainer.pause(_flag(query, "on", True))
        return self.state(query)

    def path(self, query: dict, body: bytes) -> Reply:
        """A camera path that was made in the page, to be kept in the model folder."""
        if self._pictures.folder is None:
            raise Refused(404, "a file of splats has no folder to keep it in")
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict) or not isinstance(data.get("keyframes"), list):
            raise Refused(400, "a camera path must be a JSON object with keyframes")
        target = self._pictures.folder.camera_path
        write_json(target, data)
        return Reply("text/plain; charset=utf-8", f"{target}: render.py --path draws it".encode())

    def _iteration(self, query: dict) -> int:
        saved = self._pictures.iterations
        wanted = _whole(query, "iteration", -1, 1 << 40, saved[0] if saved else -1)
        wanted = saved[0] if wanted == -1 and saved else wanted
        if wanted not in saved:
            raise Refused(404, f"iteration must be one that is saved, got {wanted}")
        return wanted


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "TileSplat", ""
    timeout = SILENCE
    site: Site
    host: str  # what the server listens on

    def do_GET(self) -> None:
        self._answer(self.site.gets)

    def do_POST(self) -> None:
        self.close_connection = True  # whatever more there is of it, nobody reads it
        self._answer(self.site.posts, self._body)

    def _body(self) -> bytes:
        text = self.headers.get("Content-Length", "0")
        size = int(text) if text.isascii() and text.isdecimal() else -1
        if not 0 <= size <= LONGEST_BODY:
            raise Refused(413, f"a body must have a Content-Length up to {LONGEST_BODY:,}, got {text[:80]}")
        body = self.rfile.read(size)
        if len(body) < size:
            raise Refused(400, f"the body ends after {len(body):,} of {size:,} bytes")
        return body

    def _answer(self, table: dict[str, Callable[..., Reply]], *parts: Callable[[], bytes]) -> None:
        try:
            self._send(200, self._reply(table, *parts))
        except Refused as refused:
            self._send(refused.status, Reply("text/plain; charset=utf-8", str(refused).encode()))
        except NoTrainer as error:
            self._send(503, Reply("text/plain; charset=utf-8", str(error).encode()))
        except (DataError, ValueError) as error:
            self._send(400, Reply("text/plain; charset=utf-8", str(error).encode(errors="replace")))
        except (BrokenPipeError, ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # one request must not end the others
            text = f"{type(error).__name__}: {error}"
            say(f"view.py: {self.path[:100]!r} failed: {text}")
            self._send(500, Reply("text/plain; charset=utf-8", text.encode(errors="replace")))

    def _reply(self, table: dict[str, Callable[..., Reply]], *parts: Callable[[], bytes]) -> Reply:
        self._check_host(self.headers.get("Host", ""))
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host", ""):
            raise Refused(403, "pages of others may not ask")
        address = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(address.query, max_num_fields=50).items()}
        if not hmac.compare_digest(query.get("t", "").encode(), self.site.token.encode()):
            raise Refused(403, "the address must have the token t that view.py printed")
        if address.path not in table:
            raise Refused(404, "there is nothing here")
        return table[address.path](query, *(read() for read in parts))

    def _check_host(self, host: str) -> None:
        if not is_this_machine(host.rpartition(":")[0] or host, self.host):
            raise Refused(403, "the Host must be this machine")

    def _send(self, status: int, reply: Reply) -> None:
        with contextlib.suppress(OSError):  # whoever asked is gone
            self.send_response(status)
            for name, value in (HEADERS | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args) -> None:
        """Not a line for each picture."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, site: Site, host: str, port: int):
        super().__init__((host, port), type("SiteHandler", (Handler,), {"site": site, "host": host}))

    def handle_error(self, request, client_address) -> None:
        """A connection that broke is no news."""


def is_this_machine(name: str, listens: str) -> bool:
    """As a browser says it. Names of strangers may lead here, too; addresses have no such names."""
    if name in (*THIS_MACHINE, listens):
        return True
    if listens in THIS_MACHINE:
        return False
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


# What a query says


def parse_ask(query: dict, device: torch.device) -> Ask:
    size = None
    if "w" in query or "h" in query:
        size = _whole(query, "w", 1, 1 << 16), _whole(query, "h", 1, 1 << 16)
        if size[0] * size[1] > MAX_PIXELS:
            raise Refused(
                400, f"a picture must have at most {MAX_PIXELS:,} pixels, got {size[0]} x {size[1]}"
            )
    mode = query.get("mode", "color")
    if mode not in (*looks.MODES, "error"):
        raise Refused(400, f"mode must be one of {', '.join(looks.MODES)}, error, got {mode[:80]}")
    if mode == "error" and "camera" not in query:
        raise Refused(400, "an error needs a camera that has a photo")
    by_number = "camera" in query
    return Ask(
        where=_whole(query, "camera", 0, 1 << 30) if by_number else _free_camera(query, size, device),
        size=size,
        mode=mode,
        scale=_number(query, "scale", 0.0, 100.0, 1.0),
        degree=_whole(query, "degree", 0, 3, 3),
    )


def _free_camera(query: dict, size: tuple[int, int] | None, device: torch.device):
    words = query.get("view", "").split(",")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    good = len(numbers) == 16 and all(math.isfinite(v) and abs(v) <= FARTHEST for v in numbers)
    if not good or size is None or min(numbers[12:14]) <= 0:
        raise Refused(400, "view must be 16 numbers, place, turn, fx, fy, cx, cy, along with w and h")
    turn = np.reshape(numbers[3:12], (3, 3))
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3:
        raise Refused(400, "the turn of a view must be a rotation")
    return camera_at(numbers[:3], turn, numbers[12:], size, device)


def _number(query: dict, key: str, low: float, high: float, default: float | None = None) -> float:
    text = query.get(key, "" if default is None else str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise Refused(400, f"{key} must be a number from {low:g} to {high:g}, got {text[:80]}")
    return value


def _whole(query: dict, key: str, low: int, high: int, default: int | None = None) -> int:
    value = _number(query, key, low, high, default)
    if value != int(value):
        raise Refused(400, f"{key} must be a whole number, got {value:g}")
    return int(value)


def _flag(query: dict, key: str, default: bool) -> bool:
    return bool(_whole(query, key, 0, 1, int(default)))


# What a reply holds


def _picture(
    pixels: np.ndarray, exact: bool, quality: int = JPEG_QUALITY, headers: dict | None = None
) -> Reply:
    """PNG, or JPEG, which is made ten times faster."""
    file = io.BytesIO()
    if exact:
        Image.fromarray(pixels).save(file, "PNG", compress_level=PNG_LEVEL)
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return Reply("image/png" if exact else "image/jpeg", file.getvalue(), headers or {})


def _ply(gaussians: GaussianModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "splats.ply")
        save_ply(gaussians, path, gaussians.antialiased)
        return path.read_bytes()


def _json(data: dict) -> Reply:
    return Reply("application/json", json.dumps(data).encode())
