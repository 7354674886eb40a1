"""view.py: pictures of finished models and of runs, and everything that may come over the wire."""

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import render
import train
import view
from gaussian_renderer import network_gui
from gaussian_renderer.network_gui import Viewer, ViewerError, parse_request
from scene import formats
from scene.folder import ModelFolder
from tests import tiny_scenes
from tests.browser import Tab, psnr
from tests.test_page import scene as some_splats
from tests.test_viewer import message
from viewer.live import NoTrainer, Trainer
from viewer.pictures import Pictures, camera_at
from viewer.server import Handler, Server, Site, is_this_machine

ROOT = Path(__file__).parents[1]
CASES = int(os.environ.get("TILESPLAT_FUZZ", 300))
SIZE = (tiny_scenes.WIDTH, tiny_scenes.HEIGHT)
FREE = "0,0,-4,1,0,0,0,1,0,0,0,1,60,60,28,20"  # a camera in front of the blobs, for 56 x 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """A model after 20 steps, saved at 10, too, with its test views rendered."""
    folder = tmp_path_factory.mktemp("models") / "m"
    run_training(data, folder, 20, "--save_iterations", "10", "--disable_viewer")
    assert render.main(["-m", str(folder), "--quiet", "--device", "cpu"]) == 0
    return folder


def run_training(data: Path, folder: Path, steps: int, *flags: str) -> None:
    start = ["-s", str(data), "-m", str(folder), "--iterations", str(steps), "--eval", "--llffhold", "4"]
    assert train.main([*start, "--device", "cpu", "--quiet", *flags]) == 0


class Served:
    """A server in a thread, and a client of it."""

    def __init__(self, source, trainer=None):
        self.site = Site(Pictures(source, torch.device("cpu")), trainer)
        self.server = Server(self.site, "127.0.0.1", 0)
        self.port = self.server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/?t={self.site.token}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def get(self, path: str, *args, **more) -> tuple[int, bytes]:
        return self.ask(path, *args, **more)[:2]

    def ask(
        self, path: str, method="GET", token: str | None = None, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        token = self.site.token if token is None else token
        url = f"http://127.0.0.1:{self.port}{path}{'&' if '?' in path else '?'}t={token}"
        request = urllib.request.Request(url, body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def picture(self, query: str) -> np.ndarray:
        status, body = self.get(f"/frame?{query}")
        assert status == 200, body
        return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))

    def raw(self, data: bytes) -> bytes:
        """Bytes on the wire, and what comes back until the end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as wire:
            answer = b""
            try:
                wire.sendall(data)
                wire.shutdown(socket.SHUT_WR)
                while piece := wire.recv(65536):
                    answer += piece
            except OSError:
                pass  # it may hang up in the middle
            return answer

    def alive(self) -> bool:
        return self.get("/state")[0] == 200

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def served(folder):
    server = Served(ModelFolder(folder))
    yield server
    server.close()


def test_pictures_are_those_of_render_py(served, folder):
    cameras = [camera["img_name"] for camera in json.loads((folder / "cameras.json").read_text())]
    for views in ("test", "train"):
        made = folder / views / "ours_20"
        for file, name in json.loads((made / "names.json").read_text()).items():
            number = cameras.index(name)
            for part, ours in (("renders", f"/frame?camera={number}"), ("gt", f"/photo?camera={number}")):
                status, body = served.get(ours)
                assert status == 200
                shown, truth = (np.asarray(Image.open(f)) for f in (io.BytesIO(body), made / part / file))
                np.testing.assert_array_equal(shown, truth)


def test_all_kinds_of_pictures(served):
    seen = {}
    for mode in ("color", "depth", "alpha", "normals", "centers", "ellipsoids", "error"):
        where = "camera=0" if mode == "error" else f"view={FREE}"
        seen[mode] = served.picture(f"{where}&w={SIZE[0]}&h={SIZE[1]}&mode={mode}")
        assert seen[mode].shape == (SIZE[1], SIZE[0], 3) and seen[mode].std() > 1, mode
    assert all((seen[a] != seen[b]).any() for a in seen for b in seen if a < b), "each is its own"
    assert (served.picture(f"view={FREE}&w=56&h=40&scale=0.2") != seen["color"]).any()
    assert (served.picture(f"view={FREE}&w=56&h=40&iteration=10") != seen["color"]).any()
    assert served.picture("camera=0&w=28&h=28").shape == (20, 28, 3), "as large as fits"
    assert served.get(f"/frame?view={FREE}&w=56&h=40&still=0")[1][:2] == b"\xff\xd8", "JPEG"


def test_splats_for_the_browser(served, folder):
    exact = served.get("/splats?exact=1")[1]
    assert exact == (folder / "point_cloud/iteration_20/point_cloud.ply").read_bytes()
    assert served.get("/splats?iteration=10")[1][:2] == b"\x1f\x8b"


def test_both_sources_show_the_same_in_a_browser(browser, served, folder):
    tab = Tab(browser, SIZE).open(f"{served.address}#camera=0")
    tab.do("$.source.value = 'floats', $.source.onchange(), 0")
    tab.until("$.said.textContent !== 'loading' && window.__ready")
    drawn = tab.picture()
    tab.do("$.source.value = 'exact', $.source.onchange(), 0")
    tab.until("source === 'exact' && window.__ready && !$.exact.hidden")
    tab.do("[$.marks.width, $.marks.height] = [$.picture.width, $.picture.height], "
           "$.marks.getContext('2d').drawImage($.exact, 0, 0)")  # fmt: skip
    assert psnr(drawn, tab.picture("$.marks")) >= 50
    tab.do("$.split.value = 50, $.split.oninput()")
    assert tab.page.is_visible("#photo") and tab.do("$.photo.naturalWidth") == SIZE[0]
    tab.do("$.frames.checked = true, step(1)")
    assert "shot" in tab.wait().do("$.said.textContent")
    assert [o for o in tab.do("[...$.iteration.options].map((o) => o.value)")] == ["20", "10"]
    tab.open(f"{served.address}#camera=0&mode=error")
    assert tab.do("look.mode") == "error" and tab.page.is_visible("#exact"), "a link is the view"
    assert not tab.complaints
    assert all(url.startswith(("http://127.0.0.1", "about", "blob", "data")) for url in tab.requests)


def test_a_browser_that_cannot_draw_asks_our_rasterizer(browser, served):
    tab = Tab(browser, SIZE)
    tab.page.add_init_script("HTMLCanvasElement.prototype.getContext = (get => function (kind, ...more) {"
                             " return kind === 'webgl2' ? null : get.call(this, kind, ...more); })"
                             "(HTMLCanvasElement.prototype.getContext);")  # fmt: skip
    tab.open(f"{served.address}#camera=0")
    assert tab.do("source") == "exact" and tab.page.is_visible("#exact") and not tab.complaints


def test_a_file_of_splats(tmp_path):
    formats.write(some_splats(200), tmp_path / "a.spz")
    server = Served(tmp_path / "a.spz")
    try:
        assert server.picture(f"view={FREE}&w=56&h=40").std() > 10
        told = re.search(r'id="scene">(.*?)</script>', server.get("/")[1].decode())[1]
        middle = some_splats(200).means.detach().median(0).values
        np.testing.assert_allclose(json.loads(told)["middle"], middle, atol=0.1)
        assert server.get("/frame?camera=0")[0] == 400 and server.get("/photo?camera=0")[0] == 400
    finally:
        server.close()


def test_a_file_dropped_on_the_page(browser, served, tmp_path):
    tab = Tab(browser, SIZE).open(f"{served.address}#camera=0")
    before = tab.picture()
    drop = (
        "(text) => { const given = new DataTransfer();"
        " const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));"
        " given.items.add(new File([bytes], 'dropped'));"
        " document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: given, bubbles: true })); }"
    )
    for count, name in ((205, "a.ply"), (206, "a.spz")):
        formats.write(some_splats(count), tmp_path / name)
        tab.do(f"({drop})('{base64.b64encode((tmp_path / name).read_bytes()).decode()}')")
        tab.until(f"$.said.textContent.includes('{count} splats') && window.__ready")
        assert tab.do("splats.count") == count and (tab.picture() != before).any()
    tab.do(f"({drop})('{base64.b64encode(b'a letter').decode()}')")
    tab.until("$.said.textContent.includes('neither a .ply nor an .spz')")
    assert not tab.complaints
    tab.close()


def test_a_voxel_grid_is_drawn_by_us(browser, data, tmp_path):
    tiny = "--method dvgo --iterations 30 --coarse_iters 20 --N_rand 64 --num_voxels_coarse 4000"
    tiny += " --alpha_init_coarse 1e-2"
    tiny += " --num_voxels 8000 --rgbnet_width 8 --disable_viewer --quiet --device cpu"
    assert train.main(["-s", str(data), "-m", str(tmp_path / "m"), *tiny.split()]) == 0
    server = Served(ModelFolder(tmp_path / "m"))
    try:
        pictures = [
            server.picture(f"camera=0&mode={mode}") for mode in ("color", "depth", "alpha", "normals")
        ]
        assert len({picture.tobytes() for picture in pictures}) == 4
        tab = Tab(browser, SIZE).open(f"{server.address}#camera=0&mode=depth")
        assert tab.do("source") == "exact" and tab.page.is_visible("#exact") and not tab.complaints
        assert not tab.page.is_visible("#scale") and "ellipsoids" not in tab.page.inner_text("#mode")
    finally:
        server.close()


def test_a_normalized_model(browser, data, tmp_path):
    """It lies elsewhere when it is loaded; the page knows the data set's coordinates alone."""
    folder = tmp_path / "m"
    run_training(data, folder, 20, "--disable_viewer", "--normalize")
    assert (folder / "normalization.json").is_file()
    assert render.main(["-m", str(folder), "--quiet", "--device", "cpu"]) == 0
    server = Served(ModelFolder(folder))
    entry = json.loads((folder / "cameras.json").read_text())[0]
    made = np.asarray(Image.open(folder / "test/ours_20/renders/00000.png"))
    lens = [entry["fx"], entry["fy"], entry["width"] / 2, entry["height"] / 2]
    free = ",".join(str(v) for v in [*entry["position"], *np.ravel(entry["rotation"]), *lens])
    try:
        np.testing.assert_array_equal(server.picture("camera=0"), made)
        assert psnr(server.picture(f"view={free}&w={SIZE[0]}&h={SIZE[1]}"), made) >= 50
        tab = Tab(browser, SIZE).open(f"{server.address}#camera=0")
        tab.do("$.source.value = 'floats', $.source.onchange(), 0")
        tab.until("$.said.textContent !== 'loading' && window.__ready")
        assert psnr(tab.picture(), made) >= 50
    finally:
        server.close()


def test_a_camera_path_is_kept(browser, served, folder):
    """Made in the page, as nerfstudio's file: matrices from OpenGL's camera to the world, row by row."""
    tab = Tab(browser, SIZE).open(f"{served.address}#camera=0")
    for number in (0, 1, 2):
        tab.do(f"show(scene.cameras[{number}], {number}), KEYS.k()")
    tab.do("moveKey(-1), $.seconds.value = 4, 0")
    ends = tab.do("[between(0, 0), between(0, 1)].map((v) => [...v.place, ...v.turn])")
    keys = tab.do("path.slice(0, 2).map((v) => [...v.place, ...v.turn])")
    np.testing.assert_allclose(ends, keys, atol=1e-6)
    half = np.reshape(tab.do("between(0, 0.5).turn"), (3, 3))
    np.testing.assert_allclose(half @ half.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(half) > 0
    tab.do("save()")
    tab.until("$.said.textContent.includes('camera_path.json')")
    assert not tab.complaints
    data = json.loads((folder / "camera_path.json").read_text())
    assert data["seconds"] == 4 and data["is_cycle"] and len(data["keyframes"]) == 3
    entries = json.loads((folder / "cameras.json").read_text())
    for key, number in zip(data["keyframes"], (0, 2, 1)):
        matrix, entry = np.reshape(key["matrix"], (4, 4)), entries[number]
        np.testing.assert_allclose(matrix[:3, 3], entry["position"], atol=1e-6)
        np.testing.assert_allclose(matrix[:3, :3], entry["rotation"] @ np.diag([1, -1, -1]), atol=1e-6)
        focal = entry["height"] / 2 / np.tan(np.radians(key["fov"]) / 2)
        assert focal == pytest.approx(entry["fy"])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"keyframes": 5}', b"[" * 100_000, b"\xff"])
def test_a_camera_path_that_is_none(served, body):
    assert served.get("/path", "POST", body=body)[0] == 400


def test_bodies_without_end(served):
    start = f"POST /path?t={served.site.token} HTTP/1.1\r\nHost: localhost\r\nContent-Length: ".encode()
    for length, status in ((b"-1", 413), (b"1e3", 413), (b"99999999999", 413), (b"", 413), (b"10", 400)):
        assert f" {status} ".encode() in served.raw(start + length + b"\r\n\r\n{}")[:20]
    assert served.alive()


# Who may ask, and for what


def test_only_those_who_know_the_token(served):
    for token in ("", "x", served.site.token[:-1], served.site.token + "x", "%00"):
        for path in ("/", "/frame?camera=0", "/splats", "/state", "/photo?camera=0"):
            assert served.get(path, token=token)[0] == 403
    assert served.get("/pause?on=1", "POST", token="x")[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "10.0.0.1"]
)
def test_only_by_the_name_of_this_machine(served, host):
    assert served.get("/state", Host=host)[0] == 403


def test_where_others_may_look():
    """With --host they ask for an address, or for the name that was given."""
    for name, listens in (("192.168.0.7", "0.0.0.0"), ("[fe80::1]", "0.0.0.0"), ("box.lan", "box.lan")):
        assert is_this_machine(name, listens) and not is_this_machine(name, "127.0.0.1")
    assert not is_this_machine("evil.example", "0.0.0.0")


def test_by_the_other_names_of_this_machine(served):
    for host in ("localhost", "127.0.0.1:1234", "[::1]:80"):
        assert served.get("/state", Host=host)[0] == 200


def test_not_for_pages_of_others(served):
    own = f"http://127.0.0.1:{served.port}"
    assert served.get("/pause?on=1", "POST", Origin="http://evil.example")[0] == 403
    assert served.get("/state", Origin="null")[0] == 403
    assert served.get("/pause?on=1", "POST", Origin=own)[0] == 404, "no run is there"
    assert served.get("/pause?on=1")[0] == 404 and served.get("/state", "POST")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/config.json",
        "/viewer/page.html",
        "/frame/",
    ],
)
def test_nothing_else_is_served(served, path):
    assert served.get(path)[0] == 404


@pytest.mark.parametrize(
    "query",
    [
        "", "camera=-1", "camera=99", "camera=1.5", "camera=nan", "camera=0&mode=x", "mode=error",
        f"view={FREE}", f"view={FREE}&w=0&h=4", f"view={FREE}&w=65536&h=65536", f"view={FREE}&w=1e9&h=1",
        f"view={FREE.replace('60', 'nan')}&w=56&h=40", f"view={FREE.replace('60', 'inf')}&w=56&h=40",
        f"view={FREE.replace('-4', '1e300')}&w=56&h=40", f"view={FREE.replace('60', '0')}&w=56&h=40",
        f"view={FREE.replace('1,', '2,')}&w=56&h=40", "view=1,2,3&w=56&h=40",
        f"view={FREE}&w=56&h=40&scale=-1", f"view={FREE}&w=56&h=40&degree=9", "camera=0&still=7",
        "camera=0&" + "a=1&" * 200,
    ],
)  # fmt: skip
def test_what_cannot_be_meant(served, query):
    status, text = served.get(f"/frame?{query}")
    assert 400 <= status < 500 and text, "with a reason"
    assert served.get("/frame?camera=0&iteration=15")[0] == 404


def test_fuzzed_requests_never_end_it(served):
    rng = random.Random(0)
    good = (
        f"GET /frame?t={served.site.token}&view={FREE}&w=56&h=40 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    )
    answered = []
    for case in range(CASES):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if case % 5 == 0:
            data = data[: rng.randrange(len(data))]
        if case % 7 == 0:
            data = bytearray(rng.randbytes(rng.randint(1, 2000)))
        answered.append(served.raw(bytes(data))[:12])
    assert served.alive()
    assert any(b" 200" in a for a in answered) and any(b" 40" in a for a in answered)
    assert not any(b" 500" in a for a in answered)


def test_endless_headers_and_lines(served):
    for data in (b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500, b"\0" * 5000):
        assert b" 200" not in served.raw(data)[:20]
    assert served.alive()


def test_silent_and_vanishing_clients_hold_nobody_up(served):
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
    silent[0].sendall(b"GET /frame?")
    gone = socket.create_connection(("127.0.0.1", served.port))
    gone.sendall(f"GET /splats?exact=1&t={served.site.token} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    gone.close()
    begun = time.monotonic()
    assert served.alive() and time.monotonic() - begun < 5
    for client in silent:
        client.close()


def test_it_listens_on_this_machine_only(served):
    assert served.server.server_address[0] == "127.0.0.1"


def test_the_command_says_where_and_ends_at_once(folder):
    command = [sys.executable, str(ROOT / "view.py"), "-m", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    address = re.search(r"http://127\.0\.0\.1:\d+/\?t=\S+", process.stdout.readline())[0]
    with urllib.request.urlopen(address, timeout=60) as reply:
        assert b"<canvas" in reply.read()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - begun < 10  # seconds, on a busy machine


@pytest.mark.parametrize(
    "flags, said",
    [
        (["x.ply"], "there is no such file"),
        (["x.txt"], "must end in"),
        (["-m", "nowhere"], "was it trained?"),
    ],
)
def test_nothing_to_look_at(flags, said, capsys):
    assert view.main(flags) == 1
    assert said in capsys.readouterr().err


# Live


def test_keys_of_the_page_are_checked():
    request = parse_request(message(render_mode="depth", sh_degree=1, want_stats=True)[4:])
    assert (request.mode, request.degree, request.want_stats) == ("depth", 1, True)
    plain = parse_request(message()[4:])
    assert (plain.mode, plain.degree, plain.want_stats) == ("color", 3, False)
    for wrong in ({"render_mode": "x"}, {"render_mode": []}, {"sh_degree": 7}, {"sh_degree": "a"}):
        with pytest.raises(ViewerError, match=next(iter(wrong))):
            parse_request(message(**wrong)[4:])


class Running:
    """train.py in a process of its own, and the page's end of the wire."""

    def __init__(self, data: Path, folder: Path, steps: int):
        flags = ["--eval", "--llffhold", "4", "--device", "cpu", "--quiet", "--port", "0"]
        start = [
            sys.executable,
            str(ROOT / "train.py"),
            "-s",
            str(data),
            "-m",
            str(folder),
            "--iterations",
            str(steps),
        ]
        self.process = subprocess.Popen([*start, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.trainer = Trainer(ModelFolder(folder))
        deadline = time.monotonic() + 120
        while not self.trainer.there():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    def picture(self, mode="color", still=False):
        camera = camera_at([0, 0, -4], np.eye(3), (60, 60, 28, 20), SIZE, torch.device("cpu"))
        return self.trainer.picture(camera, mode, 1.0, 3, still)

    def close(self):
        self.trainer.close()
        self.process.kill()
        self.process.wait()


def test_a_run_that_is_watched_ends_with_the_same_model(data, tmp_path):
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    run_training(data, alone, 300, "--disable_viewer")
    run = Running(data, watched, 300)
    try:
        pictures = 0
        while run.process.poll() is None:
            try:
                image, _ = run.picture(("color", "depth", "ellipsoids")[pictures % 3])
            except NoTrainer:
                break  # it has ended
            assert image.shape == (SIZE[1], SIZE[0], 3)
            pictures += 1
        assert run.process.wait(60) == 0 and pictures >= 3
    finally:
        run.close()
    ply = "point_cloud/iteration_300/point_cloud.ply"
    assert (watched / ply).read_bytes() == (alone / ply).read_bytes()
    assert not (watched / "viewer.json").exists()


def test_a_page_that_vanishes_while_paused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(network_gui, "IDLE_LIMIT", 0.5)
    folder, serve = tmp_path / "m", Viewer.serve
    trainer = Trainer(ModelFolder(folder))

    def patient(self, *args, **more):
        """Training waits for the page, however busy the machine is."""
        serve(self, *args, **more)
        while not trainer.stats:
            serve(self, *args, **more)
            time.sleep(0.001)

    monkeypatch.setattr(Viewer, "serve", patient)
    thread = threading.Thread(target=run_training, args=(data, folder, 50, "--port", "0"))
    thread.start()
    while not trainer.there():
        assert thread.is_alive()
        time.sleep(0.01)
    trainer.pause(True)
    assert trainer.stats["iteration"] < 50
    thread.join(120)
    assert not thread.is_alive() and (folder / "point_cloud/iteration_50/point_cloud.ply").is_file()
    with pytest.raises(NoTrainer, match="does not answer"):
        trainer.state()
    assert not trainer.paused


@pytest.fixture(scope="module")
def endless(data, tmp_path_factory):
    """A run that trains until it is killed, and a server for it."""
    folder = tmp_path_factory.mktemp("endless") / "m"
    run = Running(data, folder, 1_000_000)
    server = Served(ModelFolder(folder), run.trainer)
    yield run, server
    server.close()
    run.close()


def test_numbers_and_pause(endless):
    """Through the server, as the page does it."""
    _, server = endless

    def state() -> dict:
        status, body = server.get("/state")
        assert status == 200, body
        return json.loads(body)

    first = state()
    assert first["live"] and first["iterations"] == 1_000_000 and first["gaussians"] > 0
    assert '["training"' in server.get("/")[1].decode()
    assert server.get("/pause?on=1", "POST")[0] == 200
    paused = state()
    time.sleep(1)
    assert paused["paused"] and state()["iteration"] == paused["iteration"], "it stands still"
    asked = f"view={FREE}&w=56&h=40&source=training"
    assert server.picture(asked).std() > 1
    np.testing.assert_array_equal(server.picture(asked), server.picture(asked))
    assert server.get("/pause?on=0", "POST")[0] == 200
    deadline = time.monotonic() + 30
    while state()["iteration"] <= paused["iteration"]:
        assert time.monotonic() < deadline
    assert "losses" in state()


def test_the_page_of_a_run(browser, endless):
    _, server = endless
    tab = Tab(browser, (400, 300)).open(server.address)
    assert tab.do("source") == "training" and tab.page.is_visible("#exact")
    tab.until("/^iteration [0-9]+ of 1000000, [0-9,]+ splats, loss/.test($.said.textContent)")
    tab.until("!$.curve.hasAttribute('hidden')")
    tab.until("[...$.curve.querySelectorAll('path')].every((p) => p.getAttribute('d').includes('L'))")
    tab.page.click("#pause")
    tab.until("$.pause.textContent === 'resume' && window.__ready")
    before = tab.do("$.exact.src")
    tab.do("orbit(0.3, 0), 0")
    tab.until(f"window.__ready && $.exact.src !== '{before}'")
    assert json.loads(server.get("/state")[1])["paused"]
    tab.page.click("#pause")
    tab.until("$.pause.textContent === 'pause'")
    assert not json.loads(server.get("/state")[1])["paused"] and not tab.complaints
    tab.close()


def test_a_run_that_is_killed(browser, endless):
    """The last of this run's tests."""
    run, server = endless
    tab = Tab(browser, (400, 300)).open(server.address)
    run.process.kill()
    run.process.wait()
    tab.until("$.said.textContent.includes('the last picture stays')")
    assert tab.page.is_visible("#exact")
    status, text = server.get(f"/frame?view={FREE}&w=56&h=40&source=training")
    assert status == 503 and b"the last picture stays" in text
    tab.close()


def test_train_py_opens_the_page(data, tmp_path):
    """And takes it along when it ends."""
    noted = tmp_path / "address"
    opener = tmp_path / "browser"
    opener.write_text(f'#!/bin/sh\necho "$1" > {noted}\n')
    opener.chmod(0o755)
    flags = [
        "-s",
        str(data),
        "-m",
        str(tmp_path / "m"),
        "--iterations",
        "1000000",
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--view"]
    process = subprocess.Popen(command, env=os.environ | {"BROWSER": str(opener), "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (noted.is_file() and noted.read_text().strip()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        address = noted.read_text().strip()
        with urllib.request.urlopen(address, timeout=60) as reply:
            assert b'"live":true' in reply.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=5)


@pytest.mark.parametrize("port", ["70000", "taken"])
def test_a_port_that_cannot_be(served, folder, port, capsys):
    port = str(served.port) if port == "taken" else port
    assert view.main(["-m", str(folder), "--port", port]) == 1
    assert "cannot listen on" in capsys.readouterr().err


class Computed:
    """Seconds that a function has computed, in its own thread, and how often it was called."""

    def __init__(self, monkeypatch, owner, name: str):
        self.seconds, self.calls = 0.0, 0
        function = getattr(owner, name)

        def counted(*args, **more):
            begun = time.thread_time()
            try:
                return function(*args, **more)
            finally:
                self.seconds += time.thread_time() - begun
                self.calls += 1

        monkeypatch.setattr(owner, name, counted)


def test_what_looking_costs(data, tmp_path, monkeypatch):
    """In seconds of computing, not of the clock: a busy machine takes longer for everything. What the server
    does keeps one of two cores from training, a picture that the trainer draws keeps both."""
    serves, answers = Computed(monkeypatch, Viewer, "serve"), Computed(monkeypatch, Handler, "handle")
    polls = Computed(monkeypatch, network_gui, "_readable")
    serve, looked, begun = Viewer.serve, threading.Event(), time.monotonic()

    def patient(self, *args, **more):
        """Training does not end before somebody has looked, however busy the machine is."""
        serve(self, *args, **more)
        while serves.calls > 1000 and not looked.is_set():
            serve(self, *args, **more)
            time.sleep(0.002)

    monkeypatch.setattr(Viewer, "serve", patient)
    thread = threading.Thread(target=run_training, args=(data, tmp_path / "m", 1200, "--port", "0"))
    thread.start()
    while serves.calls < 300:
        assert thread.is_alive()
        time.sleep(0.01)
    alone, most = serves.seconds / serves.calls, 2 + (time.monotonic() - begun) / network_gui.LOOKOUT
    assert polls.calls <= most, "a poll each hundredth of a second"
    server = Served(ModelFolder(tmp_path / "m"), Trainer(ModelFolder(tmp_path / "m")))
    shares = []
    for path in (f"/frame?view={FREE}&w=56&h=40&source=training&still=1", "/state"):
        before, waits = serves.seconds + answers.seconds / 2, 0.0
        for _ in range(12):
            status, body, headers = server.ask(path)
            assert status == 200, body
            waits += float(headers.get("X-Next", 1.0))  # seconds
        shares.append((serves.seconds + answers.seconds / 2 - before) / waits)
    looked.set()
    thread.join()
    server.close()
    print(f"nobody: {1e6 * alone:.1f} us a step; pictures {shares[0]:.2%}, numbers {shares[1]:.2%}")
    assert alone <= 10e-6, "seconds of a step, which take 1,500e-6 at least"
    assert sum(shares) <= 0.01


def test_trainers_that_know_nothing_of_it(tmp_path):
    """One that answers as the original does: a picture and a path."""
    picture = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        client = listener.accept()[0]
        while length := client.recv(4):
            client.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL)
            client.sendall(picture.tobytes() + b"\x04\0\0\0/dat")
        client.close()

    threading.Thread(target=answer, daemon=True).start()
    (tmp_path / "viewer.json").write_text(json.dumps({"ip": "127.0.0.1", "port": listener.getsockname()[1]}))
    trainer = Trainer(ModelFolder(tmp_path))
    camera = camera_at([0, 0, -4], np.eye(3), (60, 60, 28, 20), SIZE, torch.device("cpu"))
    np.testing.assert_array_equal(trainer.picture(camera, "color", 1.0, 3, True)[0], picture)
    assert trainer.stats == {}
    trainer.close(), listener.close()


@pytest.mark.parametrize(
    "told", [b"", b"{", b"[]", b'{"ip": 5}', b'{"ip": "127.0.0.1", "port": "x"}', b"\xff"]
)
def test_a_damaged_address(tmp_path, told):
    (tmp_path / "viewer.json").write_bytes(told)
    with pytest.raises(NoTrainer, match="does not answer"):
        Trainer(ModelFolder(tmp_path)).state()


def test_another_run_at_the_old_address(tmp_path):
    viewer = Viewer("127.0.0.1", 0, "/data", lambda line: None)
    done = threading.Event()

    def serve():
        while not done.is_set():
            viewer.serve(lambda request: None, stats=lambda: {"model_path": "/elsewhere"})
            time.sleep(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    (tmp_path / "viewer.json").write_text(json.dumps({"ip": "127.0.0.1", "port": viewer.address[1]}))
    with pytest.raises(NoTrainer, match="another run is there: /elsewhere"):
        Trainer(ModelFolder(tmp_path)).state()
    done.set(), thread.join()
    viewer.close()
