"""transforms.json as nerfstudio and instant-ngp write it: one file for all photos, lens distortion included.

Every number of a camera may be in the frame or, for all frames, beside them. Frames hold camera-to-world
matrices with OpenGL's axes: x right, y up, z backwards. The reader of Blender's transforms_train.json uses
what the two have in common.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from scene.formats.ply import read_points
from scene.lens import Lens
from scene.points import PointCloud
from scene.readers.depths import DepthMaps
from scene.readers.photos import ENDINGS, IMAGES, Photos
from scene.readers.views import Dataset, View, camera_of, check_handedness
from utils.files import DataError, image_size, is_file, read_json

NAME = "transforms.json"
LOOKS_FOR = "transforms.json"
OPENGL_TO_COLMAP = np.diag([1.0, -1.0, -1.0, 1.0])

# camera_model -> our name, and what its coefficients are called. Programs write OPENCV or PINHOLE for any
# lens that is no fisheye, and mean the coefficients that are there.
PERSPECTIVE = ("OPENCV", ("k1", "k2", "p1", "p2", "k3", "k4"))
FISHEYE = ("OPENCV_FISHEYE", ("k1", "k2", "k3", "k4"))
LENSES = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"), PERSPECTIVE),
    **dict.fromkeys(("SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "OPENCV_FISHEYE"), FISHEYE),
    "FULL_OPENCV": ("FULL_OPENCV", ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
}


def detect(folder: Path) -> bool:
    return is_file(folder / LOOKS_FOR)


def read(
    folder: Path,
    images: str = IMAGES,
    depths: str = "",
    derived: Path | None = None,
    outside: bool = False,
) -> Dataset:
    """`images`, if it is another folder, takes the place of images/ in the paths of the frames."""
    path, photos = folder / LOOKS_FOR, Photos(folder, images=images, outside=outside)
    meta = read_json(path)
    views, missing = read_frames(photos, path, meta)
    views.sort(key=lambda view: view.name)
    if depths:
        depth_maps = DepthMaps(folder / depths, folder, derived)
        for view in views:
            view.depth = depth_maps.of(view.name)
    _split(photos, path, meta, views)
    return Dataset(
        format=NAME,
        folder=folder,
        views=views,
        split_folders=[folder],
        read_points=lambda: _read_points(photos, path, meta),
        photos=photos,
        missing=missing,
    )


def read_frames(photos: Photos, origin: Path, meta: dict) -> tuple[list[View], list[Path]]:
    """The views of a file's frames, and the photos that are not there."""
    frames = meta.get("frames")
    if not isinstance(frames, list):
        raise DataError(f"{origin}: must have a list as frames")
    views, missing = [], []
    for number, frame in enumerate(frames):
        where = f"{origin}: frame {number}"
        if not isinstance(frame, dict):
            raise DataError(f"{where} needs file_path and a 4x4 transform_matrix")
        name = frame.get("file_path")
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError(f"{where} needs file_path and a 4x4 transform_matrix")
        path = photos.find(name.replace("\\", "/"))
        if is_file(path):
            views.append(_read_view(photos, path, meta, frame, where))
        else:
            missing.append(path if path.suffix.lower() in ENDINGS else Path(f"{path}{ENDINGS[0]}"))
    return views, missing


def _read_view(photos: Photos, path: Path, meta: dict, frame: dict, where: str) -> View:
    mask = frame.get("mask_path")
    ending = Path(frame["file_path"]).suffix
    return View(
        name=_name(photos.folder, path.with_suffix(ending) if ending.lower() in ENDINGS else path),
        image_path=path,
        world_to_camera=_world_to_camera(frame, where),
        **camera_of(_lens(meta, frame, path, where), where),
        mask_path=photos.find(str(mask).replace("\\", "/")) if mask else None,
    )


def _name(folder: Path, path: Path) -> str:
    """The path in the image folder, as COLMAP's readers call a photo."""
    if not path.is_relative_to(folder):
        return path.name
    first, *rest = path.relative_to(folder).parts
    return Path(*rest).as_posix() if rest and first.startswith(IMAGES) else Path(first, *rest).as_posix()


def _world_to_camera(frame: dict, where: str) -> np.ndarray:
    try:
        matrix = np.array(frame["transform_matrix"], float)
        if matrix.shape not in ((4, 4), (3, 4)):
            raise ValueError
        camera_to_world = np.vstack([matrix[:3], [0, 0, 0, 1.0]]) @ OPENGL_TO_COLMAP
        rotation = camera_to_world[:3, :3]
        if not (np.isfinite(matrix).all() and np.abs(rotation.T @ rotation - np.eye(3)).max() < 1e-2):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where} needs file_path and a 4x4 transform_matrix whose upper left 3x3 is a rotation"
        ) from None
    check_handedness(rotation, f"{where}: transform_matrix")
    return np.linalg.inv(camera_to_world)


# Cameras


def _lens(meta: dict, frame: dict, path: Path, where: str) -> Lens:
    def number(name: str, default: Any = None) -> Any:
        return _number(frame, name, where, _number(meta, name, where, default))

    width, height = number("w"), number("h")
    if width is None or height is None:
        width, height = image_size(path)
    model, names = _model(frame.get("camera_model", meta.get("camera_model")), frame, meta, where)
    fx = _focal((frame, meta), "fl_x", "camera_angle_x", width, where)
    fy = _focal((frame, meta), "fl_y", "camera_angle_y", height, where)
    fx, fy = fy if fx is None else fx, fx if fy is None else fy
    if fx is None or fy is None:
        raise DataError(f"{where} needs a number as camera_angle_x or as fl_x, in the frame or beside frames")
    return Lens(
        model,
        int(width) if math.isfinite(width) else 0,
        int(height) if math.isfinite(height) else 0,
        fx,
        fy,
        number("cx", width / 2),
        number("cy", height / 2),
        tuple(number(name, 0.0) for name in names),
    )


def _model(name: Any, frame: dict, meta: dict, where: str) -> tuple[str, tuple[str, ...]]:
    if name is None:
        fisheye = frame.get("is_fisheye", meta.get("is_fisheye"))
        return FISHEYE if fisheye and str(fisheye).lower() not in ("false", "0") else PERSPECTIVE
    if not isinstance(name, str) or name not in LENSES:
        raise DataError(f"{where} has the camera_model {name!r}; known are {', '.join(LENSES)}")
    return LENSES[name]


def _focal(places: tuple, focal: str, angle: str, size: float, where: str) -> float | None:
    """In pixels. The frame's own words, whether focal length or angle, come before those for all frames."""
    for place in places:
        if (value := _number(place, focal, where)) is not None:
            return value
        if (value := _number(place, angle, where)) is not None:
            if not 0 < value < math.pi:
                raise DataError(f"{where}: {angle} must be between 0 and pi, got {value}")
            return 0.5 * size / math.tan(0.5 * value)
    return None


def _number(place: dict, name: str, where: str, default: float | None = None) -> float | None:
    value = place.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise DataError(f"{where}: {name} must be a number, got {value!r:.40}")
    return float(value)


# Split and points


def _split(photos: Photos, path: Path, meta: dict, views: list[View]) -> None:
    """{train,test,val}_filenames, where there are any. With a train list, everything else is held out."""
    lists = {kind: meta.get(f"{kind}_filenames") for kind in ("train", "test", "val")}
    if not any(lists.values()):
        return
    named: dict[str, set[str]] = {}
    places = Photos(photos.folder, images=photos.images, outside=True)  # its own: nothing is read here
    for kind, names in lists.items():
        if names is not None and not isinstance(names, list):
            raise DataError(f"{path}: {kind}_filenames must be a list")
        listed = [str(name).replace("\\", "/") for name in names or [] if name and "\0" not in str(name)]
        named[kind] = {Path(name).as_posix() for name in listed} | {str(places.find(n)) for n in listed}
    for view in views:
        mine = {view.name, str(view.image_path)}
        if view.image_path.is_relative_to(photos.folder):
            mine.add(view.image_path.relative_to(photos.folder).as_posix())
        if named["train"]:
            view.held_out = not mine & named["train"]
        else:
            view.held_out = bool(mine & (named["test"] | named["val"]))


def _read_points(photos: Photos, path: Path, meta: dict) -> tuple[PointCloud, str] | None:
    name = meta.get("ply_file_path")
    if not name:
        return None
    ply = photos.find(str(name).replace("\\", "/"))
    if not is_file(ply):
        raise DataError(f"{ply}: the point cloud is not there, but {path} names it as ply_file_path")
    return read_points(ply), str(ply)
