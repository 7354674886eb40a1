"""What every data set reader hands out: views, points, and what the data set says about its split.

Readers touch no pixels and write nothing. One convention leaves them: world_to_camera acts on column vectors,
x right, y down, z forward; the center of pixel (column i, row j) is (i + 0.5, j + 0.5).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scene.lens import Lens
from scene.points import PointCloud
from utils.files import DataError

# How far the shape of a file may be off its camera's: images_4 and the like are off by a pixel, a photo
# lying on its side is off by far more.
ASPECT_TOLERANCE = 0.02
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
    def center(self) -> np.ndarray:
        """Where the camera is, [3]."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]


@dataclass
class Dataset:
    """A folder, read."""

    format: str  # "COLMAP", "Blender", ...: for messages
    folder: Path
    views: list[View]  # in the order of outputs and of --llffhold: by name, unless the format has its own
    split_folders: list[Path]  # where train.txt and test.txt are looked for
    read_points: Callable[
        [], tuple[PointCloud, str] | None
    ]  # the points and where they are from; None: there are none
    cube: float | None = None  # half its side, centered: where the format has what it shows, by convention
    notes: list[str] = field(default_factory=list)  # worth a line on the screen
    missing: list[Path] = field(default_factory=list)  # photos that it lists, but that are not there


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
