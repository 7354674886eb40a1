"""LLFF scenes: poses_bounds.npy next to a folder of photos, mostly taken facing one way.

Row i of the array belongs to the i-th photo by name: 17 numbers, which are a 3x5 matrix and the nearest and
farthest depth. Columns of the matrix: the camera's axes in the world (down, right, backwards), its position,
and (height, width, focal length) in pixels of the photos at full size.
"""

import re
from pathlib import Path

import numpy as np

from scene.lens import Lens
from scene.readers.depths import DepthMaps
from scene.readers.photos import IMAGES, Photos
from scene.readers.views import Dataset, View, camera_of, check_handedness
from utils.files import DataError, read_array, some

NAME = "LLFF"
LOOKS_FOR = "poses_bounds.npy"
ENDINGS = (".png", ".jpg", ".jpeg")


def detect(folder: Path) -> bool:
    return (folder / LOOKS_FOR).is_file()


def read(
    folder: Path,
    images: str = IMAGES,
    depths: str = "",
    derived: Path | None = None,
    outside: bool = False,
) -> Dataset:
    """`outside` is not used: the file names no photos."""
    path = folder / LOOKS_FOR
    rows = read_array(path)
    if rows.ndim != 2 or rows.shape[1] != 17 or not np.isfinite(rows).all():
        raise DataError(f"{path}: must be an array of finite numbers [views, 17], got {list(rows.shape)}")
    image_folder, notes = _image_folder(folder, images)
    photos = sorted(p for p in image_folder.iterdir() if p.suffix.lower() in ENDINGS)
    if len(photos) != len(rows):
        raise DataError(f"{path}: has {len(rows)} poses, but {image_folder} has {len(photos)} photos")
    depth_maps = DepthMaps(folder / depths, folder, derived) if depths else None
    views = []
    for number, (photo, row) in enumerate(zip(photos, rows)):
        matrix, origin = row[:15].reshape(3, 5), f"{path}: row {number}"
        height, width, focal = matrix[:, 4]
        if not (0 < row[15] < row[16]):
            raise DataError(
                f"{origin}: depths must be 0 < nearest < farthest, got {row[15]:g} and {row[16]:g}"
            )
        lens = Lens("SIMPLE_PINHOLE", *_size(width, height), focal, focal, width / 2, height / 2)
        views.append(
            View(
                name=photo.name,
                image_path=photo,
                world_to_camera=_world_to_camera(matrix, origin),
                **camera_of(lens, origin),
                depth=depth_maps.of(photo.name) if depth_maps else None,
                depth_range=(float(row[15]), float(row[16])),
            )
        )
    return Dataset(
        format=NAME,
        folder=folder,
        views=views,
        split_folders=[folder],
        read_points=lambda: None,
        photos=Photos(folder, image_folder),
        notes=notes,
    )


def _size(width: float, height: float) -> tuple[int, int]:
    w, h = (int(min(max(side, 0), 1e9)) for side in (width, height))
    return w, h


def _image_folder(folder: Path, images: str) -> tuple[Path, list[str]]:
    """The folder asked for. Where images/ is asked for and only smaller copies are there, the largest of
    them."""
    if (folder / images).is_dir():
        return folder / images, []
    copies = {
        int(m[1]): p for p in folder.iterdir() if p.is_dir() and (m := re.fullmatch(r"images_(\d+)", p.name))
    }
    if images == IMAGES and copies:
        found = copies[min(copies)]
        return found, [f"Images: from {found}, as {folder / images} is not there"]
    others = some(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    hint = f"; there is {others}, choose with -i" if others else ""
    raise DataError(f"{folder / images}: the image folder is not there{hint}")


def _world_to_camera(matrix: np.ndarray, origin: str) -> np.ndarray:
    down, right, back, position = matrix[:, :4].T
    rotation = np.stack([right, down, -back])  # world to camera
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2:
        raise DataError(f"{origin}: the first three columns of the matrix are no rotation")
    check_handedness(rotation, origin)
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3], world_to_camera[:3, 3] = rotation, -rotation @ position
    return world_to_camera
