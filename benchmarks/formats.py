"""What files of splats cost, for each model and format: size, PSNR of a picture, time to write and to read.

    python -m benchmarks.formats plush.ply biker.compressed.ply output/demo

PSNR compares pictures of the file with those of the model, by our rasterizer: the first three test views of a
model folder; of a file, 400x400 from three sides, so far away that nearly all of it is in them. Seconds are
those of a core.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from arguments import PipelineParams
from gaussian_renderer import render
from scene import Camera, formats
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from training.table import Cell, to_markdown
from utils.files import DataError
from utils.geometry import rotation_matrices
from utils.image import psnr
from viewer.cameras import views_of
from viewer.embed import write_page
from viewer.kept import SAME
from viewer.page import scene_view

WAYS: dict[str, dict[str, Any]] = {
    "a.ply": {}, "a.glb": {}, "a.usdc": {}, "a.compressed.ply": {},
    "small.spz": {"quality": "small"}, "good.spz": {"quality": "good"}, "best.spz": {"quality": "best"},
    "a.sog": {}, "a.splat": {}, "a.html": {},
}  # fmt: skip
SIDE, FOV = 400, math.radians(16)
SIDES = 3
REACH = 0.98  # the share of the splats that a picture is to hold
NEAR = 0.2  # of the rasterizer
HEAD = ["model, splats", "format", "MB", "bytes each", "PSNR", "write s", "read s"]


def cameras(model: GaussianModel) -> list[Camera]:
    """Around the middle, with the y axis upright."""
    means = model.means.detach()
    middle = means.median(0).values
    radius = float((means - middle).norm(dim=1).quantile(REACH))
    away = max(radius / math.sin(FOV / 2), radius + NEAR)
    focal = SIDE / 2 / math.tan(FOV / 2)
    K = torch.tensor([[focal, 0, SIDE / 2], [0, focal, SIDE / 2], [0, 0, 1]])
    found = []
    for k in range(SIDES):
        angle = math.pi * k / SIDES  # half of the full turn
        matrix = torch.eye(4)
        matrix[:3, :3] = rotation_matrices(torch.tensor([[math.cos(angle), 0, math.sin(angle), 0]]))[0]
        matrix[:3, 3] = torch.tensor([0, 0, away]) - matrix[:3, :3] @ middle
        found.append(Camera(f"side {k}", SIDE, SIDE, matrix, K))
    return found


@torch.no_grad()
def pictures(model: GaussianModel, views: list[Camera]) -> torch.Tensor:
    pipe = PipelineParams(antialiasing=model.antialiased)
    return torch.stack([render(view, model, pipe, torch.zeros(3)).image.clamp(0, 1) for view in views])


def timed(function: Callable) -> tuple[Any, float]:
    begun = time.process_time()
    return function(), time.process_time() - begun


def row(model: GaussianModel, file: Path, options: dict, views: list[Camera], own: torch.Tensor) -> list[str]:
    """Of one file."""
    kept, reading = "-", "-"
    if file.suffix == ".html":
        seconds = timed(lambda: write_page(model, file, scene_view(), "good", megabytes=1000.0))[1]
    else:
        seconds = timed(lambda: formats.write(model, file, **options))[1]
        theirs, took = timed(lambda: formats.read(file))
        kept, reading = f"{psnr(pictures(theirs, views), own).clamp_max(SAME):.1f}", f"{took:.2f}"
    size = file.stat().st_size
    return [f"{size / 1e6:.2f}", f"{size / len(model):.1f}", kept, f"{seconds:.2f}", reading]


def opened(path: Path) -> tuple[GaussianModel, list[Camera]]:
    if not path.is_dir():
        return (model := formats.read(path)), cameras(model)
    folder = ModelFolder(path)
    return formats.read(folder.ply(folder.saved())), views_of(folder, torch.device("cpu")).test[:SIDES]


def rows(path: Path, folder: Path) -> Iterator[list[Cell]]:
    model, views = opened(path)
    own = pictures(model, views)
    assert own.std() > 0.05, f"{path}: blank pictures have nothing to compare"
    for name, options in WAYS.items():
        try:
            found = row(model, folder / name, options, views, own)
        except DataError as error:  # a package that is not there
            print(error)
            continue
        yield [f"{path.name}, {len(model):,}", name.removeprefix("a"), *found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    table: list[list[Cell]] = [[*HEAD]]
    with tempfile.TemporaryDirectory() as folder:
        for path in args.files:
            table += rows(path, Path(folder))
    print("\n" + to_markdown(table))


if __name__ == "__main__":
    main()
