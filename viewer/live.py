"""A run that is training, looked at from outside: the client's end of gaussian_renderer/network_gui.py.

It never asks for more than a share of the trainer's time: less than a hundredth for a view that rests, what
the server computes and all else included, and a quarter for one that moves.
"""

import json
import socket
import threading
import time
from pathlib import Path

import numpy as np

from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json

RESTING, MOVING = 0.007, 0.25  # of the trainer's time, for pictures
PATIENCE = 60.0  # seconds for one answer; a step can be slow on a CPU
LONGEST_TEXT = 1 << 20  # bytes of the path and what follows it
SHORTEST_WAIT = 0.5  # seconds between two pictures of a view that rests
CURVE = 400  # points


class NoTrainer(DataError):
    """Nobody is training there, or nobody answers."""


class Trainer:
    """Connects when asked for something, and again when that broke."""

    def __init__(self, folder: ModelFolder):
        self._folder = folder
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._free_at = 0.0  # from when the trainer may be bothered again
        self.paused = False
        self.stats: dict = {}
        self.curve: list[tuple[int, float, int]] = []  # iteration, loss, number of Gaussians

    def there(self) -> bool:
        """Does a run say that it can be looked at?"""
        return self._folder.viewer.is_file()

    def state(self) -> dict:
        """What the run told last; asked for anew unless a picture is on its way."""
        if self._lock.acquire(timeout=0.1):
            try:
                self._ask({"resolution_x": 0, "resolution_y": 0})
            finally:
                self._lock.release()
        return self.stats | {"paused": self.paused, "curve": self.curve}

    def pause(self, on: bool) -> None:
        """A trainer that hears nothing for a minute goes on by itself."""
        with self._lock:
            self.paused = on
            self._ask({"resolution_x": 0, "resolution_y": 0})

    def picture(self, camera: Camera, mode: str, scale: float, degree: int, still: bool):
        """uint8 [H, W, 3], and after how many seconds there may be another one of the same view."""
        message = view_message(camera) | {
            "render_mode": mode, "scaling_modifier": scale, "sh_degree": degree,
        }  # fmt: skip
        with self._lock:
            if not self.paused:
                time.sleep(min(5.0, max(0.0, self._free_at - time.monotonic())))
            begun = time.monotonic()
            pixels = self._ask(message, 3 * camera.width * camera.height)
            seconds = self.stats.get("picture_seconds", time.monotonic() - begun)
            self._free_at = time.monotonic() + seconds * (1 / MOVING - 1)
        image = np.frombuffer(pixels, np.uint8).reshape(camera.height, camera.width, 3)
        return image, max(SHORTEST_WAIT, seconds / RESTING) if still and not self.paused else 0.0

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None

    # The protocol

    def _ask(self, message: dict, size: int = 0) -> bytes:
        message |= {"train": not self.paused, "keep_alive": False, "want_stats": True}
        body = json.dumps(message).encode()
        try:
            connection = self._connected()
            connection.sendall(len(body).to_bytes(4, "little") + body)
            pixels = _receive(connection, size)
            length = int.from_bytes(_receive(connection, 4), "little")
            if length > LONGEST_TEXT:
                raise OSError("it speaks another protocol")
            self._hear(_receive(connection, length))
        except (OSError, ValueError) as error:
            self.close()
            self.paused = False
            raise NoTrainer(f"the run does not answer ({error}); the last picture stays") from None
        return pixels

    def _connected(self) -> socket.socket:
        if self._socket is None:
            if not self.there():
                raise OSError("it is not training")
            told = read_json(self._folder.viewer)
            self._socket = socket.create_connection((str(told.get("ip")), int(told.get("port", 0))), 5.0)
            self._socket.settimeout(PATIENCE)
        return self._socket

    def _hear(self, told: bytes) -> None:
        """The path of the data set, and after a zero byte what we wanted to know."""
        _, _, stats = told.partition(b"\0")
        self.stats = json.loads(stats) if stats else {}
        path = self.stats.get("model_path")
        if path and Path(path) != self._folder.path.absolute():
            raise OSError(f"another run is there: {path}")
        loss = self.stats.get("losses", {}).get("loss")
        if loss and (not self.curve or self.curve[-1][0] < self.stats["iteration"]):
            self.curve.append((self.stats["iteration"], loss, self.stats.get("gaussians", 0)))
            if len(self.curve) > CURVE:
                del self.curve[1::2]


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise OSError("it has closed the connection")
        data += piece
    return bytes(data)


def view_message(camera: Camera) -> dict:
    """A camera as SIBR says it: OpenGL's axes, column by column."""
    view = camera.world_to_camera.cpu().double().numpy().copy()
    view[1:3] *= -1
    return {
        "resolution_x": camera.width,
        "resolution_y": camera.height,
        "fov_x": camera.fovx,
        "fov_y": camera.fovy,
        "z_near": 0.01,
        "z_far": 100.0,
        "shs_python": False,
        "rot_scale_python": False,
        "view_matrix": view.T.ravel().tolist(),
        "view_projection_matrix": np.eye(4).ravel().tolist(),
    }
