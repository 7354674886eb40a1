"""Aligns monocular depth maps with a COLMAP reconstruction: makes depth_params.json.

    python -m capture.depth_scale -s dataset -d depths [-o file]

A network sees inverse depth only up to a scale and an offset. At the key-points of each photo we know the
inverse depth twice: from the reconstruction, and from the map. The scale is the ratio of the two spreads
(mean absolute deviation from the median), the offset aligns the medians. A photo with too few key-points, or
with all of them at one depth, gets scale 0: its map is not used for depth regularization.

The maps are <depths>/<stem of the photo>.png, 16 bits. The result, depth_params.json, goes where training
looks for it: beside the reconstruction (sparse/0), or, if that must not be written to, among the maps. Where
neither can be written to, put it with -o into the model folder of the run (train.py -m), where training looks
too.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scene.readers import colmap
from scene.readers.depths import PARAMS
from scene.readers.photos import find_folder
from scene.readers.views import View
from utils import commands
from utils.files import DataError, open_image, write_json
from utils.terminal import progress, say

DIVISOR = 65536.0  # of the map's integers, the same as in training
MIN_POINTS = 10  # more than these are needed
MIN_RANGE = 1e-3  # of the key-points' inverse depth, in 1 / scene unit


def fit(known: np.ndarray, mono: np.ndarray) -> tuple[float, float]:
    """(scale, offset) that take inverse depths `mono` [P] of a map to the `known` ones [P] of the scene."""
    if len(known) <= MIN_POINTS or np.ptp(known) <= MIN_RANGE:
        return 0.0, 0.0
    spread = _spread(mono)
    if spread == 0.0:
        return 0.0, 0.0
    scale = _spread(known) / spread
    return float(scale), float(np.median(known) - np.median(mono) * scale)


def _spread(values: np.ndarray) -> float:
    return float(np.abs(values - np.median(values)).mean())


def sample(picture: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Bilinear values [P] of a picture [H, W] at (x, y) positions [P, 2]; the first pixel's center is (0.5,
    0.5)."""
    height, width = picture.shape
    x = np.clip(positions[:, 0] - 0.5, 0, width - 1)
    y = np.clip(positions[:, 1] - 0.5, 0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    u, v = x - x0, y - y0
    above = (1 - u) * picture[y0, x0] + u * picture[y0, x1]
    below = (1 - u) * picture[y1, x0] + u * picture[y1, x1]
    return (1 - v) * above + v * below


def read_map(path: Path) -> np.ndarray:
    """Inverse depth [H, W] float64. 8-bit maps are refused: 256 steps are too coarse, and their unit is
    another."""
    with open_image(path) as picture:
        if picture.mode not in ("I;16", "I;16B", "I;16L", "I"):
            raise DataError(f"{path} must be a 16-bit gray PNG, got mode {picture.mode}")
        return np.array(picture).astype(np.float64) / DIVISOR


@dataclass
class Features:
    """Key-points of one photo that became points of the scene."""

    positions: np.ndarray  # [P, 2] x, y in pixels of the reconstruction's picture size
    points: np.ndarray  # [P, 3] in the world


def read_features(model: Path) -> dict[str, Features]:
    """Image name -> features, of a COLMAP model."""
    ids, points = colmap.read_positions(model)
    order = np.argsort(ids)
    ids, points = ids[order], points[order]
    features = {}
    for name, found in colmap.read_features(model).items():
        rows = np.searchsorted(ids, found["point"]).clip(max=max(len(ids) - 1, 0))
        known = ids[rows] == found["point"] if len(ids) else np.zeros(len(found), bool)
        features[name] = Features(found["xy"][known], points[rows[known]])
    return features


def align(view: View, features: Features, path: Path) -> tuple[float, float]:
    """(scale, offset) of one photo's map. Key-points are where the lens has put them, as in the map."""
    picture, camera = read_map(path), view.lens or view
    rotation, shift = view.world_to_camera[:3, :3], view.world_to_camera[:3, 3]
    depth = features.points @ rotation[2] + shift[2]
    x, y = features.positions.T
    usable = (depth > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
    to_map = picture.shape[1] / camera.width, picture.shape[0] / camera.height
    positions = features.positions[usable] * to_map
    return fit(1.0 / depth[usable], sample(picture, positions))


def depth_params(source: Path, depths: Path, images: str = "images") -> dict[str, dict[str, float]]:
    """The content of depth_params.json: stem of the photo -> scale and offset. Photos without a map are left
    out."""
    dataset = colmap.read(source, images)
    features, params = read_features(colmap.model_folder(source)), {}
    for view in progress(dataset.views, desc="Aligning depth maps"):
        stem = view.name.rsplit(".", 1)[0]
        path = depths / f"{stem}.png"
        if path.is_file():
            scale, offset = align(view, features[view.name], path)
            params[stem] = {"scale": scale, "offset": offset}
    if not params:
        raise DataError(
            f"{depths} must hold <name of the photo>.png depth maps, found none that belongs to a photo"
        )
    return params


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m capture.depth_scale", description="Align monocular depth maps."
    )
    parser.add_argument("-s", "--source_path", type=Path, required=True, help="COLMAP data set folder")
    parser.add_argument(
        "-d", "--depths", required=True, help="folder of depth maps, in the data set or elsewhere"
    )
    parser.add_argument(
        "-i", "--images", default="images", help="image folder of the data set (default: images)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write (default: depth_params.json in sparse/0; if that is read-only, among the maps)",
    )
    args = parser.parse_args()
    return commands.run("depth_scale", lambda: align_all(args))


def align_all(args: argparse.Namespace) -> None:
    depths = find_folder(args.source_path, args.depths)
    params = depth_params(args.source_path, depths, args.images)
    if args.output:
        output = args.output
        write_json(output, params, indent=2)
    else:
        output = _write_where_allowed([colmap.model_folder(args.source_path), depths], params)
    without = sum(p["scale"] <= 0 for p in params.values())
    say(f"{output}: {len(params) - without} maps aligned, {without} not usable (few points, or no contrast)")


def _write_where_allowed(folders: list[Path], params: dict) -> Path:
    """Into the first of the folders that takes it; training looks into all of them."""
    reasons = []
    for path in (folder / PARAMS for folder in folders):
        try:
            write_json(path, params, indent=2)
            return path
        except OSError as error:
            reasons.append(str(error))
    raise DataError("; ".join(reasons) + ". With -o it goes elsewhere, such as to the model folder of a run")


if __name__ == "__main__":
    sys.exit(main())
