"""The page on which splats are looked at: one file without a library, from page.html and scripts.

A file that holds the splats, too, opens without a server, and reports put it into theirs. view.py's page has
more: server.js, and what stands between {{#server}} and {{/server}} in page.html.
"""

import base64
import html
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from scene.gaussian_model import GaussianModel
from scene.paths import Pose, focus

HERE = Path(__file__).parent
NEAR = 0.2  # of the rasterizer
UP = (0.0, -1.0, 0.0)  # y points down
FARTHEST = 1e9  # a coordinate that may be meant seriously
GZIP = b"\x1f\x8b"  # SPZ files begin so
FOR_SERVER = re.compile(r"\{\{#server\}\}\n(.*?)\{\{/server\}\}\n", re.DOTALL)
COMMENT = re.compile(r"(^|\s+)//( .*|$)")


def page(title: str, payload: bytes = b"", view: dict | None = None) -> str:
    """The page as text. `payload`: an .spz file of splats, or a .ply file, whose reader makes it longer;
    without one the page asks the server that `view` names. `view`: see scene_view()."""
    served = "server" in (view or {})
    scripts = ["splats.js", "controls.js"]
    scripts += ["ply.js"] * (served or not payload.startswith(GZIP)) + ["server.js"] * served
    parts = {
        "title": html.escape(title),
        "scene": _as_script(scene_view() | (view or {})),
        "payload": base64.b64encode(payload).decode("ascii"),
        "scripts": "\n".join(map(_file, scripts)),
    }
    text = FOR_SERVER.sub(r"\1" if served else "", _file("page.html"))
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def scene_view(
    cameras: Sequence[dict] = (), up=UP, background=(0.0, 0.0, 0.0), start: int = 0, near: float = NEAR
) -> dict:
    """What the page knows about the scene. cameras: see view_camera(); start: number of the camera to begin
    at, if there are any; near: what is closer to a camera is not drawn."""
    view = {
        "cameras": list(cameras),
        "up": [float(v) for v in up],
        "background": [float(v) for v in background],
        "start": start,
        "near": near,
    }
    poses = [
        Pose(np.array(camera["place"]), np.reshape(camera["turn"], (3, 3)), fov=1.0)
        for camera in cameras
        if np.abs([*camera["place"], *camera["turn"]]).max() < FARTHEST
    ]
    places = np.array([pose.place for pose in poses])
    return view | (_reach(focus(poses), places) if len(poses) > 1 else _reach(np.zeros(3), np.ones((1, 3))))


def around(view: dict, gaussians: GaussianModel) -> dict:
    """`view`, from a distance that suits the splats if its cameras do not say where things are."""
    means = gaussians.means.detach()
    means = means[means.abs().amax(1) < FARTHEST].cpu().numpy()
    if len(view["cameras"]) > 1 or not len(means):
        return view
    return view | _reach(np.median(means, axis=0), means)


def _reach(middle: np.ndarray, points: np.ndarray) -> dict:
    """What one turns around, and how far away most is."""
    away = float(np.median(np.linalg.norm(points - middle, axis=1)))
    return {"middle": middle.tolist(), "radius": away or 1.0}


def view_camera(entry: dict, test: bool = False, psnr: float | None = None) -> dict:
    """An entry of cameras.json as the page takes it."""
    return {
        "name": str(entry["img_name"]),
        "test": test,
        "psnr": psnr,
        "place": entry["position"],
        "turn": [value for row in entry["rotation"] for value in row],
        "fx": entry["fx"],
        "fy": entry["fy"],
        "width": entry["width"],
        "height": entry["height"],
    }


@cache
def _file(name: str) -> str:
    """Without indentation, empty lines, and comments at the end of a line or with a line of their own."""
    lines = [line.strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    if name.endswith(".js"):
        lines = [COMMENT.sub("", line) for line in lines]
    return "\n".join(line for line in lines if line)


def _as_script(data: dict) -> str:
    """JSON that cannot end the script that holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
