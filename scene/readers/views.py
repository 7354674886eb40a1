"""What every data set reader hands out: views, points, and what the data set says about its split.

Readers touch no pixels and write nothing. One convention leaves them: world_to_camera acts on column vectors,
x right, y down, z forward; the center of pixel (column i, row j) is (i + 0.5, j + 0.5).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scene.frame import OF_DATA, Similarity
from scene.lens import Lens
from scene.points import PointCloud, usable
from utils.files import DataError, image_size, orientation, some

if TYPE_CHECKING:
    from scene.readers.photos import Photos

# How far the shape of a file may be off its camera's; small copies (images_8) may be off by a pixel.
ASPECT_TOLERANCE = 0.02
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations
MAX_SIZE = 1 << 20  # pixels along a side: more than any camera has


@dataclass
class DepthMap:
    """An inverse depth map, up to the scale and offset that align it with the scene."""

    path: Path
    divisor: float  # of the file's integers
    scale: float = 0.0  # inverse depth = map * scale + offset, if scale > 0; else the map as it is
    offset: float = 0.0
    reliable: bool = True  # the fit of scale and offset looks like those of the other views
    doubt: str = ""  # if it is not reliable: why, in a word


@dataclass(eq=False)
class View:
    """One photo and where it was taken."""

    name: str  # as outputs call it: exposure.json, cameras.json, reports
    image_path: Path
    world_to_camera: np.ndarray  # [4, 4]
    intrinsics: np.ndarray  # [3, 3] in pixels of width x height
    width: int  # the size the intrinsics are for; the file may be smaller (images_2, images_4, ...)
    height: int
    lens: Lens | None = None  # what distorts the file's picture; what is above is without distortion
    mask_path: Path | None = None  # white where the photo counts
    held_out: bool | None = None  # whether the data set itself lists it as a test view; None: it does not say
    depth: DepthMap | None = None
    depth_range: tuple[float, float] | None = None  # nearest and farthest, if the data set says so

    @property
    def camera_size(self) -> tuple[int, int]:
        """Width and height of the camera that took the photo."""
        camera = self.lens or self
        return camera.width, camera.height

    def turn(self, path: Path) -> int:
        """The EXIF orientation by which the photo, its mask or its depth map has to be turned to have the
        shape of the camera; 1: it stays as it is. Where a mask or a map has none, the photo's counts."""
        size = image_size(path)
        if _off((size[1], size[0]), self.camera_size) < _off(size, self.camera_size):
            for told in (path, self.image_path):
                if (number := orientation(told)) in ON_ITS_SIDE:
                    return number
        return 1

    def size_of(self, path: Path) -> tuple[int, int]:
        """Width and height of the photo, its mask or its depth map, once it is turned."""
        width, height = image_size(path)
        return (width, height) if self.turn(path) == 1 else (height, width)

    @property
    def center(self) -> np.ndarray:
        """Where the camera is, [3]."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]


class Points(NamedTuple):
    """What a data set has of them."""

    cloud: PointCloud  # in float32, in the frame of training
    origin: str  # the file they are from
    wrong: str  # with others, in words


@dataclass
class Dataset:
    """A folder, read."""

    format: str  # "COLMAP", "Blender", ...: for messages
    folder: Path
    views: list[View]  # in the order of outputs and of --llffhold: by name, unless the format has its own
    split_folders: list[Path]  # where train.txt and test.txt are looked for
    read_points: Callable[
        [], tuple[PointCloud, str] | None
    ]  # the points as they are, and where they are from; None: there are none. See points()
    photos: "Photos"  # finds its files
    cube: float | None = None  # half its side, centered: where the format has what it shows, by convention
    notes: list[str] = field(default_factory=list)  # worth a line on the screen
    missing: list[Path] = field(default_factory=list)  # photos that it lists, but that are not there
    frame: Similarity = OF_DATA  # from the data set's coordinates to those of the views here

    def points(self) -> Points | None:
        """Those that can be used; None: there are none in the data set."""
        found = self.read_points()
        if found is None:
            return None
        raw, origin = found
        cloud, wrong = usable(PointCloud(self.frame.enter(raw.xyz), raw.rgb))
        return Points(cloud, origin, wrong)


def camera_of(lens: Lens, origin: str) -> dict:
    """The fields of a View that a camera decides. `origin` is where the lens is described."""
    if not (0 < lens.width <= MAX_SIZE and 0 < lens.height <= MAX_SIZE):
        raise DataError(f"{origin} has the impossible size {lens.width} x {lens.height}")
    numbers = (lens.fx, lens.fy, lens.cx, lens.cy, *lens.coefficients)
    if not (np.isfinite(numbers).all() and lens.fx > 0 and lens.fy > 0):
        raise DataError(f"{origin} has impossible parameters {numbers}")
    try:
        pinhole = lens.pinhole()
    except DataError as error:
        raise DataError(f"{origin}: {error}") from None
    return {
        "intrinsics": pinhole.matrix,
        "width": pinhole.width,
        "height": pinhole.height,
        "lens": lens if lens.distorts() else None,
    }


def check_handedness(rotation: np.ndarray, origin: str) -> None:
    """Refuse a mirrored matrix: it is orthogonal, but no camera can be turned so."""
    if np.linalg.det(rotation) < 0:
        raise DataError(
            f"{origin} is mirrored (its determinant is negative), as from a program with left-handed axes; "
            "negate one axis of its world, such as the second row of every matrix and y of every point"
        )


def _off(size: tuple[int, int], camera: tuple[int, int]) -> int:
    """How far the shape is off the camera's; sides rounded by a pixel make up to camera width + height."""
    return abs(size[0] * camera[1] - size[1] * camera[0])


def same_shape(size: tuple[int, int], camera: tuple[int, int]) -> bool:
    return _off(size, camera) <= max(ASPECT_TOLERANCE * size[1] * camera[0], sum(camera))


def check_shapes(views: Sequence[View]) -> list[str]:
    """Photos must have the shape of their cameras, lying on their side or not. Returns a line if some do."""
    odd, turned = [], 0
    for view in views:
        (width, height), camera = image_size(view.image_path), view.camera_size
        if not same_shape(view.size_of(view.image_path), camera):
            odd.append(f"{view.name} ({width}x{height}, camera {camera[0]}x{camera[1]})")
        turned += view.turn(view.image_path) != 1
    if odd:
        raise DataError(
            f"{len(odd)} of {len(views)} photos do not have the shape of their cameras, not even turned by "
            f"EXIF: {some(odd, 3)}; use those that the cameras were found from, or smaller copies"
        )
    return [f"{turned} photos lie on their side and are turned, as their EXIF data say"] if turned else []


def check_names(views: Sequence[View]) -> list[str]:
    """A line about photos that are listed twice, or would be the same on a disk that takes A for a."""
    files = Counter(str(view.image_path).casefold() for view in views)
    twice = [view.name for view in views if files[str(view.image_path).casefold()] > 1]
    told = f"Warning: {len(twice)} views share photos, or names but for upper and lower case: {some(twice)}"
    return [told] if twice else []
