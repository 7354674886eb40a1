"""COLMAP models: cameras, images and points3D, as .bin or .txt, in sparse/0 or sparse, or, as nerfstudio
has them, in colmap/sparse/0.

Both forms hold the same records; each is parsed into the same Intrinsics and Pose. The format is described at
https://colmap.github.io/format.html.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scene.formats.ply import read_points
from scene.lens import MODELS, Lens, parameter_count
from scene.points import PointCloud
from scene.readers.depths import DepthMaps
from scene.readers.photos import IMAGES, Photos
from scene.readers.views import Dataset, View, camera_of
from utils.files import DataError, refuse_pointer, some, text_encoding
from utils.geometry import rotation_matrices

NAME = "COLMAP"
LOOKS_FOR = "sparse/0 or sparse with cameras and images (.bin or .txt)"

# Model id -> name, as in COLMAP's sensor/models.h; what each does is in scene/lens.py.
CAMERA_MODELS = {
    0: "SIMPLE_PINHOLE",
    1: "PINHOLE",
    2: "SIMPLE_RADIAL",
    3: "RADIAL",
    4: "OPENCV",
    5: "OPENCV_FISHEYE",
    6: "FULL_OPENCV",
    7: "FOV",
    8: "SIMPLE_RADIAL_FISHEYE",
    9: "RADIAL_FISHEYE",
    10: "THIN_PRISM_FISHEYE",
    11: "RAD_TAN_THIN_PRISM_FISHEYE",
    12: "SIMPLE_DIVISION",
    13: "DIVISION",
    14: "SIMPLE_FISHEYE",
    15: "FISHEYE",
    16: "EUCM",
    17: "EQUIRECTANGULAR",
}
PANORAMAS = {"EQUIRECTANGULAR"}  # no pinhole can show them


@dataclass
class Intrinsics:
    origin: str  # where it is from, for messages
    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass
class Pose:
    origin: str
    quat: tuple[float, ...]  # w, x, y, z: world to camera
    translation: tuple[float, ...]
    camera_id: int
    name: str  # path below the image folder


def detect(folder: Path) -> bool:
    return (folder / "sparse").is_dir()


def read(
    folder: Path,
    images: str = IMAGES,
    depths: str = "",
    derived: Path | None = None,
    outside: bool = False,
) -> Dataset:
    """`derived`: a folder outside the data set that may have its depth_params.json."""
    model, notes = _choose_model(folder)
    cameras, poses = read_model(model)
    image_folder = folder / images
    if not image_folder.is_dir():
        others = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "sparse")
        hint = f"; there is {some(others)}, choose with -i" if others else ""
        raise DataError(f"{image_folder}: the image folder is not there{hint}")
    depth_maps = DepthMaps(folder / depths, model, derived) if depths else None
    photos, views = Photos(folder, image_folder, outside=outside), []
    for pose in sorted(poses, key=lambda pose: pose.name):
        if pose.camera_id not in cameras:
            known = some([str(camera_id) for camera_id in cameras]) or "none"
            raise DataError(f"{pose.origin} has camera {pose.camera_id}; the cameras are {known}")
        camera = cameras[pose.camera_id]
        lens = Lens.from_parameters(camera.model, camera.width, camera.height, camera.params)
        views.append(
            View(
                name=pose.name,
                image_path=photos.find(pose.name),
                world_to_camera=_world_to_camera(pose),
                depth=depth_maps.of(pose.name) if depth_maps else None,
                **camera_of(lens, camera.origin),
            )
        )
    return Dataset(
        format=NAME,
        folder=folder,
        views=views,
        split_folders=[folder, model],
        read_points=lambda: _read_points(model, notes),
        photos=photos,
        notes=notes,
    )


def model_folder(folder: Path) -> Path:
    """Where the files of the reconstruction are that is used."""
    return _choose_model(folder)[0]


def _choose_model(folder: Path) -> tuple[Path, list[str]]:
    """The largest of the reconstructions in sparse/0, sparse/1, ..., and a note if there are several; else
    that in sparse itself."""
    place = folder / "sparse" if (folder / "sparse").is_dir() else folder / "colmap" / "sparse"
    models = sorted((p for p in place.glob("*") if p.name.isdecimal() and _is_model(p)), key=_number)
    if not models and _is_model(place):
        models = [place]
    if not models:
        raise DataError(
            f"{place}: neither it nor its folder 0 has cameras.bin or cameras.txt; found "
            + (some(sorted(str(p.relative_to(folder)) for p in place.rglob("*"))) or "nothing")
        )
    if len(models) == 1:
        return models[0], []
    counts = {model: _image_count(model, model == models[0]) for model in models}
    chosen = max(models, key=lambda model: counts[model])  # the first of equals
    others = some([f"{m.relative_to(folder)} ({counts[m]})" for m in models if m != chosen])
    note = (
        f"{len(models)} reconstructions: {chosen.relative_to(folder)} has the most photos, "
        f"{counts[chosen]}, and is used; not {others}"
    )
    return chosen, [note if chosen == models[0] else f"Warning: {note}"]


def _number(model: Path) -> int:
    return int(model.name)


def _is_model(folder: Path) -> bool:
    return any((folder / f"cameras{ending}").is_file() for ending in (".bin", ".txt"))


def _image_count(model: Path, must_be_whole: bool) -> int:
    try:
        if _form(model) == ".bin":
            return sum(1 for _ in _Bytes(model / "images.bin").records("image", 73))
        return sum(1 for _ in _images_txt(model / "images.txt"))
    except DataError:
        if must_be_whole:
            raise
        return 0


def read_model(model: Path) -> tuple[dict[int, Intrinsics], list[Pose]]:
    if _form(model) == ".bin":
        cameras = _read_cameras_bin(model / "cameras.bin")
        poses = [pose for pose, _ in _images_bin(model / "images.bin")]
    else:
        cameras, path = _read_cameras_txt(model / "cameras.txt"), model / "images.txt"
        poses = [_pose_txt(path, number, line) for number, line, _ in _images_txt(path)]
    if not poses:
        raise DataError(f"{model}: the model has no images")
    return cameras, poses


def _form(model: Path) -> str:
    """The ending of the model's files."""
    for ending in (".bin", ".txt"):
        if all((model / f"{part}{ending}").is_file() for part in ("cameras", "images")):
            return ending
    found = some(sorted(p.name for p in model.iterdir()))
    raise DataError(f"{model}: needs cameras and images, both as .bin or both as .txt; found {found}")


# From COLMAP's numbers to ours


def _check_model(model: str, origin: str) -> None:
    if model in PANORAMAS:
        raise DataError(
            f"{origin} is {model}, which no pinhole can show; cut the panoramas into perspective pictures "
            "before the reconstruction"
        )
    if model not in MODELS:
        raise DataError(f"{origin} has the unknown camera model {model}")


def _world_to_camera(pose: Pose) -> np.ndarray:
    quat = np.array(pose.quat)
    if not (1e-6 < np.linalg.norm(quat) < 1e6 and np.isfinite(pose.translation).all()):
        raise DataError(f"{pose.origin} has no valid pose")
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrices(torch.from_numpy(quat))
    matrix[:3, 3] = pose.translation
    return matrix


# Binary files: little endian, each begins with the number of records


class _Bytes:
    """A file read front to back; what is missing is named."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.record = "the record count"
        refuse_pointer(path)
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def take(self, layout: str) -> tuple:
        size = struct.calcsize("<" + layout)
        self._need(size)
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += size
        return values

    def skip(self, size: int) -> None:
        self._need(size)
        self.position += size

    def text(self) -> str:
        """A string that ends with a zero byte."""
        end = self.data.find(b"\0", self.position)
        if end < 0:
            self._need(len(self.data) + 1)
        raw, self.position = self.data[self.position : end], end + 1
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: the name in {self.record} is not text") from None

    def records(self, kind: str, smallest: int) -> Iterator[int]:
        """Count through the records, whose number comes next; each has at least `smallest` bytes."""
        (count,) = self.take("Q")
        if count * smallest > len(self.data) - self.position:
            raise DataError(f"{self.path}: says {count} {kind}s, but has only {len(self.data)} bytes")
        for i in range(count):
            self.record = f"{kind} {i + 1} of {count}"
            yield i

    def _need(self, size: int) -> None:
        if self.position + size > len(self.data):
            raise DataError(f"{self.path}: ends at byte {len(self.data)}, in {self.record}")


def _read_cameras_bin(path: Path) -> dict[int, Intrinsics]:
    file = _Bytes(path)
    cameras = {}
    for _ in file.records("camera", 24):
        camera_id, model_id, width, height = file.take("IiQQ")
        origin, model = f"{path}: camera {camera_id}", CAMERA_MODELS.get(model_id, str(model_id))
        _check_model(model, origin)
        params = file.take("d" * parameter_count(model))
        cameras[camera_id] = Intrinsics(origin, model, width, height, params)
    return cameras


def read_features(model: Path) -> dict[str, np.ndarray]:
    """Name of each photo -> its features, as records of FEATURE."""
    ending = _form(model)
    path = model / f"images{ending}"
    if ending == ".bin":
        return {pose.name: features for pose, features in _images_bin(path)}
    return {
        _pose_txt(path, number, line).name: _features_txt(path, number, features)
        for number, line, features in _images_txt(path)
    }


def read_tracks(path: Path) -> dict[str, np.ndarray]:
    """From images.bin: name of each photo -> ids of the points that its features became."""
    features = {pose.name: features["point"] for pose, features in _images_bin(path)}
    return {name: points[points >= 0] for name, points in features.items()}


FEATURE = np.dtype([("xy", "<f8", 2), ("point", "<i8")])  # point: -1 if it became none


def _images_bin(path: Path) -> Iterator[tuple[Pose, np.ndarray]]:
    file = _Bytes(path)
    for _ in file.records("image", 73):
        _, *pose, camera_id = file.take("I7dI")
        name = file.text()
        (count,) = file.take("Q")
        start = file.position
        file.skip(FEATURE.itemsize * count)
        features = np.frombuffer(file.data, FEATURE, count, start)
        yield Pose(f"{path}: image {name!r}", tuple(pose[:4]), tuple(pose[4:]), camera_id, name), features


POINT_RECORD = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")]
)


def read_points_bin(path: Path) -> tuple[PointCloud, np.ndarray, np.ndarray]:
    """The points, the reprojection error of each in pixels, and how many features it was made from."""
    points = _points_bin(path)
    cloud = PointCloud(points["xyz"].astype(np.float64), points["rgb"].astype(np.float32) / 255)
    return cloud, points["error"], points["track"]


def _points_bin(path: Path) -> np.ndarray:
    file = _Bytes(path)
    starts = []
    track_length = struct.Struct("<Q")
    for _ in file.records("point", POINT_RECORD.itemsize):
        start = file.position
        file._need(POINT_RECORD.itemsize)
        (track,) = track_length.unpack_from(file.data, start + POINT_RECORD.itemsize - 8)
        starts.append(start)
        file.skip(POINT_RECORD.itemsize + 8 * track)
    rows = np.array(starts, np.int64)[:, None] + np.arange(POINT_RECORD.itemsize)
    return np.frombuffer(file.data, np.uint8)[rows].view(POINT_RECORD)[:, 0]


# Text files: one record a line, # begins a comment line


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines, without comments; blank lines are kept, they can be records."""
    refuse_pointer(path)
    try:
        with open(path, encoding=text_encoding(path)) as file:
            for number, line in enumerate(file, start=1):
                if not line.startswith("#"):
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read_cameras_txt(path: Path) -> dict[int, Intrinsics]:
    cameras = {}
    for number, line in _lines(path):
        words = line.split()
        if not words:
            continue
        try:
            camera_id, model, width, height = int(words[0]), words[1], int(words[2]), int(words[3])
            params = tuple(map(float, words[4:]))
        except (ValueError, IndexError):
            raise DataError(f"{path}: line {number} must be: id model width height parameters") from None
        _check_model(model, f"{path}: line {number}")
        if len(params) != parameter_count(model):
            raise DataError(
                f"{path}: line {number}: {model} has {parameter_count(model)} parameters, got {len(params)}"
            )
        cameras[camera_id] = Intrinsics(f"{path}: camera {camera_id}", model, width, height, params)
    return cameras


def _images_txt(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number and text of each image's line, and the line with its features.

    That is the next one, and may be blank. Blank lines elsewhere do not matter, and some programs leave the
    lines of features out.
    """
    head = None
    for number, line in _lines(path):
        if head and _has_features(line):
            yield *head, line
            head = None
        elif line.strip():
            if head:
                yield *head, ""
            head = number, line
    if head:
        yield *head, ""


def _has_features(line: str) -> bool:
    """Whether a line is x y id, x y id, ..., with at least one of them."""
    words = line.split()
    return (
        len(words) >= 3 and len(words) % 3 == 0 and all(w.removeprefix("-").isdecimal() for w in words[2::3])
    )


def _features_txt(path: Path, number: int, line: str) -> np.ndarray:
    try:
        table = np.array(line.split(), np.float64).reshape(-1, 3)
    except ValueError:
        raise DataError(f"{path}: the features of the image in line {number} must be numbers") from None
    features = np.empty(len(table), FEATURE)
    features["xy"], features["point"] = table[:, :2], table[:, 2]
    return features


def _pose_txt(path: Path, number: int, line: str) -> Pose:
    words = line.split(maxsplit=9)  # the name may have spaces
    try:
        pose = tuple(map(float, words[1:8]))
        name = words[9].strip()
        return Pose(f"{path}: image {name!r}", pose[:4], pose[4:], int(words[8]), name)
    except (ValueError, IndexError):
        raise DataError(f"{path}: line {number} must be: id qw qx qy qz tx ty tz camera name") from None


def _points_txt(path: Path) -> np.ndarray:
    """id x y z red green blue, [P, 7]."""
    rows = []
    for number, line in _lines(path):
        words = line.split(maxsplit=7)
        if not words:
            continue
        try:
            rows.append([float(word) for word in words[:7]])
            if len(rows[-1]) != 7:
                raise ValueError
        except ValueError:
            raise DataError(f"{path}: line {number} must be: id x y z red green blue error track") from None
    return np.array(rows, np.float64).reshape(-1, 7)


# Points


def _read_points(model: Path, notes: list[str]) -> tuple[PointCloud, str] | None:
    """points3D as .ply, .bin or .txt: the first of those that can be read; a note says which could not."""
    errors = []
    for path in _point_files(model):
        try:
            points = _cloud(path)
        except DataError as error:
            errors.append(error)
            continue
        notes += [f"Warning: {error}; the points of {path.name} are used" for error in errors]
        return points, str(path)
    if errors:
        raise errors[0]
    return None


def _point_files(model: Path) -> list[Path]:
    """Those that there are. A .ply that is older than the model it was made from comes last."""
    ply = model / "points3D.ply"
    originals = [path for path in (model / "points3D.bin", model / "points3D.txt") if path.is_file()]
    if not ply.is_file():
        return originals
    old = any(path.stat().st_mtime > ply.stat().st_mtime for path in originals)
    return [*originals, ply] if old else [ply, *originals]


def _cloud(path: Path) -> PointCloud:
    if path.suffix == ".ply":
        return read_points(path)
    if path.suffix == ".bin":
        return read_points_bin(path)[0]
    table = _points_txt(path)
    return PointCloud(table[:, 1:4], table[:, 4:].astype(np.float32) / 255)


def read_positions(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids [P] and positions [P, 3] of points3D, in the form that the model's images have."""
    path = model / f"points3D{_form(model)}"
    if path.suffix == ".bin":
        points = _points_bin(path)
        return points["id"].astype(np.int64), points["xyz"]
    table = _points_txt(path)
    return table[:, 0].astype(np.int64), table[:, 1:4]
