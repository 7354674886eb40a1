"""The live viewer's wire protocol, spoken over a real socket by good, bad and vanishing clients."""

import contextlib
import json
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch

from gaussian_renderer import network_gui
from gaussian_renderer.network_gui import Viewer, ViewerError, parse_request

SOURCE = "/data/Zürich-東京"


def gradient(request):
    """A picture that tells top from bottom and left from right: red grows with x, green with y."""
    h, w = request.camera.height, request.camera.width
    red = torch.linspace(0, 1, w).expand(h, w)
    green = torch.linspace(0, 1, h)[:, None].expand(h, w)
    return torch.stack([red, green, torch.full((h, w), 2.0)])  # blue is out of range: to be clamped


class Trainer:
    """Calls serve() as a training loop does, and counts the iterations it gets through."""

    def __init__(self, render=gradient):
        self.lines, self.requests, self.iterations, self.served = [], [], 0, 0.0
        self.viewer = Viewer("127.0.0.1", 0, SOURCE, self.lines.append)
        self._render, self._stop = render, False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self):
        while not self._stop:
            start = time.monotonic()
            self.viewer.serve(self._remember)
            self.served += time.monotonic() - start
            self.iterations += 1
            time.sleep(0.001)

    def _remember(self, request):
        self.requests.append(request)
        return self._render(request)

    def goes_on(self) -> bool:
        before = self.iterations
        deadline = time.monotonic() + 5
        while self.iterations < before + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.iterations >= before + 3

    def connect(self) -> socket.socket:
        return socket.create_connection(self.viewer.address, timeout=5)

    def close(self):
        self._stop = True
        self._thread.join(10)
        self.viewer.close()


@pytest.fixture
def trainer():
    trainer = Trainer()
    yield trainer
    trainer.close()


def message(width=7, height=5, **changes) -> bytes:
    fields = {
        "resolution_x": width, "resolution_y": height, "train": True, "fov_y": 0.8, "fov_x": 1.0,
        "z_near": 0.01, "z_far": 100.0, "shs_python": False, "rot_scale_python": False, "keep_alive": False,
        "scaling_modifier": 1.0, "view_matrix": np.eye(4).ravel().tolist(),
        "view_projection_matrix": np.eye(4).ravel().tolist(),
    }  # fmt: skip
    body = json.dumps(fields | changes).encode()
    return struct.pack("<I", len(body)) + body


def receive(client, count: int) -> bytes:
    data = bytearray()  # grows without being copied: pictures have up to 100 MB
    while len(data) < count:
        piece = client.recv(min(count - len(data), 1 << 20))
        assert piece, f"closed after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


def ask(client, width=7, height=5, **changes) -> np.ndarray:
    client.sendall(message(width, height, **changes))
    picture = np.frombuffer(receive(client, width * height * 3), np.uint8).reshape(height, width, 3)
    length = struct.unpack("<I", receive(client, 4))[0]
    assert receive(client, length).decode("utf-8") == SOURCE
    return picture


def expect_picture(picture):
    h, w, _ = picture.shape
    np.testing.assert_allclose(picture[0, :, 0], np.linspace(0, 255, w), atol=0.51)
    np.testing.assert_allclose(picture[:, 0, 1], np.linspace(0, 255, h), atol=0.51)
    assert (picture[..., 2] == 255).all()


def test_pictures_and_path(trainer):
    with trainer.connect() as client:
        for width, height in [(7, 5), (640, 360)]:  # the second one does not fit a socket buffer
            expect_picture(ask(client, width, height))
    assert trainer.goes_on()


def test_no_picture_wanted(trainer):
    with trainer.connect() as client:
        client.sendall(message(0, 0))
        length = struct.unpack("<I", receive(client, 4))[0]
        assert receive(client, length).decode("utf-8") == SOURCE
    assert not trainer.requests


def test_request_in_pieces(trainer):
    with trainer.connect() as client:
        data = message()
        for start in range(0, len(data), 50):
            client.sendall(data[start : start + 50])
            time.sleep(0.002)
        expect_picture(np.frombuffer(receive(client, 105), np.uint8).reshape(5, 7, 3))


def test_camera_is_the_one_the_viewer_means():
    # A COLMAP-style camera, and the matrix an OpenGL viewer would send for it: y and z rows negated, by
    # columns.
    world_to_camera = np.eye(4, dtype=np.float32)
    world_to_camera[:3, :3] = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    world_to_camera[:3, 3] = [0.3, -0.2, 4.0]
    opengl = np.diag([1.0, -1.0, -1.0, 1.0]) @ world_to_camera
    body = message(200, 100, view_matrix=opengl.T.ravel().tolist(), scaling_modifier=0.5, fov_x=1.2)[4:]
    request = parse_request(body)
    np.testing.assert_allclose(request.camera.world_to_camera, world_to_camera, atol=1e-6)
    # fx = 100 / tan(0.6), fy = 50 / tan(0.4)
    np.testing.assert_allclose(request.camera.K, [[146.17, 0, 100], [0, 118.26, 50], [0, 0, 1]], atol=0.01)
    np.testing.assert_allclose(
        request.camera.center, -world_to_camera[:3, :3].T @ [0.3, -0.2, 4.0], atol=1e-5
    )
    assert request.scaling_modifier == 0.5 and request.train and not request.keep_alive


def test_paused_until_told_to_go_on(trainer):
    with trainer.connect() as client:
        ask(client, train=False)
        before = trainer.iterations
        for _ in range(5):
            expect_picture(ask(client, train=False))
        assert trainer.iterations == before
        ask(client, train=True)
        assert trainer.goes_on()


def test_connected_client_that_says_nothing_does_not_stop_training(trainer):
    with trainer.connect():
        assert trainer.goes_on()


def test_client_that_vanishes_while_paused(trainer):
    client = trainer.connect()
    ask(client, train=False)
    client.close()
    assert trainer.goes_on()


def test_silent_client_that_paused_is_given_up(monkeypatch):
    monkeypatch.setattr(network_gui, "IDLE_LIMIT", 0.2)
    trainer = Trainer()
    try:
        with trainer.connect() as client:
            ask(client, train=False)
            assert trainer.goes_on()
    finally:
        trainer.close()
    assert any("silent" in line for line in trainer.lines)


def test_stalled_message_is_given_up(monkeypatch):
    monkeypatch.setattr(network_gui, "MESSAGE_LIMIT", 0.2)
    trainer = Trainer()
    try:
        with trainer.connect() as stalls, trainer.connect() as patient:
            stalls.sendall(message()[:40])
            expect_picture(ask(patient))
    finally:
        trainer.close()


def test_a_message_that_trickles_in_does_not_hold_up_training(monkeypatch):
    monkeypatch.setattr(network_gui, "MESSAGE_LIMIT", 1.0)
    trainer = Trainer()
    try:
        with trainer.connect() as client:
            expect_picture(ask(client))
            for byte in message()[:20]:
                before = trainer.iterations
                client.sendall(bytes([byte]))
                assert trainer.goes_on() and trainer.iterations > before
            deadline = time.monotonic() + 5
            while not any("took longer" in line for line in trainer.lines):
                assert time.monotonic() < deadline, "it is dropped in the end"
                time.sleep(0.01)
        with trainer.connect() as client:
            expect_picture(ask(client))
    finally:
        trainer.close()


def test_only_this_machine_can_connect_unless_told_otherwise():
    from arguments import RunParams

    assert RunParams().ip == "127.0.0.1"
    viewer = Viewer(port=0)
    assert viewer.address[0] == "127.0.0.1"
    viewer.close()


def test_garbage_on_the_wire(trainer):
    """Damaged messages over a real socket; memory for one is bounded by MAX_REQUEST."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        data = bytearray(message())
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        with trainer.connect() as client, contextlib.suppress(OSError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert trainer.goes_on()
    with trainer.connect() as client:
        expect_picture(ask(client))


class Slow:
    """Renders so many pixels a second, and keeps account of it."""

    def __init__(self, speed: float):
        self.speed, self.sizes, self.seconds = speed, [], []

    def __call__(self, request):
        start = time.monotonic()
        picture = gradient(request)
        pixels = picture[0].numel()
        time.sleep(max(pixels / self.speed - (time.monotonic() - start), 0))
        self.sizes.append(pixels)
        self.seconds.append(time.monotonic() - start)
        return picture


def test_training_gets_half_of_the_time_while_a_viewer_floods_it():
    slow = Slow(5e6)
    trainer = Trainer(slow)
    try:
        with trainer.connect() as client:
            start = time.monotonic()
            client.sendall(message(400, 250) * 200)
            while time.monotonic() < start + 1.5:
                assert client.recv(1 << 20)
            seconds = time.monotonic() - start
        assert len(slow.seconds) > 10, "the viewer is served"
        assert trainer.served < 0.55 * seconds
        assert trainer.goes_on()
    finally:
        trainer.close()


def test_training_gets_half_of_the_time_while_nobody_takes_the_pictures(monkeypatch):
    monkeypatch.setattr(network_gui, "MESSAGE_LIMIT", 0.25)
    trainer = Trainer()
    try:
        start = time.monotonic()
        while time.monotonic() < start + 2:
            dropped = len(trainer.lines)
            with trainer.connect() as client:
                client.sendall(message(4000, 2000))
                while len(trainer.lines) < dropped + 2 and time.monotonic() < start + 2:
                    time.sleep(0.001)
        assert trainer.served < 0.6 * (time.monotonic() - start)
        assert sum("disconnected" in line for line in trainer.lines) >= 2
    finally:
        trainer.close()


def test_large_pictures_take_no_longer_than_small_ones():
    slow = Slow(4e6)
    trainer = Trainer(slow)
    try:
        with trainer.connect() as client:
            for width, height in ((7680, 4320), (3840, 2160), (3840, 2160)):
                picture = ask(client, width, height)
                np.testing.assert_allclose(picture[0, :, 0], np.linspace(0, 255, width), atol=2)
                np.testing.assert_allclose(picture[:, 0, 1], np.linspace(0, 255, height), atol=2)
        assert max(slow.sizes) <= network_gui.RENDERED_PIXELS["cpu"] and min(slow.sizes) > 200_000
        slow.speed = 5e5  # what is seen now is hard to render
        with trainer.connect() as client:
            for _ in range(4):
                ask(client, 1920, 1080)
        assert slow.sizes[-1] < 130_000, "0.25 s"
    finally:
        trainer.close()
    assert sum("rendered smaller and enlarged" in line for line in trainer.lines) == 2, "once for each client"


@pytest.mark.parametrize("size", [(7680, 4320), (1, 65536), (65535, 511), (300, 200)])
def test_a_smaller_picture_shows_the_same(size):
    camera = parse_request(message(*size)[4:]).camera
    smaller = network_gui._shrunk(camera, 50_000)
    assert 0.95 * min(50_000, size[0] * size[1]) < smaller.width * smaller.height <= 50_000
    assert smaller.fovx == pytest.approx(camera.fovx) and smaller.fovy == pytest.approx(camera.fovy)
    np.testing.assert_allclose(smaller.K[:2, 2], [smaller.width / 2, smaller.height / 2], rtol=1e-5)


BAD = {
    "a length of four gigabytes": b"\xff\xff\xff\xff",
    "random bytes": np.random.default_rng(1).bytes(5000),
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no JSON": struct.pack("<I", 5) + b"hello",
    "no UTF-8": struct.pack("<I", 2) + b"\xff\xfe",
    "an empty message": struct.pack("<I", 0),
    "a list": struct.pack("<I", 2) + b"[]",
    "deep nesting": struct.pack("<I", 60000) + b"[" * 60000,
    "no matrix": message(view_matrix=None),
    "a short matrix": message(view_matrix=[1.0] * 15),
    "text in the matrix": message(view_matrix=["a"] * 16),
    "NaN in the matrix": message(view_matrix=[float("nan")] * 16),
    "a terapixel": message(1_000_000, 1_000_000),
    "a negative size": message(-4, 4),
    "field of view 0": message(fov_x=0.0),
    "field of view as text": message(fov_y="wide"),
    "infinite scaling": message(scaling_modifier=float("inf")),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_client_is_dropped_and_the_next_one_served(trainer, data):
    with trainer.connect() as client:
        with contextlib.suppress(OSError):  # dropped already, perhaps
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert trainer.goes_on() and not trainer.requests
    with trainer.connect() as client:
        expect_picture(ask(client))


def test_fuzzed_requests_end_in_a_request_or_a_viewer_error():
    rng = np.random.default_rng(0)
    good, accepted = message()[4:], 0
    for _ in range(2000):
        body = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            body[rng.integers(len(body))] = rng.integers(256)
        try:
            parse_request(bytes(body))
            accepted += 1
        except ViewerError:
            pass
    assert 20 < accepted < 1980, "some damage is a number that changed, some is refused"


@pytest.mark.parametrize("sent", [0, 2, 4, 50])
def test_client_that_vanishes(trainer, sent):
    client = trainer.connect()
    client.sendall(message()[:sent])
    client.close()
    assert trainer.goes_on()


def test_client_that_does_not_wait_for_its_picture(trainer):
    client = trainer.connect()
    client.sendall(message(1500, 1000) * 3)
    client.close()
    assert trainer.goes_on()


def test_renderer_that_fails_costs_the_client_only():
    def fails(request):
        raise RuntimeError("out of memory")

    trainer = Trainer(fails)
    try:
        with trainer.connect() as client:
            client.sendall(message())
            assert client.recv(1) == b""
        assert trainer.goes_on()
    finally:
        trainer.close()
    assert any("out of memory" in line for line in trainer.lines)


def test_after_training_a_client_is_kept_only_if_it_wants_to(trainer):
    trainer._stop = True
    trainer._thread.join()
    with trainer.connect() as client:
        client.sendall(message(keep_alive=True) + message(keep_alive=True) + message(keep_alive=False))
        trainer.viewer.serve(trainer._remember, training_ended=False)  # meets the first message
        trainer.viewer.serve(trainer._remember, training_ended=True)
    assert len(trainer.requests) == 3


def test_busy_port_goes_to_the_next_one():
    lines = []
    first = Viewer("127.0.0.1", 0, SOURCE, lines.append)
    port = first.address[1]
    second = Viewer("127.0.0.1", port, SOURCE, lines.append)
    try:
        assert second.address[1] > port
        assert lines == [f"viewer port {port} is busy: listening on 127.0.0.1:{second.address[1]}"]
    finally:
        first.close()
        second.close()


def test_address_that_is_not_ours_means_no_viewer_and_no_error():
    lines = []
    viewer = Viewer("203.0.113.7", 6009, SOURCE, lines.append)
    viewer.serve(gradient)
    viewer.close()
    assert viewer.address is None and lines[0].startswith("no viewer: cannot listen on 203.0.113.7:6009")
