"""One page about a model, or several: pictures, scores, curves, cameras, options, and the splats themselves.

The page is one file that asks for nothing else. Pictures and numbers are there without JavaScript, too; it
moves the sliders and shows the splats.
"""

import base64
import html
import io
import json
import math
import platform
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scene import formats
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from tools import contact_sheet
from training import table
from utils import svg
from utils.files import DataError, atomic_write
from viewer.cameras import views_of
from viewer.clean import shown
from viewer.embed import ENOUGH, embedded
from viewer.facts import Facts, View, run_rows
from viewer.page import GZIP, around
from viewer.page import page as splat_page
from viewer.views import folder_view

WIDEST = 800  # pixels of a picture
WEBP = 85  # quality of 100
BASE64 = 4 / 3
FOR_PICTURES, FOR_VIDEO = 0.5, 0.25  # shares of the page that these may fill
FEWEST = 4  # views that are shown with pictures whatever the size
DIGITS = {"PSNR": 2, "SSIM": 4, "LPIPS": 4}
UNITS = {"PSNR": "dB", "Memory": "MB", "Time of an iteration": "ms"}
COLORED = ("test", "train")
HERE = Path(__file__).parent


def write(models: list[Facts], path: Path, megabytes: float, splats: bool, command: str) -> str:
    """Returns what did not fit, in words."""
    share = megabytes * 1e6 / len(models)
    left_out: list[str] = []
    parts = [_head(" and ".join(facts.name for facts in models))]
    if len(models) > 1:
        parts.append(_comparison(models))
    for number, facts in enumerate(models):
        parts.append(_model(facts, number, len(models) > 1, share, splats, left_out))
    _write(path, [*parts, _foot(command), f"<script>{_file('report.js')}</script>"])
    return "; ".join(left_out)


class Beside(NamedTuple):
    """One view, as several runs show it."""

    title: str
    pictures: list[tuple[str, np.ndarray]]  # what it is, and uint8 [H, W, 3]


def write_table(
    lines: list[list[table.Cell]], links: list[str], views: list[Beside], path: Path, command: str
) -> None:
    """A page with a table, whose first rows lead to pages of their own, and pictures."""
    head, *rows = lines
    names = [str(name) for name in head]
    cells = [[table.shown(cell, name) for name, cell in zip(names, row)] for row in rows]
    parts = [_head("Scenes and methods"), _table(names, cells, links)]
    for view in views:
        figures = "".join(
            f'<figure><img src="{_webp(pixels)}" alt="{_text(f"{what}, {view.title}")}" style="width:100%">'
            f"<figcaption>{_text(what)}</figcaption></figure>"
            for what, pixels in view.pictures
        )
        parts.append(f"<h2>{_text(view.title)}</h2><div class=row>{figures}</div>")
    _write(path, [*parts, _foot(command)])


def _write(path: Path, parts: list[str]) -> None:
    data = "\n".join([*parts, "</body></html>"]).encode("utf-8")
    with atomic_write(path, len(data)) as file:
        file.write(data)


def _foot(command: str) -> str:
    return f"<h2>This page</h2><pre>{_text(command)}</pre><p class=soft>{_text(_environment())}</p>"


def _head(title: str) -> str:
    title = _text(title)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_file("report.css")}'
        f"</style></head><body><h1>{title}</h1><p class=soft>Written on {time.strftime('%Y-%m-%d %H:%M')}</p>"
    )


# Several models


def _comparison(models: list[Facts]) -> str:
    scored = [facts.folder.path for facts in models if facts.folder.results.is_file()]
    head, *rows = table.compare(scored) if scored else [[]]
    cells = [[table.shown(cell, str(name)) for name, cell in zip(head, row)] for row in rows]
    names = [facts.name for facts in models]
    curves = dict.fromkeys(curve for facts in models for curve in _curved(facts))
    charts = []
    for curve in curves:
        lines = [
            svg.Line(f"{facts.name} {line}", points, dashed=line == "train" and curve == "PSNR", color=k)
            for k, facts in enumerate(models)
            for line, points in facts.curves.get(curve, {}).items()
        ]
        charts.append(svg.chart(curve, lines, UNITS.get(curve, "")))
    keys = "".join(
        f'<span class="key s{k % svg.COLORS}">{_text(name)}</span>' for k, name in enumerate(names)
    )
    without = [facts.name for facts in models if facts.folder.path not in scored]
    missing = f"<p>Not scored by metrics.py: {_text(', '.join(without))}</p>" if without else ""
    body = _table([str(name) for name in head], cells) + missing
    return f"<h2>Comparison</h2>{body}<h3>Curves</h3><p>{keys}</p><div class=row>{''.join(charts)}</div>"


# One model


def _model(facts: Facts, number: int, titled: bool, share: float, splats: bool, left_out: list[str]) -> str:
    pictures, count = _views(facts, FOR_PICTURES * share)
    parts = [f"<h2>{_text(facts.name)}</h2>" if titled else "", _best(facts), _numbers(facts), _curves(facts)]
    if pictures:
        parts += ["<h3>Test views, the worst first</h3>", f"<div class=row>{pictures}</div>"]
    if count < len(facts.views):
        left_out.append(f"pictures of {count} of {len(facts.views)} views of {facts.name}")
        parts.append(f"<p class=soft>Pictures of {count} of {len(facts.views)} views.</p>")
    parts += [_scores(facts), _films(facts, FOR_VIDEO * share)]
    room = share - sum(len(part) for part in parts)
    parts.append(_splats(facts, number, room, left_out) if splats else "")
    parts += [_options(facts), _run(facts)]
    return "\n".join(part for part in parts if part)


def _best(facts: Facts) -> str:
    known = [view for view in facts.views if math.isfinite(view.psnr)]
    return _pair(facts, known[-1])[0] if known else "<p>There are no rendered test views: run render.py.</p>"


def _numbers(facts: Facts) -> str:
    numbers = [(name, _score(name, value)) for name, value in facts.scores.items() if value is not None]
    numbers += [(f"test views of {facts.method.name}", str(len(facts.views)))] if facts.method else []
    cells = "".join(
        f"<div><b>{_text(value)}</b>{_text(name)}</div>" for name, value in [*numbers, *run_rows(facts)]
    )
    warnings = "".join(f"<p>{_text(line)}</p>" for line in facts.summary.get("warnings") or [])
    return f"<div class=numbers>{cells}</div>{warnings}"


def _curves(facts: Facts) -> str:
    charts = []
    for curve, lines in _curved(facts).items():
        drawn = [svg.Line(name, points, color=int(name == "train")) for name, points in lines.items()]
        charts.append(svg.chart(curve, drawn, UNITS.get(curve, "")))
    charts.append(svg.histogram("Test views by PSNR", [view.psnr for view in facts.views], "dB"))
    marks = [
        svg.Mark(f"{name} ({'test' if test else 'train'})", (*place,), (*toward,), int(not test))
        for name, place, toward, test in facts.cameras
    ]
    charts.append(svg.plan("Cameras from above", marks))
    keys = "".join(f'<span class="key s{k}">{name}</span>' for k, name in enumerate(COLORED))
    charts = [chart for chart in charts if chart]
    return f"<h3>Curves</h3><p>{keys}</p><div class=row>{''.join(charts)}</div>" if charts else ""


def _curved(facts: Facts) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves that are more than a number, which is written above."""
    return {name: lines for name, lines in facts.curves.items() if max(map(len, lines.values())) > 1}


def _views(facts: Facts, room: float) -> tuple[str, int]:
    """As many as there is room for, and how many these are."""
    parts: list[str] = []
    for view in facts.views:
        text, size = _pair(facts, view)
        room -= size
        if room < 0 and len(parts) >= FEWEST:
            break
        parts.append(text)
    return "".join(parts), len(parts)


def _pair(facts: Facts, view: View) -> tuple[str, int]:
    """Photo and render with the slider between them, and the error on top; and the size of all that."""
    assert facts.method
    row = contact_sheet.read_row(facts.method, view.file)
    name = html.escape(view.name, quote=True)
    layers = [("photo", row.truth, ""), ("render", row.render, "")]
    layers.append(("error", contact_sheet.heat(row.error), " class=error"))
    images = [
        f'<img{kind} src="{_webp(pixels)}" alt="{what} of {name}" loading="lazy">'
        for what, pixels, kind in layers
    ]
    scores = " · ".join(f"{metric} {_score(metric, v)}" for metric, v in view.scores.items() if v is not None)
    text = (
        f"<figure><div class=pair>{''.join(images)}<span class=left>photo</span>"
        "<span class=right>render</span><label><input type=checkbox> error</label></div>"
        f'<input type=range min=0 max=100 value=50 aria-label="photo or render of {name}">'
        f"<figcaption>{_text(view.name)}: {_text(scores or 'nothing of it counts')}</figcaption></figure>"
    )
    return text, len(text)


def _scores(facts: Facts) -> str:
    metrics = list(dict.fromkeys(metric for view in facts.views for metric in view.scores))
    rows = [[view.name, *(_score(m, view.scores.get(m)) for m in metrics)] for view in facts.views]
    body = _table(["view", *metrics], rows)
    return f"<details><summary>Scores of all test views</summary>{body}</details>" if rows else ""


def _films(facts: Facts, room: float) -> str:
    """MP4 files in the model folder, as far as they fit."""
    parts = []
    for path in sorted(facts.folder.path.glob("*.mp4")):
        room -= BASE64 * path.stat().st_size
        if room >= 0:
            source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
            parts.append(
                f'<figure><video controls loop muted src="{source}" style="width:100%"></video>'
                f"<figcaption>{_text(path.name)}</figcaption></figure>"
            )
    return f"<h3>Films</h3><div class=row>{''.join(parts)}</div>" if parts else ""


def _splats(facts: Facts, number: int, room: float, left_out: list[str]) -> str:
    """The page that draws splats, in this one; a click starts it."""
    try:
        iteration = facts.folder.saved()
        path = facts.folder.splats(iteration)
        model = formats.read(path)
        view = around(folder_view(facts.folder, iteration), model)
    except (DataError, OSError) as error:  # a field has none
        return f"<p class=soft>No splats to show: {_text(str(error))}</p>"
    bare = len(_as_script(splat_page(facts.name, GZIP, view)))
    inside = embedded(model, path, "best", room - bare, lambda: _shown(facts.folder, model))
    if inside.lost:
        left_out.append(f"splats of {facts.name}: {inside.lost}")
    data = _as_script(splat_page(facts.name, inside.payload, view))
    return (
        f"<h3>The splats</h3><p class=soft>{_text(inside.lost)}</p>"
        f"<button data-splats=splats{number}>Show them</button>"
        f"<script type=application/json id=splats{number}>{data}</script>"
    )


def _shown(folder: ModelFolder, gaussians: GaussianModel) -> Tensor | None:
    """None where nobody knows where the train views are."""
    try:
        return shown(gaussians, views_of(folder, gaussians.device), ENOUGH)
    except DataError:
        return None


def _options(facts: Facts) -> str:
    rows = [[name, _value(value), _value(default)] for name, (value, default) in facts.changed.items()]
    body = _table(["option", "value", "default"], rows) if rows else "<p>All are the defaults.</p>"
    return f"<h3>Options that are not the defaults</h3>{body}"


def _run(facts: Facts) -> str:
    return f"<h3>To train it again</h3><pre>{_text(facts.command)}</pre>" if facts.options else ""


# Pieces


def _environment() -> str:
    return (
        f"Written with Python {platform.python_version()} and PyTorch {torch.__version__} "
        f"on {platform.system()} {platform.machine()}."
    )


def _webp(pixels: np.ndarray) -> str:
    """A picture as a data URI."""
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((WIDEST, WIDEST))
    picture.save(file, "WEBP", quality=WEBP)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _score(metric: str, value: float | None) -> str:
    unit = UNITS.get(metric, "")
    return "-" if value is None else f"{value:.{DIGITS.get(metric.split()[0], 4)}f} {unit}".strip()


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _table(head: list[str], rows: list[list[str]], links: Sequence[str] = ()) -> str:
    """links: of the first cells of the first rows; empty where there is none."""
    cells = "".join(f"<th scope=col>{_text(name)}</th>" for name in head)
    body = ""
    for row, link in zip_longest(rows, links, fillvalue=""):
        first, *others = [_text(cell) for cell in row]
        first = f'<a href="{_text(quote(link))}">{first}</a>' if link else first
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in (first, *others))}</tr>"
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _as_script(value: str) -> str:
    """JSON that cannot end the script that holds it."""
    return json.dumps(value).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
