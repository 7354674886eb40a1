"""Points to start from, where a data set has them and where they have to be made up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scene.readers.views import View

GRAY = 127 / 255  # the original draws gray colors so close together that in 8 bits they are this one


@dataclass
class PointCloud:
    xyz: np.ndarray  # [N, 3] float32
    rgb: np.ndarray  # [N, 3] float32 in 0..1

    def __post_init__(self):
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3 or self.rgb.shape != self.xyz.shape:
            raise ValueError(f"xyz and rgb must both be [N, 3], got {self.xyz.shape} and {self.rgb.shape}")

    def __len__(self) -> int:
        return len(self.xyz)

    def at_most(self, count: int, seed: int) -> "PointCloud":
        """This cloud, or so many of its points drawn at random if it has more. 0: any number."""
        if count == 0 or len(self) <= count:
            return self
        kept = np.sort(np.random.RandomState(seed).permutation(len(self))[:count])
        return PointCloud(self.xyz[kept], self.rgb[kept])


def uniform_points(count: int, low: np.ndarray, high: np.ndarray, seed: int) -> PointCloud:
    """Gray points, uniform in a box. With seed 0 the original draws the same numbers."""
    unit = np.random.RandomState(seed).random_sample((count, 3))
    xyz = unit * (high - low) + low
    return PointCloud(xyz.astype(np.float32), np.full((count, 3), GRAY, np.float32))


def bounds_of_points(points: PointCloud) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the box that holds the points, but for 1 % at each end of each axis."""
    low, high = np.percentile(points.xyz, [1, 99], axis=0)
    return low, high


def bounds_of_views(views: "list[View]") -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of a cube around what the cameras look at.

    Its center is the point nearest to all optical axes, its half side what the median camera sees at that
    distance.
    """
    centers = np.array([view.center for view in views])  # [V, 3]
    axes = np.array([view.world_to_camera[2, :3] for view in views])  # [V, 3] viewing directions, unit
    spread = max(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max(), 1e-3)

    # The point p with the least sum of |(I - a aᵀ)(p - c)|². Nearly parallel axes meet nowhere; the small
    # pull towards a point ahead of the mean camera decides for them.
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    ahead = centers.mean(axis=0) + 2 * spread * axes.mean(axis=0)
    pull = 1e-3 * len(views)
    center = np.linalg.solve(
        across.sum(axis=0) + pull * np.eye(3), np.einsum("vij,vj->i", across, centers) + pull * ahead
    )

    tangents = [0.5 * view.width / view.intrinsics[0, 0] for view in views]
    half = float(np.median(np.linalg.norm(centers - center, axis=1) * np.array(tangents)))
    return center - half, center + half
