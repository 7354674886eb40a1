"""One picture of a rendered test set: ground truth | render | error, a row per view.

    python -m utils.contact_sheet -m output/x [--iteration 30000] [--views 4] [--to sheet.png]

The error is the absolute difference, averaged over the channels, on a scale from dark (equal) to bright
(0.25 or more).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FULL_SCALE = 0.25  # this error is drawn in the brightest color
HEATS = np.array(
    [[10, 8, 22], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], float
)  # dark to bright
PAPER, INK = (248, 247, 244), (40, 40, 40)
GAP, HEAD, LABEL = 6, 34, 22  # pixels: between pictures, of the heading, of the line below each row


def heat(error: np.ndarray) -> np.ndarray:
    """Error [H, W] in 0..1 to colors [H, W, 3] uint8."""
    at = np.clip(error / FULL_SCALE, 0, 1) * (len(HEATS) - 1)
    return np.stack([np.interp(at, range(len(HEATS)), HEATS[:, c]) for c in range(3)], axis=-1).astype(
        np.uint8
    )


def draw(method: Path, count: int) -> Image.Image:
    """The sheet for a folder with renders/, gt/ and, if it is there, names.json."""
    files = sorted(path.name for path in (method / "renders").glob("*.png"))
    if not files:
        raise SystemExit(f"{method}/renders must hold rendered pictures, got none; run render.py first")
    files = [files[round(k)] for k in np.linspace(0, len(files) - 1, min(count, len(files)))]
    names = json.loads((method / "names.json").read_text()) if (method / "names.json").exists() else {}
    rows = [_row(method, file) for file in files]

    width = 3 * max(row[0].shape[1] for row in rows) + 4 * GAP
    height = HEAD + sum(row[0].shape[0] + LABEL for row in rows) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, large, small = ImageDraw.Draw(sheet), _font(18), _font(13)
    column = (width - GAP) // 3
    for k, title in enumerate(("ground truth", "render", "error")):
        pen.text((GAP + k * column, 7), title, INK, large)
    top = HEAD
    for file, (truth, render, error) in zip(files, rows):
        for k, picture in enumerate((truth, render, heat(error))):
            sheet.paste(Image.fromarray(picture), (GAP + k * column, top))
        top += truth.shape[0]
        psnr = -10 * np.log10(np.mean((truth / 255.0 - render / 255.0) ** 2) + 1e-12)
        pen.text((GAP, top + 2), names.get(file, file), INK, small)
        pen.text((GAP + column, top + 2), f"{psnr:.2f} dB", INK, small)
        pen.text(
            (GAP + 2 * column, top + 2), f"mean {error.mean():.4f}, brightest from {FULL_SCALE}", INK, small
        )
        top += LABEL
    return sheet


def _row(method: Path, file: str):
    truth, render = (np.array(Image.open(method / part / file).convert("RGB")) for part in ("gt", "renders"))
    if truth.shape != render.shape:
        raise SystemExit(
            f"{method}: renders/{file} must have the size of gt/{file}, {truth.shape}, got {render.shape}"
        )
    return truth, render, np.abs(truth.astype(float) - render).mean(axis=2) / 255


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # Pillow before 10.1, or without FreeType: one small built-in font
        return ImageFont.load_default()


def newest(model: Path) -> Path:
    methods = sorted((model / "test").glob("ours_*"), key=lambda path: int(path.name.removeprefix("ours_")))
    if not methods:
        raise SystemExit(f"{model}/test must hold ours_<iteration> folders, got none; run render.py first")
    return methods[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m utils.contact_sheet", description="ground truth | render | error"
    )
    parser.add_argument("-m", "--model_path", type=Path, required=True)
    parser.add_argument("--iteration", type=int, default=-1, help="default: the highest that was rendered")
    parser.add_argument("--views", type=int, default=4, help="rows, evenly spaced over the test views")
    parser.add_argument(
        "--to", type=Path, default=None, help="default: contact_sheet.png in the model folder"
    )
    args = parser.parse_args()
    iteration = args.iteration
    method = newest(args.model_path) if iteration < 0 else args.model_path / "test" / f"ours_{iteration}"
    to = args.to or args.model_path / "contact_sheet.png"
    draw(method, args.views).save(to)
    print(f"Contact sheet: {to}")


if __name__ == "__main__":
    main()
