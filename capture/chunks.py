"""A scene that is too large for one run, in cells: each is trained by itself, and what they learn is joined.

    python train.py -s dataset -m output/coarse --eval --iterations 7000
    python -m capture.chunks split -m output/coarse -o output/city --cells 2 2
    python -m capture.chunks train -o output/city
    python -m capture.chunks merge -o output/city
    python render.py -m output/city/model

A coarse model of the whole scene comes first. Seen from above, it is cut into cells that hold equally many of
its Gaussians. A cell trains on the photos that show enough of it, starting from the coarse model, which also
explains what lies around it; of its result, what is inside the cell is kept. commands.txt has a line for each
cell, for a cluster's scheduler; `train` runs those that are left, one on each GPU.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from diff_gaussian_rasterization.stages import blend, lists, project
from torch import Tensor

from arguments import (
    ConfigError,
    ModelParams,
    Options,
    PhotoParams,
    build,
    number,
    pick_device,
    saved_options,
)
from scene import Scene, formats
from scene.folder import ModelFolder
from scene.formats.ply import save_ply
from scene.frame import Similarity
from scene.gaussian_model import GaussianModel
from scene.layout import axes_of
from utils import commands
from utils.files import DataError, read_json, write_json
from utils.terminal import say

PLAN, LINES, START = "chunks.json", "commands.txt", "coarse.ply"
OWN_LISTS = ("train.txt", "test.txt")  # of a cell's data set
SHARE = 0.05  # of a picture: as much must a photo show of a cell to train it
MOST_CELLS = 64
FAR = 1e300  # where nothing is


# Cells


def cut(places: np.ndarray, columns: int, rows: int) -> list[list[list[float]]]:
    """Rectangles [low, high] of two coordinates each, in which equally many of the places [N, 2] lie. Those
    at the border have no end."""
    cells = []
    for low, high in _between(places[:, 0], columns):
        inside = places[(places[:, 0] >= low) & (places[:, 0] < high), 1]
        cells += [[[low, start], [high, end]] for start, end in _between(inside, rows)]
    return cells


def _between(values: np.ndarray, parts: int) -> list[tuple[float, float]]:
    inner = [float(q) for q in np.quantile(values, np.arange(1, parts) / parts)] if len(values) else []
    ends = [-FAR, *inner, FAR]
    return list(zip(ends, ends[1:]))


def number_of_cell(cells: list, axes: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Of each mean [N, 3], in which cell it is: in exactly one."""
    places = means.astype(np.float64) @ np.asarray(axes).T[:, :2]
    found = np.zeros(len(means), np.int64)
    for i, (low, high) in enumerate(cells):
        found[((places >= low) & (places < high)).all(1)] = i
    return found


@torch.no_grad()
def shares(gaussians: GaussianModel, camera, cells: Tensor, count: int) -> np.ndarray:
    """[count]: what part of a camera's picture the Gaussians of each cell make up."""
    how = dict(world_to_camera=camera.world_to_camera, K=camera.K, width=camera.width, height=camera.height)
    shape = gaussians.raw_quats, gaussians.log_scales, gaussians.opacity_logits
    screen = project(gaussians.means, *shape, **how, raw=True)
    which = torch.nn.functional.one_hot(cells, count).to(gaussians.means)
    return blend(screen, which, lists(screen)).image.mean((1, 2)).cpu().numpy()


# The three steps


def split(args: argparse.Namespace) -> None:
    """Write a data set for each cell, and the command that trains it."""
    folder, out = ModelFolder(args.model_path), args.output
    model = _options(folder)
    scene = Scene(model, pick_device(args.device), for_training=False)
    start = folder.ply(folder.saved())
    gaussians = formats.read(start, scene.background.device, scene.frame)
    views = [*scene.train_cameras, *scene.test_cameras]
    axes = axes_of(torch.stack([camera.world_to_camera for camera in views]).double().cpu().numpy())
    means = scene.frame.leave(gaussians.means.detach().cpu().numpy())
    cells = cut(means @ axes.T[:, :2], *args.cells)
    which = torch.from_numpy(number_of_cell(cells, axes, means)).to(gaussians.device)
    seen = np.array([shares(gaussians, camera, which, len(cells)) for camera in views]) >= SHARE
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(start, out / START)
    lines = []
    for i in range(len(cells)):
        names: dict[str, list[str]] = {"train": [], "test": []}
        for camera, shown in zip(views, seen[:, i]):
            if shown:
                names["test" if camera.is_test else "train"].append(camera.name)
        say(f"cell {i}: {len(names['train'])} train and {len(names['test'])} test views")
        if names["train"]:  # else it stays as in the coarse model
            _make_data(Path(model.source_path), out / f"cell_{i}", names)
            lines.append(_command(folder, out, i, args.flags))
    (out / LINES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(out / PLAN, {"coarse": str(folder.path.resolve()), "axes": axes.tolist(), "cells": cells}, 1)
    say(f"{out / LINES}: {len(lines)} cells to train")


def _options(folder: ModelFolder) -> ModelParams:
    """How the data set was read. What was learned of each photo cannot be joined."""
    model, views = build((ModelParams, PhotoParams), saved_options(folder.path, (ModelParams, PhotoParams)))
    if model.train_test_exp or views.poses or views.blur != "none":
        raise ConfigError("cells cannot be joined with --train_test_exp, --poses or --blur")
    return replace(model, model_path=str(folder.path))


def _make_data(source: Path, cell: Path, names: dict[str, list[str]]) -> None:
    """A folder of links to all that the data set has, with lists of its own."""
    data = cell / "data"
    data.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.resolve().iterdir()):
        link = data / path.name
        if path.name not in OWN_LISTS and not link.is_symlink():
            link.symlink_to(path, target_is_directory=path.is_dir())
    for kind, listed in names.items():
        (data / f"{kind}.txt").write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")


def _command(coarse: ModelFolder, out: Path, cell: int, flags: list[str]) -> str:
    """With the options of the coarse model, unless the flags say otherwise."""
    here = out.resolve() / f"cell_{cell}"
    line = ["python", "train.py", "--config", coarse.config.resolve(), "-s", here / "data", "--eval"]
    line += ["-m", here / "model", "--start_checkpoint", out.resolve() / START, *flags]
    return shlex.join(map(str, line))


def train(args: argparse.Namespace) -> None:
    """Run the commands of the cells that are left, one on each GPU; without one, one after the other."""
    count = torch.cuda.device_count() if args.device != "cpu" else 0
    gpus: SimpleQueue[str] = SimpleQueue()
    for gpu in map(str, range(count)) if count else [""]:
        gpus.put(gpu)
    lines = [line for line in (args.output / LINES).read_text(encoding="utf-8").splitlines() if line]
    with ThreadPoolExecutor(max(count, 1)) as pool:
        failed = [line for line, code in zip(lines, pool.map(lambda line: _run(line, gpus), lines)) if code]
    if failed:
        raise DataError(f"{len(failed)} of {len(lines)} cells failed, the first with: {failed[0]}")
    say(f"{len(lines)} cells are trained; to join them: python -m capture.chunks merge -o {args.output}")


def _run(line: str, gpus: SimpleQueue) -> int:
    words = shlex.split(line)[2:]
    folder = ModelFolder(words[words.index("-m") + 1])
    if folder.summary.is_file():
        return 0
    gpu = gpus.get()
    where = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    resume = ["--resume"] if folder.config.is_file() else []
    program = [sys.executable, str(Path(__file__).parents[1] / "train.py")]
    try:
        say(f"training {folder}" + f" on GPU {gpu}" * bool(gpu))
        return subprocess.run(
            [*program, *words, "--disable_viewer", *resume], env=os.environ | where
        ).returncode
    finally:
        gpus.put(gpu)


def merge(args: argparse.Namespace) -> None:
    """Of each cell's model, what is inside the cell; of cells that were not trained, the coarse model's."""
    plan = read_json(args.output / PLAN)
    coarse, out = ModelFolder(plan["coarse"]), ModelFolder(args.output / "model")
    frame, parts, iterations = Similarity.stored(coarse.normalization), [], [0]
    for i in range(len(plan["cells"])):
        folder, path = ModelFolder(args.output / f"cell_{i}" / "model"), args.output / START
        if folder.path.parent.is_dir():
            iterations.append(folder.saved())
            path = folder.ply(iterations[-1])
        model = formats.read(path, frame=frame)
        means = frame.leave(model.means.detach().numpy())
        inside = torch.from_numpy(number_of_cell(plan["cells"], plan["axes"], means) == i)
        parts.append({name: value.detach()[inside] for name, value in model.params.items()})
        say(f"cell {i}: {int(inside.sum()):,} of {len(model):,} Gaussians of {path}")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    out.path.mkdir(exist_ok=True)
    for path in (coarse.split, coarse.cameras, coarse.input_points, coarse.normalization):
        if path.is_file():
            shutil.copyfile(path, out.path / path.name)
    kinds = tuple(Options.__annotations__.values())
    groups = build(kinds, saved_options(coarse.path, kinds))
    out.write_options([replace(g, model_path=str(out)) if isinstance(g, ModelParams) else g for g in groups])
    joined = GaussianModel(whole, model.sh_degree, model.sh_degree)
    save_ply(joined, out.ply(max(iterations)), model.antialiased, frame)
    say(f"{out.ply(max(iterations))}: {len(joined):,} Gaussians; next: python render.py -m {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture.chunks", description="Train a large scene in cells."
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for step in (split, train, merge):
        one = steps.add_parser(step.__name__, help=step.__doc__)
        one.add_argument("-o", "--output", type=Path, required=True, help="folder of the cells")
        one.add_argument("--device", default="", help="as of train.py")
        one.set_defaults(work=step)
    one = steps.choices["split"]
    one.add_argument("-m", "--model_path", required=True, help="a coarse model of the whole scene")
    one.add_argument("--cells", type=number(int, 1, MOST_CELLS), nargs=2, default=[2, 2], metavar="N",
                     help="columns and rows (default: 2 2)")  # fmt: skip
    one.add_argument("flags", nargs="*", help="after --: what train.py is told for each cell")
    args = parser.parse_args(argv)
    return commands.run("chunks", lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
