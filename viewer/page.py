"""The page on which splats are looked at: one file without a library, from page.html and two scripts.

A file that holds the splats, too, opens without a server. view.py serves the same page, and reports put it
into theirs.
"""

import base64
import html
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
NEAR = 0.2  # of the rasterizer
UP = (0.0, -1.0, 0.0)  # y points down


def page(title: str, payload: bytes = b"", view: dict | None = None) -> str:
    """The page as text. `payload`: a .spz or .ply file of splats, gzipped or not; without one the page asks
    the server that `view` names. `view`: see scene_view()."""
    parts = {
        "title": html.escape(title),
        "scene": _as_script(scene_view() | (view or {})),
        "payload": base64.b64encode(payload).decode("ascii"),
    }
    slot = re.compile(r"\{\{([\w.]+)\}\}")
    return slot.sub(lambda found: parts.get(found[1]) or _file(found[1]), _file("page.html"))


def scene_view(
    cameras: Sequence[dict] = (), up=UP, background=(0.0, 0.0, 0.0), start: int = 0, near: float = NEAR
) -> dict:
    """What the page knows about the scene. cameras: see view_camera(); start: number of the camera to begin
    at, if there are any; near: what is closer to a camera is not drawn."""
    return {
        "cameras": list(cameras),
        "up": [float(v) for v in up],
        "background": [float(v) for v in background],
        "start": start,
        "near": near,
    }


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
    """Without indentation, empty lines and comments that have lines of their own."""
    if name not in {"page.html", "splats.js", "controls.js"}:
        return ""
    lines = map(str.strip, (HERE / name).read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def _as_script(data: dict) -> str:
    """JSON that cannot end the script that holds it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
