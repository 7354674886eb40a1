"""Points to start from, where a data set has them and where they have to be made up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scene.readers.views import View

FARTHEST = 1e12  # from the origin; beyond, float32 knows no scene
GRAY = 127 / 255  # the original draws gray colors so close together that in 8 bits they are this one
NEAR, FAR = 0.5, 5.0  # depths of points_in_view, in distances from the camera to what all cameras look at


@dataclass
class PointCloud:
    xyz: np.ndarray  # [N, 3], float64 if it was read as such, else float32
    rgb: np.ndarray  # [N, 3], made float32; in 0..1

    def __post_init__(self):
        self.xyz, self.rgb = np.asarray(self.xyz), np.asarray(self.rgb, np.float32)
        if self.xyz.dtype != np.float64:
            self.xyz = self.xyz.astype(np.float32, copy=False)
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3 or self.rgb.shape != self.xyz.shape:
            raise ValueError(f"xyz and rgb must both be [N, 3], got {self.xyz.shape} and {self.rgb.shape}")

    def __len__(self) -> int:
        return len(self.xyz)

    def at_most(self, count: int, seed: int) -> "PointCloud":
        """This cloud, or so many of its points drawn at random if it has more. 0: any number."""
        if count == 0 or len(self) <= count:
            return self
        kept = np.sort(np.random.RandomState(numpy_seed(seed)).permutation(len(self))[:count])
        return PointCloud(self.xyz[kept], self.rgb[kept])


def usable(points: PointCloud, kind: type = np.float32) -> tuple[PointCloud, str]:
    """The points that a scene can have, as `kind`, and in words what was wrong with others."""
    keep = (np.abs(points.xyz) < FARTHEST).all(axis=1)  # numbers that are no numbers are not, either
    xyz, rgb, wrong = points.xyz[keep].astype(kind), points.rgb[keep], []
    if lost := len(points) - len(xyz):
        wrong.append(f"{lost:,} are left out, as they are not finite or farther away than {FARTHEST:g}")
    if colorless := int((~np.isfinite(rgb)).any(axis=1).sum()):
        rgb = np.where(np.isfinite(rgb), rgb, np.float32(0.5))
        wrong.append(f"{colorless:,} have colors that are not finite, and become gray")
    return PointCloud(xyz, rgb.clip(0, 1)), "; ".join(wrong)


def numpy_seed(seed: int) -> int | list[int]:
    """What NumPy's older generator takes: one word of 32 bits, or several."""
    return seed if seed < 2**32 else [seed & 0xFFFFFFFF, seed >> 32]


def uniform_points(count: int, low: np.ndarray, high: np.ndarray, seed: int) -> PointCloud:
    """Gray points, uniform in a box. With seed 0 the original draws the same numbers."""
    unit = np.random.RandomState(numpy_seed(seed)).random_sample((count, 3))
    xyz = unit * (high - low) + low
    return PointCloud(xyz.astype(np.float32), np.full((count, 3), GRAY, np.float32))


def bounds_of_points(points: PointCloud) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the box that holds the points, but for 1 % at each end of each axis."""
    low, high = np.percentile(points.xyz, [1, 99], axis=0)
    return low, high


def nearest_to_axes(centers: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """What cameras look at: the point nearest to all optical axes. Centers and viewing directions are
    [V, 3]."""
    spread = max(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max(), 1e-3)

    # The point p with the least sum of |(I - a aᵀ)(p - c)|². Nearly parallel axes meet nowhere; the small
    # pull towards a point ahead of the mean camera decides for them.
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    ahead = centers.mean(axis=0) + 2 * spread * axes.mean(axis=0)
    pull = 1e-3 * len(centers)
    return np.linalg.solve(
        across.sum(axis=0) + pull * np.eye(3), np.einsum("vij,vj->i", across, centers) + pull * ahead
    )


def depth_ranges(views: "list[View]") -> list[tuple[float, float]]:
    """Nearest and farthest depth of what each view shows; guessed, where the data set does not say."""
    centers = np.array([view.center for view in views])  # [V, 3]
    axes = np.array([view.world_to_camera[2, :3] for view in views])
    distance = np.linalg.norm(nearest_to_axes(centers, axes) - centers, axis=1).clip(1e-6)
    return [view.depth_range or (NEAR * d, FAR * d) for view, d in zip(views, distance)]


def points_in_view(views: "list[View]", count: int, seed: int) -> PointCloud:
    """Gray points in what the cameras see: a random view, pixel and depth, as many near as far in the picture
    (uniform in 1 / depth)."""
    random = np.random.RandomState(numpy_seed(seed))
    centers = np.array([view.center for view in views])  # [V, 3]
    rotations = np.array([view.world_to_camera[:3, :3] for view in views])

    of = random.randint(len(views), size=count)  # the view of each point
    near, far = np.array(depth_ranges(views))[of].T
    depth = 1 / (1 / near + random.random_sample(count) * (1 / far - 1 / near))
    sizes = np.array([(view.width, view.height) for view in views], float)
    pixels = np.column_stack([random.random_sample((count, 2)) * sizes[of], np.ones(count)])
    rays = np.einsum("pij,pj->pi", np.linalg.inv([view.intrinsics for view in views])[of], pixels)
    xyz = centers[of] + np.einsum("pji,pj->pi", rotations[of], rays * depth[:, None])
    return PointCloud(xyz.astype(np.float32), np.full((count, 3), GRAY, np.float32))
