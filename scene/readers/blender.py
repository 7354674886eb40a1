"""NeRF-synthetic ("Blender") scenes: transforms_train.json and transforms_test.json next to RGBA images."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scene.files import DataError, read_json
from scene.ply import read_points
from scene.points import PointCloud, uniform_points
from scene.readers.views import Dataset, DepthMap, View

NAME = "Blender"
LOOKS_FOR = "transforms_train.json"
OPENGL_TO_COLMAP = np.diag([1.0, -1.0, -1.0, 1.0])
ENDINGS = (".png", ".jpg", ".jpeg")  # of a file_path that has one; the original data set's have none
CUBE = 1.3  # half the side of the cube that holds every scene of the original data set
DEFAULT_POINTS = 100_000
DEPTH_DIVISOR = 512.0


def detect(folder: Path) -> bool:
    return (folder / LOOKS_FOR).is_file()


def read(folder: Path, images: str = "", depths: str = "", derived: Path | None = None) -> Dataset:
    """`images` and `derived` are not used: each frame names its file, and depth maps need no parameters."""
    views = _read_split(folder, "train", depths)
    if (folder / "transforms_test.json").is_file():
        views += _read_split(folder, "test", depths)
    return Dataset(
        format=NAME,
        folder=folder,
        views=views,
        split_folders=[folder],
        read_points=lambda: _read_points(folder),
        default_points=default_points,
    )


def default_points(seed: int) -> PointCloud:
    """What the original starts from without points."""
    return uniform_points(DEFAULT_POINTS, np.full(3, -CUBE), np.full(3, CUBE), seed)


def _read_split(folder: Path, split: str, depths: str) -> list[View]:
    path = folder / f"transforms_{split}.json"
    meta = read_json(path)
    try:
        fov_x, frames = float(meta["camera_angle_x"]), list(meta["frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: must have a number as camera_angle_x and a list as frames ({error!r})"
        ) from None
    if not 0 < fov_x < math.pi:
        raise DataError(f"{path}: camera_angle_x must be between 0 and pi, got {fov_x}")
    views = [_read_view(folder, path, i, frame, fov_x, depths) for i, frame in enumerate(frames)]
    for view in views:
        view.held_out = split == "test"
    return views


def _read_view(folder: Path, origin: Path, number: int, frame: dict, fov_x: float, depths: str) -> View:
    try:
        file_path = str(frame["file_path"])
        camera_to_world = np.array(frame["transform_matrix"], float).reshape(4, 4) @ OPENGL_TO_COLMAP
        world_to_camera = np.linalg.inv(camera_to_world)
    except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise DataError(
            f"{origin}: frame {number} needs file_path and a 4x4 transform_matrix ({error!r})"
        ) from None
    if not np.isfinite(world_to_camera).all():
        raise DataError(f"{origin}: frame {number} has no valid transform_matrix")
    path = folder / (file_path if Path(file_path).suffix.lower() in ENDINGS else file_path + ".png")
    width, height = _image_size(path, origin)
    focal = 0.5 * width / math.tan(0.5 * fov_x)
    return View(
        name=path.stem,
        image_path=path,
        world_to_camera=world_to_camera,
        intrinsics=np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]),
        width=width,
        height=height,
        depth=DepthMap(folder / depths / f"{path.stem}.png", DEPTH_DIVISOR) if depths else None,
    )


def _image_size(path: Path, origin: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:  # reads the header only
            return image.size
    except FileNotFoundError:
        raise DataError(f"{path}: is not there, but {origin.name} lists it") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def _read_points(folder: Path) -> tuple[PointCloud, str] | None:
    path = folder / "points3d.ply"
    return (read_points(path), str(path)) if path.is_file() else None
