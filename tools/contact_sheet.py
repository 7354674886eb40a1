"""One picture of a rendered test set: ground truth | render | error, a row per view.

    python -m tools.contact_sheet -m output/x [--iteration 30000] [--views 4] [--to sheet.png]
    python -m tools.contact_sheet -m output/x --blur

The error is the absolute difference, averaged over the channels, on a scale from dark (equal) to bright
(0.25 or more). With --blur it shows train views, rendered both ways (render.py, and render.py --views sharp):
photo | render with the blur that was learned | sharp render. Lines in the photo say where nine points of it
went while it was exposed, as far as --blur motion has found out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from arguments import number
from arguments.flag import MOST
from per_view import motion
from scene.folder import ModelFolder
from utils import commands
from utils.files import DataError, picture_path
from utils.image import photo_names, read_image
from utils.terminal import say

FULL_SCALE = 0.25  # this error is drawn in the brightest color
HEATS = np.array(
    [[10, 8, 22], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], float
)  # dark to bright
PAPER, INK, TRAIL = (248, 247, 244), (40, 40, 40), (255, 60, 160)
GAP, HEAD, LABEL = 6, 34, 22  # pixels: between pictures, of the heading, of the line below each row
NARROWEST = 230  # pixels that the line below a picture takes


def heat(error: np.ndarray) -> np.ndarray:
    """Error [H, W] in 0..1 to colors [H, W, 3] uint8."""
    at = np.clip(error / FULL_SCALE, 0, 1) * (len(HEATS) - 1)
    return np.stack([np.interp(at, range(len(HEATS)), HEATS[:, c]) for c in range(3)], axis=-1).astype(
        np.uint8
    )


def draw(method: Path, count: int) -> Image.Image:
    """The sheet for a folder with renders/, gt/ and, if it is there, names.json."""
    files = _some_files(method, count)
    names = photo_names(method)
    rows = [read_row(method, file) for file in files]

    width = 3 * max(NARROWEST, *(row.truth.shape[1] for row in rows)) + 4 * GAP
    height = HEAD + sum(row.truth.shape[0] + LABEL for row in rows) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, large, small = ImageDraw.Draw(sheet), _font(18), _font(13)
    column = (width - GAP) // 3
    for k, title in enumerate(("ground truth", "render", "error")):
        pen.text((GAP + k * column, 7), title, INK, large)
    top = HEAD
    for file, row in zip(files, rows):
        for k, picture in enumerate((row.truth, row.render, heat(row.error))):
            sheet.paste(Image.fromarray(picture), (GAP + k * column, top))
        top += row.truth.shape[0]
        for k, caption in enumerate((names.get(file, file), *row.scores())):
            pen.text((GAP + k * column, top + 2), str(caption), INK, small)
        top += LABEL
    return sheet


def _some_files(method: Path, count: int) -> list[str]:
    """Evenly spaced over what was rendered."""
    files = sorted(path.name for path in (method / "renders").glob("*.png"))
    if not files:
        raise DataError(f"{method}/renders must hold rendered pictures, got none; run render.py first")
    return [files[round(k)] for k in np.linspace(0, len(files) - 1, min(count, len(files)))]


def draw_blur(photographed: Path, count: int) -> Image.Image:
    """Photo | the render with its blur | the sharp one: of ours_N, with ours_N_sharp beside it."""
    sharp = photographed.with_name(f"{photographed.name}_sharp")
    files, names = _some_files(photographed, count), photo_names(photographed)
    missing = [file for file in files if not (sharp / "renders" / file).is_file()]
    if missing:
        raise DataError(f"{sharp}/renders must hold {missing[0]}; run render.py --views sharp first")
    folders = photographed / "gt", photographed / "renders", sharp / "renders"
    rows = [(names.get(file, file), [_pixels(folder / file) for folder in folders]) for file in files]
    width, height = max(row[0].shape[1] for _, row in rows), sum(row[0].shape[0] + LABEL for _, row in rows)
    column = max(NARROWEST, width) + GAP
    sheet = Image.new("RGB", (3 * column + GAP, HEAD + height + GAP), PAPER)
    pen, large, small = ImageDraw.Draw(sheet), _font(18), _font(13)
    top = HEAD
    for k, title in enumerate(("photo", "render, blurred alike", "sharp render")):
        pen.text((GAP + k * column, 7), title, INK, large)
    lines = _paths(photographed)
    for name, pictures in rows:
        for k, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (GAP + k * column, top))
        h, w = pictures[0].shape[:2]
        for line in lines.get(name, []):
            pen.line([(GAP + x * w, top + y * h) for x, y in line], TRAIL, 2)
        top += pictures[0].shape[0] + LABEL
        pen.text((GAP, top - LABEL + 2), name, INK, small)
    return sheet


def _paths(photographed: Path) -> dict[str, list]:
    """By photo, with --blur motion: where nine points of it go, as parts of its size, [9][n][2]."""
    model = ModelFolder(photographed.parents[1])
    file = model.ply(_iteration(photographed.name)).with_name("blur.json")
    if not file.is_file():
        return {}
    return {name: trails.tolist() for name, trails in motion.drawn(file, model.cameras).items()}


class Row(NamedTuple):
    """A view: uint8 [H, W, 3], and where of it counts, as metrics.py has it."""

    truth: np.ndarray
    render: np.ndarray
    counts: np.ndarray  # bool [H, W]

    @property
    def error(self) -> np.ndarray:
        """[H, W] in 0..1, zero where the photo does not count."""
        return np.where(self.counts, np.abs(self.truth.astype(float) - self.render).mean(axis=2) / 255, 0)

    def psnr(self) -> float | None:
        """None if nothing of it counts."""
        if not self.counts.any():
            return None
        squares = np.square((self.truth / 255.0 - self.render / 255.0)[self.counts])
        return float(-10 * np.log10(squares.mean() + 1e-12))

    def scores(self) -> tuple[str, str]:
        if not self.counts.any():
            return "nothing of it counts", ""
        mean = self.error[self.counts].mean()
        return f"{self.psnr():.2f} dB", f"mean {mean:.4f}, brightest from {FULL_SCALE}"


def read_row(method: Path, file: str) -> Row:
    truth, render = (_pixels(method / part / file) for part in ("gt", "renders"))
    mask = method / "masks" / file
    counts = np.ones(truth.shape[:2], bool)
    if mask.exists():
        counts = _pixels(mask)[..., 0] > 127
    if truth.shape != render.shape or counts.shape != truth.shape[:2]:
        raise DataError(f"{method}: {file} must have the same size in gt, renders and masks")
    return Row(truth, render, counts)


def _pixels(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # Pillow before 10.1, or without FreeType: one small built-in font
        return ImageFont.load_default()


def newest(model: Path, views: str = "test") -> Path:
    """The folder of pictures of the highest iteration or, where a file was rendered, that of the file."""
    folders = sorted(path.parent for path in (model / views).glob("*/renders"))
    if not folders:
        raise DataError(
            f"{model}/{views} must hold folders of rendered pictures, got none; run render.py first"
        )
    return max(folders, key=lambda folder: _iteration(folder.name))


def _iteration(method: str) -> int:
    number = method.removeprefix("ours_")
    return int(number) if number != method and number.isdecimal() else -1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.contact_sheet", description="ground truth | render | error"
    )
    parser.add_argument("-m", "--model_path", type=Path, required=True)
    parser.add_argument(
        "--iteration", type=number(int, -1, MOST), default=-1, help="default: the highest that was rendered"
    )
    parser.add_argument(
        "--views", type=number(int, 1, 1000), default=4, help="rows, evenly spaced over the test views"
    )
    parser.add_argument(
        "--to", type=Path, help="picture, or folder for contact_sheet.png (default: the model folder)"
    )
    parser.add_argument("--blur", action="store_true", help="photo | blurred render | sharp render")
    args = parser.parse_args(argv)

    def work() -> None:
        iteration, model, views = args.iteration, args.model_path, "train" if args.blur else "test"
        method = newest(model, views) if iteration < 0 else model / views / f"ours_{iteration}"
        sheet = (draw_blur if args.blur else draw)(method, args.views)
        to = picture_path(args.to or model, "blur_sheet.png" if args.blur else "contact_sheet.png")
        sheet.save(to)
        say(f"Contact sheet: {to}")

    return commands.run("contact_sheet", work)


if __name__ == "__main__":
    sys.exit(main())
