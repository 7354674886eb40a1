"""Live viewing: the wire protocol that SIBR's remote viewer speaks with a trainer.

Request: a 4-byte little-endian length, then that many bytes of UTF-8 JSON with the keys of `Request` below.
Reply: if a picture was asked for, its W*H*3 bytes of RGB without header; then a 4-byte little-endian length
and the path of the data set, by which the viewer finds the cameras to show. Keys of our own page, which other
trainers pass over: render_mode, sh_degree, and want_stats: then a zero byte and JSON about the run follow the
path.

The trainer calls `Viewer.serve` once per iteration. Without a client this costs one poll of a socket each
LOOKOUT seconds. A client that lets training run gets at most one picture per iteration; one that has paused
it is served until it says go on, goes away, or stays silent for IDLE_LIMIT seconds. Whatever a client does
wrong costs it the connection, and a line in the log: nothing that happens here reaches training.

Unless a client has paused it, training gets at least half of the time: after a reply, no client is served for
as long as the reply took. A picture is rendered with no more pixels than RENDERED_PIXELS, and with fewer if
the last one took longer than PICTURE_SECONDS, then enlarged to the size that was asked for: a signal is heard
between two pictures, not within one.
"""

import contextlib
import json
import math
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gaussian_renderer.looks import MODES
from scene.cameras import Camera
from utils.geometry import intrinsics_from_fov
from utils.image import to_uint8

MAX_REQUEST = 64 * 1024  # bytes of JSON; SIBR sends about one thousand
MAX_PIXELS = 32 * 1024 * 1024  # of a picture that may be asked for: 7680x4320
RENDERED_PIXELS = {"cpu": 1024 * 1024, "cuda": 8 * 1024 * 1024}  # the most; on a GPU 3840x2160
FEWEST_PIXELS = 128 * 128
PICTURE_SECONDS = 0.25  # if rendering takes longer, the next picture has fewer pixels
MAX_SCALING = 10.0  # SIBR's slider ends at 1
MESSAGE_LIMIT = 5.0  # seconds for one message to come or go through once it has begun
LOOKOUT = 0.01  # seconds after which it is seen that a client wants to connect
IDLE_LIMIT = 60.0  # seconds for which a client may keep training paused without asking for anything
PORTS_TO_TRY = 100


class ViewerError(Exception):
    """The client broke the protocol."""


@dataclass
class Request:
    """One message of the viewer, checked."""

    camera: Camera | None  # None: resolution 0x0, no picture wanted
    train: bool  # go on training
    keep_alive: bool  # stay when training has ended
    shs_python: bool
    rot_scale_python: bool
    scaling_modifier: float
    mode: str = "color"  # what is shown, one of looks.MODES
    degree: int = 3  # the highest of SH
    want_stats: bool = False


RenderView = Callable[[Request], Tensor]  # -> picture [3, H, W]
Stats = Callable[[], dict]  # plain values about the run


class Viewer:
    """The listening end. `log` gets one line for each thing worth knowing."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 6009,
        source_path: str = "",
        log: Callable[[str], None] = print,
        device: torch.device | str = "cpu",
    ):
        self._source_path = source_path.encode("utf-8", errors="surrogateescape")
        self._log = log
        self._device = device
        self._listener = _listen(host, port, log)
        self._client: socket.socket | None = None
        self._paused = self._keep_alive = False
        self._inbox = bytearray()  # the beginning of a message,
        self._deadline = 0.0  # and when it must be whole
        self._most = RENDERED_PIXELS[torch.device(device).type]
        self._pixels = self._most // 4  # of the next picture
        self._enlarged = False  # and the log says so
        self._rest = 0.0  # until when training is not disturbed
        self._sending = 0.0  # seconds that the last picture took to go out
        self.address = self._listener.getsockname()[:2] if self._listener else None

    def serve(self, render_view: RenderView, training_ended: bool = False, stats: Stats = dict) -> None:
        """Answer who is there. Returns when training may go on; never raises for what a client did."""
        if time.monotonic() < self._rest and not training_ended and not self._paused:
            return
        try:
            self._serve(render_view, training_ended, stats)
        except Exception as error:  # a viewer must not take training down, whatever it is
            self._drop(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        for end in (self._client, self._listener):
            if end is not None:
                end.close()
        self._client = self._listener = None

    def _serve(self, render_view: RenderView, training_ended: bool, stats: Stats) -> None:
        self._accept()
        if self._client is None:
            self._rest = time.monotonic() + LOOKOUT
        while self._client is not None:
            wait = IDLE_LIMIT if self._paused or (training_ended and self._keep_alive) else 0.0
            start = time.monotonic()
            request = self._receive(wait)
            if request is None:
                return
            start = time.monotonic() if wait else start
            try:
                self._reply(request, render_view, stats)
            finally:
                self._rest = 2 * time.monotonic() - start
            self._paused, self._keep_alive = not request.train, request.keep_alive
            if request.train and not (training_ended and request.keep_alive):
                return

    def _accept(self) -> None:
        if self._client is not None or self._listener is None or not _readable(self._listener, 0.0):
            return
        self._client, peer = self._listener.accept()
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._paused = self._keep_alive = self._enlarged = False
        self._inbox.clear()
        self._log(f"viewer connected from {peer[0]}:{peer[1]}")

    def _receive(self, wait: float) -> Request | None:
        """The next message; None while it is not there in full, waiting so many seconds for it to begin.

        What has come of it is kept: a client that sends slowly does not hold up training.
        """
        assert self._client is not None
        while True:
            length = 4 + int.from_bytes(self._inbox[:4], "little") if len(self._inbox) >= 4 else 4
            if length > 4 + MAX_REQUEST:
                raise ViewerError(f"request must be at most {MAX_REQUEST} bytes, got {length - 4}")
            if len(self._inbox) == length > 4 or (length == 4 and self._inbox[:4] == bytes(4)):
                body, self._inbox = bytes(self._inbox[4:]), bytearray()
                return parse_request(body, self._device)
            patience = min(wait, _left(self._deadline)) if self._inbox else wait
            if not _readable(self._client, patience):
                if wait and not self._inbox:
                    raise ViewerError(f"silent for {IDLE_LIMIT:.0f} s")
                if not wait:
                    return None
                continue
            piece = self._client.recv(length - len(self._inbox))
            if not piece:
                raise ViewerError("closed by the client" + " in the middle of a request" * bool(self._inbox))
            if not self._inbox:
                self._deadline = time.monotonic() + MESSAGE_LIMIT
            self._inbox += piece

    def _reply(self, request: Request, render_view: RenderView, stats: Stats) -> None:
        assert self._client is not None
        message, begun = b"", time.perf_counter()
        if request.camera is not None:
            picture = self._picture(request, render_view)
            message = picture.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()
        told = self._source_path
        if request.want_stats:
            more = {"picture_seconds": time.perf_counter() - begun + self._sending}
            told += b"\0" + json.dumps(stats() | more).encode("utf-8")
        message += len(told).to_bytes(4, "little") + told
        begun = time.perf_counter()
        _send_all(self._client, message, time.monotonic() + MESSAGE_LIMIT)
        if request.camera is not None:
            self._sending = time.perf_counter() - begun

    def _picture(self, request: Request, render_view: RenderView) -> Tensor:
        """uint8 [3, H, W], of no more pixels than there is time for."""
        camera, start = request.camera, time.monotonic()
        assert camera is not None
        smaller = _shrunk(camera, self._pixels)
        picture = to_uint8(render_view(replace(request, camera=smaller)).detach()).cpu()
        share = PICTURE_SECONDS / max(time.monotonic() - start, 1e-6)
        if share < 1 or smaller is not camera:  # it took too long, or a larger one was wanted
            pixels = int(smaller.width * smaller.height * min(share, 2.0))
            self._pixels = min(max(pixels, FEWEST_PIXELS), self._most)
        if smaller is not camera:
            if not self._enlarged:
                size = f"{camera.width}x{camera.height}"
                self._log(f"viewer asks for {size}: rendered smaller and enlarged where that takes long")
            self._enlarged = True
            picture = torch.nn.functional.interpolate(picture[None], (camera.height, camera.width))[0]
        return picture

    def _drop(self, reason: str) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError):
                self._client.close()
            self._client = None
        self._paused = False
        self._log(f"viewer disconnected ({reason}); training goes on")


def parse_request(body: bytes, device: torch.device | str = "cpu") -> Request:
    """JSON -> Request. Anything that is not as it should be is a ViewerError that names the key."""
    try:
        message = json.loads(body.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ViewerError(f"request must be UTF-8 JSON ({error})") from None
    if not isinstance(message, dict):
        raise ViewerError(f"request must be a JSON object, got {type(message).__name__}")
    width = int(_number(message, "resolution_x", 0, 1 << 16))
    height = int(_number(message, "resolution_y", 0, 1 << 16))
    if width * height > MAX_PIXELS:
        raise ViewerError(f"resolution must be at most {MAX_PIXELS} pixels, got {width}x{height}")
    return Request(
        camera=_camera(message, width, height, device) if width and height else None,
        train=bool(message.get("train", True)),
        keep_alive=bool(message.get("keep_alive", False)),
        shs_python=bool(message.get("shs_python", False)),
        rot_scale_python=bool(message.get("rot_scale_python", False)),
        scaling_modifier=_number(message, "scaling_modifier", 0.0, MAX_SCALING, default=1.0),
        mode=_one_of(message, "render_mode", MODES),
        degree=int(_number(message, "sh_degree", 0, 3, default=3)),
        want_stats=bool(message.get("want_stats", False)),
    )


def _camera(message: dict, width: int, height: int, device) -> Camera:
    """The viewer sends OpenGL matrices, column by column: y up and z backward become y down and z forward.

    The view-projection matrix and the clipping planes that come along say nothing new: the field of view
    does.
    """
    view = _matrix(message, "view_matrix")
    view[1:3] *= -1.0
    fov_x = _number(message, "fov_x", 1e-4, math.pi - 1e-4)
    fov_y = _number(message, "fov_y", 1e-4, math.pi - 1e-4)
    return Camera(
        name="viewer",  # no training view: it has no exposure of its own
        world_to_camera=torch.from_numpy(view).to(device),
        K=intrinsics_from_fov(fov_x, fov_y, width, height).to(device),
        width=width,
        height=height,
    )


def _shrunk(camera: Camera, pixels: int) -> Camera:
    """The same view with at most so many pixels."""
    factor = math.sqrt(pixels / (camera.width * camera.height))
    if factor >= 1:
        return camera
    width, height = max(int(camera.width * factor), 1), max(int(camera.height * factor), 1)
    width, height = min(width, pixels), min(height, pixels)  # if the other one is 1
    K = camera.K.clone()
    K[0] *= width / camera.width
    K[1] *= height / camera.height
    return replace(camera, K=K, width=width, height=height)


def _matrix(message: dict, key: str) -> np.ndarray:
    values = message.get(key)
    try:
        matrix = np.array(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        matrix = np.empty(0)
    if matrix.shape != (16,) or not np.isfinite(matrix).all():
        raise ViewerError(f"{key} must be 16 finite numbers, got {str(values)[:80]}")
    return np.ascontiguousarray(matrix.reshape(4, 4).T)


def _number(message: dict, key: str, low: float, high: float, default: float | None = None) -> float:
    value = message.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ViewerError(f"{key} must be a number from {low:g} to {high:g}, got {str(value)[:80]}")
    return float(value)


def _one_of(message: dict, key: str, choices: tuple[str, ...]) -> str:
    value = message.get(key, choices[0])
    if value not in choices:
        raise ViewerError(f"{key} must be one of {', '.join(choices)}, got {str(value)[:80]}")
    return value


def _listen(host: str, port: int, log: Callable[[str], None]) -> socket.socket | None:
    """A socket on the first free port at or after `port`; None, and a line, if there is none."""
    error: OSError | None = None
    for candidate in range(port, min(port + PORTS_TO_TRY, 65536)) if port else [0]:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # elsewhere this option would let two trainers share one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, candidate))
            listener.listen(1)
        except OSError as failure:
            listener.close()
            error = failure
            continue
        if candidate != port:
            log(f"viewer port {port} is busy: listening on {host}:{candidate}")
        return listener
    log(f"no viewer: cannot listen on {host}:{port} ({error})")
    return None


def _readable(end: socket.socket, wait: float) -> bool:
    return bool(select.select([end], [], [], wait)[0])


def _send_all(end: socket.socket, message: bytes, deadline: float) -> None:
    rest = memoryview(message)
    while rest:
        end.settimeout(_left(deadline))
        rest = rest[end.send(rest) :]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0.0:
        raise ViewerError(f"a message took longer than {MESSAGE_LIMIT:.0f} s")
    return left
