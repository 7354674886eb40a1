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
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from scene.readers import colmap
from scene.readers.depths import PARAMS
from scene.readers.views import View
from utils import commands
from utils.files import DataError, write_json

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
    with Image.open(path) as picture:
        if picture.mode not in ("I;16", "I;16B", "I;16L", "I"):
            raise DataError(f"{path} must be a 16-bit gray PNG, got mode {picture.mode}")
        return np.array(picture).astype(np.float64) / DIVISOR


@dataclass
class Features:
    """Key-points of one photo that became points of the scene."""

    positions: np.ndarray  # [P, 2] x, y in pixels of the reconstruction's picture size
    points: np.ndarray  # [P, 3] in the world


def read_features(model: Path) -> dict[str, Features]:
    """Image name -> features, from images and points3D (.bin, else .txt) of a COLMAP model."""
    binary = (model / "images.bin").is_file()
    paths = [model / f"{part}{'.bin' if binary else '.txt'}" for part in ("images", "points3D")]
    try:
        tracked, (ids, points) = (
            (_tracked_bin(paths[0]), _points_bin(paths[1]))
            if binary
            else (_tracked_txt(paths[0]), _points_txt(paths[1]))
        )
    except (struct.error, ValueError, IndexError) as error:
        raise DataError(f"{model}: images and points3D must be whole COLMAP files ({error})") from None
    order = np.argsort(ids)
    ids, points = ids[order], points[order]
    features = {}
    for name, positions, point_ids in tracked:
        rows = np.searchsorted(ids, point_ids).clip(max=max(len(ids) - 1, 0))
        known = ids[rows] == point_ids if len(ids) else np.zeros(len(point_ids), bool)
        features[name] = Features(positions[known], points[rows[known]])
    return features


FEATURE = np.dtype([("position", "<f8", 2), ("point", "<i8")])
POINT = struct.Struct("<Q3d3BdQ")  # id, position, color, error, length of the track


def _tracked_bin(path: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    data, images = path.read_bytes(), []
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        name_at = at + 64  # after id, quaternion, translation, camera id
        name_end = data.index(b"\0", name_at)
        (length,) = struct.unpack_from("<Q", data, name_end + 1)
        features = np.frombuffer(data, FEATURE, length, name_end + 9)
        images.append((data[name_at:name_end].decode(), features["position"], features["point"]))
        at = name_end + 9 + length * FEATURE.itemsize
    return images


def _points_bin(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data, ids, points = path.read_bytes(), [], []
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        number, x, y, z, *_, track = POINT.unpack_from(data, at)
        ids.append(number)
        points.append((x, y, z))
        at += POINT.size + 8 * track
    return np.array(ids, np.int64), np.array(points).reshape(-1, 3)


def _tracked_txt(path: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    images = []
    for head, features in zip(lines[::2], lines[1::2] + [""]):
        table = np.array(features.split(), np.float64).reshape(-1, 3)
        images.append((head.split(maxsplit=9)[9].strip(), table[:, :2], table[:, 2].astype(np.int64)))
    return images


def _points_txt(path: Path) -> tuple[np.ndarray, np.ndarray]:
    lines = [
        line.split() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
    ]
    points = np.array([words[1:4] for words in lines], np.float64).reshape(-1, 3)
    return np.array([words[0] for words in lines], np.int64), points


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
    for view in tqdm(dataset.views, desc="Aligning depth maps", disable=None):
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
        "-d", "--depths", required=True, help="folder of depth maps: inside the data set, or an absolute path"
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
    depths = args.source_path / args.depths
    params = depth_params(args.source_path, depths, args.images)
    if args.output:
        output = args.output
        write_json(output, params, indent=2)
    else:
        output = _write_where_allowed([colmap.model_folder(args.source_path), depths], params)
    without = sum(p["scale"] <= 0 for p in params.values())
    print(
        f"{output}: {len(params) - without} maps aligned, {without} not usable (few points, or no contrast)"
    )


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
