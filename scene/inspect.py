"""What a data set is: format, cameras, split, extent, points, warnings, and a picture of the layout.

    python -m scene.inspect dataset

Reads headers and poses, pixels only for --sharpness, and writes nothing but the picture. What training would
refuse is told as an error here, too; missing images are only counted.
"""

import argparse
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from arguments import number
from arguments.flag import MOST
from scene import extent
from scene.frame import too_small_or_far
from scene.layout import draw_layout
from scene.points import PointCloud
from scene.readers import Dataset, View, read_dataset
from scene.split import split_views
from utils import commands
from utils.files import image_size, picture_path, some
from utils.image import read_image, sharpness
from utils.terminal import say

SOFT = 0.5  # photos that rate lower, against the median, are told


def summary(
    dataset: Dataset, train: list[View], test: list[View], reason: str
) -> tuple[list[str], PointCloud | None]:
    """Lines about the data set, and its points."""
    views = dataset.views
    lines = [f"{dataset.format} data set {dataset.folder}"]
    lines.append(f"  images   {len(views)}: " + _counted(f"{w}x{h}" for w, h in map(_file_size, views)))
    lines.append("  cameras  " + _counted(map(_camera, views)))
    lines.append(f"  split    with --eval: {len(train)} train, {len(test)} test ({reason})")
    radius = extent(train)
    lines.append(
        f"  extent   {radius:.4g} (1.1 times the largest distance of a train camera from their mean)"
    )
    found = dataset.points()
    points = found.cloud if found else None
    if not found or points is None or not len(points):
        start = "are random" if dataset.cube else "are made from the photos"
        lines.append(f"  points   none: those to start from {start}")
    else:
        low, high = np.percentile(points.xyz, [1, 99], axis=0)
        box = " to ".join("(" + ", ".join(f"{x:.3g}" for x in corner) + ")" for corner in (low, high))
        lines.append(f"  points   {len(points):,} from {found.origin}, 98 % within {box}")
    notes = dataset.notes + ([f"Warning: of the points, {found.wrong}"] if found and found.wrong else [])
    notes += _warnings(views, train, points, radius) + too_small_or_far(views, points)
    return lines + [f"  {note}" for note in notes], points


def sharpness_lines(views: list[View]) -> list[str]:
    """Each photo against all others, the most blurred first. Photos of plain walls rate low, too."""
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(read_image, [view.image_path for view in views])
        ratings = [sharpness(picture[:3].permute(1, 2, 0).numpy()) for picture in pictures]
    usual = float(np.median(ratings))
    rows = sorted((rating / max(usual, 1e-9), view.name) for rating, view in zip(ratings, views))
    soft = sum(rating < SOFT for rating, _ in rows)
    head = f"  sharpness (1: as half of the photos): {soft} photos below {SOFT}; docs/deblurring.md"
    return [head, *(f"    {rating:6.2f}  {name}" for rating, name in rows)]


def _counted(texts) -> str:
    """The most frequent ones, each with how often it occurs if there are several."""
    counts = Counter(texts).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return some([f"{text} ({count})" for text, count in counts], 4)


def _file_size(view: View) -> tuple[int, int]:
    return image_size(view.image_path)


def _camera(view: View) -> str:
    model = f"{view.lens.model}, undistorted to " if view.lens else ""
    fov = [2 * math.degrees(math.atan(s / 2 / f)) for s, f in _sides(view)]
    shift = [100 * (view.intrinsics[i, 2] / side - 0.5) for i, side in enumerate((view.width, view.height))]
    off_center = (
        f", principal point off by {shift[0]:.1f} % and {shift[1]:.1f} %" if np.abs(shift).max() > 0.1 else ""
    )
    return f"{model}{view.width}x{view.height}, {fov[0]:.1f} x {fov[1]:.1f} degrees{off_center}"


def _sides(view: View) -> list[tuple[int, float]]:
    return [(view.width, view.intrinsics[0, 0]), (view.height, view.intrinsics[1, 1])]


def _warnings(views: list[View], train: list[View], points: PointCloud | None, radius: float) -> list[str]:
    warnings = []
    centers = np.array([view.center for view in views])
    if len(views) > 1 and radius < 1e-6 * max(np.abs(centers).max(), 1):
        warnings.append(
            "Warning: all cameras are in one place: nothing shows how far away things are, and training "
            "takes the extent from the points"
        )
    if points is not None and len(points):
        unseen = 1 - _seen(views, points.xyz).mean()
        if unseen > 0.05:
            warnings.append(
                f"Warning: no camera sees {100 * unseen:.0f} % of the points; do they belong together?"
            )
    names = [name for name, count in Counter(view.name for view in train).items() if count > 1]
    if names:
        warnings.append(
            f"Warning: {len(names)} names belong to several train views, such as {some(names, 2)}"
        )
    return warnings


def _seen(views: list[View], xyz: np.ndarray) -> np.ndarray:
    """Which points (of at most 5000) are in the picture of any view, bool [P]."""
    xyz = xyz[:: max(len(xyz) // 5000, 1)]
    seen = np.zeros(len(xyz), bool)
    for view in views:
        camera = xyz @ view.world_to_camera[:3, :3].T + view.world_to_camera[:3, 3]
        with np.errstate(all="ignore"):
            x, y, z = (camera @ view.intrinsics.T).T
            seen |= (z > 0) & (x >= 0) & (x < z * view.width) & (y >= 0) & (y < z * view.height)
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scene.inspect", description="Say what a data set is.")
    parser.add_argument("dataset", type=Path, help="the data set folder")
    parser.add_argument("-i", "--images", default="images", help="image folder inside the data set")
    parser.add_argument("-d", "--depths", default="", help="folder of inverse depth maps")
    parser.add_argument("-m", "--model_path", type=Path, help="model folder, where depth_params.json may be")
    parser.add_argument("--masks", default="", help="folder of masks")
    parser.add_argument(
        "--allow_outside_paths",
        action="store_true",
        help="read what the data set's files name outside its folder, too",
    )
    parser.add_argument("--sharpness", action="store_true", help="rate each photo, the most blurred first")
    parser.add_argument(
        "--llffhold",
        type=number(int, 0, MOST),
        default=8,
        help="every n-th view by name is a test view, 0: none",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        help="picture, or folder for <name of the data set>_layout.png",
    )
    args = parser.parse_args(argv)

    def work() -> None:
        dataset = read_dataset(
            args.dataset,
            args.images,
            args.depths,
            args.model_path,
            True,
            args.masks,
            args.allow_outside_paths,
        )
        train, test, reason = split_views(dataset, True, args.llffhold)
        lines, points = summary(dataset, train, test, reason)
        say(*lines, *(sharpness_lines(dataset.views) if args.sharpness else []))
        output = picture_path(args.output, f"{args.dataset.resolve().name}_layout.png")
        draw_layout(dataset.views, test, points).save(output)
        say(f"  layout   {output}")

    return commands.run("scene.inspect", work)


if __name__ == "__main__":
    sys.exit(main())
