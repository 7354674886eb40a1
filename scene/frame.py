"""Where a scene lies: whether its numbers suit training, and the similarity that makes them do (--normalize).

The method has two lengths of its own: what is nearer to a camera than the near plane is not drawn, and
positions are float32, whose grid becomes coarse far from the origin, as in UTM coordinates.

With --normalize a data set is moved and scaled when it is loaded, and training knows nothing else. Models,
cameras.json and input.ply are written in the data set's own coordinates all the same; normalization.json in
the model folder has the similarity, and whoever loads the model goes through it again.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scene.points import PointCloud, depth_ranges, usable
from utils.files import DataError, is_file, read_json, write_json

if TYPE_CHECKING:
    from scene.readers.views import Dataset, View

NEAR_PLANE = 0.2  # of the rasterizer
NEAREST, RADIUS = 1.0, 4.0  # in the frame of --normalize: depth of what is near, and least spread of cameras
NEAR_PERCENT = 5  # of the points that a view shows are nearer than what is called near
SAMPLE = 2000  # points that are looked at
HIDDEN = 0.1  # share of the points before the near plane,
UNSEEN = 0.5  # and share of those that no camera sees, from which on they are worth a line
OF_A_PIXEL = 0.25  # float32's grid may be so coarse, at the depth of what is near
EXACT = 2e-5  # and so coarse, in units of the frame, where a model is stored


@dataclass(frozen=True)
class Similarity:
    """From the data set to the frame of training: x becomes (x - center) / unit. Directions stay."""

    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    unit: float = 1.0

    @property
    def trivial(self) -> bool:
        return self == OF_DATA

    def enter(self, xyz: np.ndarray) -> np.ndarray:
        """Positions [..., 3] of the data set, in the frame."""
        return xyz if self.trivial else (np.asarray(xyz, np.float64) - self.center) / self.unit

    def leave(self, xyz: np.ndarray) -> np.ndarray:
        """Positions [..., 3] in the frame, in the data set's coordinates."""
        return xyz if self.trivial else np.asarray(xyz, np.float64) * self.unit + self.center

    def enter_camera(self, world_to_camera: np.ndarray) -> np.ndarray:
        """The matrix [4, 4] of a camera, its own axes scaled along."""
        if self.trivial:
            return world_to_camera
        matrix = np.array(world_to_camera, np.float64)
        matrix[:3, 3] = (matrix[:3, :3] @ self.center + matrix[:3, 3]) / self.unit
        return matrix

    @property
    def log_unit(self) -> float:
        return math.log(self.unit)

    @property
    def needs_doubles(self) -> bool:
        """Is float32 too coarse for positions in the data set's coordinates?"""
        return bool(grid(np.array(self.center)) > EXACT * self.unit)

    def write(self, path: Path) -> None:
        """As normalization.json; what an earlier run left must not stay either."""
        if self.trivial:
            path.unlink(missing_ok=True)
        else:
            write_json(path, {"about": "x in training = (x - center) / unit", **asdict(self)}, 1)

    @classmethod
    def stored(cls, path: Path) -> "Similarity":
        """Of a model, whose normalization.json is there unless it is in the data set's coordinates."""
        if not is_file(path):
            return cls()
        data = read_json(path)
        try:
            center, unit = tuple(map(float, data["center"])), float(data["unit"])
        except (KeyError, TypeError, ValueError, OverflowError):
            center, unit = (), math.nan
        if not (len(center) == 3 and np.isfinite(center).all() and 0 < unit < math.inf):
            raise DataError(f"{path}: must have three numbers as center and a positive one as unit")
        return cls(center, unit)


OF_DATA = Similarity()  # the data set's own coordinates


def grid(xyz: np.ndarray) -> float:
    """The steps in which float32 knows the largest of these numbers."""
    return float(np.spacing(np.float32(np.abs(xyz).max())))


def fitting(dataset: "Dataset") -> Similarity:
    """The similarity after which the cameras are around the origin and what is near is well before them."""
    found = dataset.read_points()
    points = usable(found[0], np.float64)[0] if found else None
    centers = np.array([view.center for view in dataset.views])
    center = centers.mean(axis=0)
    radius = float(np.linalg.norm(centers - center, axis=1).max())
    near = float(np.median(_near(dataset.views, _depths(dataset.views, points))))
    unit = near / NEAREST
    if radius > 1e-3 * near:  # else the cameras are in one place
        unit = min(unit, radius / RADIUS)
    x, y, z = map(float, center)
    return Similarity((x, y, z), unit)


def move(dataset: "Dataset", frame: Similarity) -> None:
    """Put the data set into the frame: its cameras, depths and, when they are read, its points."""
    dataset.frame = frame
    if frame.trivial:
        return
    for view in dataset.views:
        view.world_to_camera = frame.enter_camera(view.world_to_camera)
        if view.depth_range:
            near, far = view.depth_range
            view.depth_range = near / frame.unit, far / frame.unit
        if view.depth:  # inverse; a scale of 0 stands for a map that is right as it is
            view.depth.scale = frame.unit * (view.depth.scale if view.depth.scale > 0 else 1.0)
            view.depth.offset *= frame.unit


def warnings(views: "list[View]", points: PointCloud | None) -> list[str]:
    """Lines about a scene that cannot be trained well as it lies. `points`: those of the data set."""
    lines, depths = too_small_or_far(views, points), _depths(views, points)
    unseen = 1 - np.isfinite(depths).any(axis=0).mean() if depths.size else 0.0
    if unseen > UNSEEN:
        lines.append(f"Warning: no camera sees {100 * unseen:.0f} % of the points; do they belong together?")
    return lines


def too_small_or_far(views: "list[View]", points: PointCloud | None) -> list[str]:
    lines, depths = [], _depths(views, points)
    near, shown = _near(views, depths), depths[np.isfinite(depths)]
    hidden = ((shown if len(shown) else near) < NEAR_PLANE).mean()
    if hidden > HIDDEN:
        lines.append(
            f"Warning: the scene is small: {100 * hidden:.0f} % of what the cameras show is nearer than "
            f"{NEAR_PLANE}, where nothing is drawn; --normalize scales it"
        )
    step, pixel = (
        grid(np.array([view.center for view in views])),
        near / [view.intrinsics[0, 0] for view in views],
    )
    if step > OF_A_PIXEL * np.median(pixel):
        lines.append(
            f"Warning: the scene is far from the origin, where positions have steps of {step:.2g}, and "
            f"pixels show {np.median(pixel):.2g}; --normalize moves it"
        )
    return lines


def _depths(views: "list[View]", points: PointCloud | None) -> np.ndarray:
    """Of points, in each view; infinite where they are out of the picture. [V, P]"""
    if points is None or not len(points):
        return np.full((len(views), 0), np.inf)
    xyz = points.xyz[:: -(-len(points) // SAMPLE)].astype(np.float64)
    depths = np.full((len(views), len(xyz)), np.inf)
    for row, view in zip(depths, views):
        camera = xyz @ view.world_to_camera[:3, :3].T + view.world_to_camera[:3, 3]
        with np.errstate(all="ignore"):
            x, y, z = (camera @ view.intrinsics.T).T
            seen = (z > 0) & (x >= 0) & (x < z * view.width) & (y >= 0) & (y < z * view.height)
        row[seen] = z[seen]
    return depths


def _near(views: "list[View]", depths: np.ndarray) -> np.ndarray:
    """How far from each camera that begins which it shows, [V]."""
    guesses = [near for near, _ in depth_ranges(views)]
    shown = [row[np.isfinite(row)] for row in depths]
    return np.array([np.percentile(r, NEAR_PERCENT) if len(r) else g for r, g in zip(shown, guesses)])
