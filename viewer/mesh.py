"""A surface from the depths of train views, and the centers of splats as points.

Depths go into a grid of signed distances (Curless and Levoy 1996); marching cubes find where it is zero. The
splats of this method do not lie on surfaces, so that the mesh is rough: it serves to measure and to place
things, not to be looked at.
"""

from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from gaussian_renderer import outputs, render
from scene.cameras import Camera
from scene.formats.ply import write_points
from scene.frame import Similarity
from scene.gaussian_model import GaussianModel
from scene.paths import Pose, focus
from scene.points import PointCloud
from utils.files import DataError, atomic_write
from utils.sh import C0

VOXELS = 128  # along the longest side of the grid
SLICES = 8  # that are looked at together
BAND = 4.0  # voxels before and behind a surface that learn of it
SOLID = 0.5  # opacity of splats that make points and the bounds of a mesh
OUTLIERS = 0.01  # share of them at each end that may be out of the bounds


def write_centers(gaussians: GaussianModel, path: Path) -> int:
    """Returns how many."""
    solid = gaussians.opacities.detach()[:, 0] > SOLID
    colors = (0.5 + C0 * gaussians.sh_dc.detach()[solid, 0]).clamp(0, 1)
    write_points(path, PointCloud(gaussians.means.detach()[solid].cpu().numpy(), colors.cpu().numpy()))
    return int(solid.sum())


@torch.no_grad()
def write_mesh(
    gaussians: GaussianModel, cameras: list[Camera], pipe, path: Path, frame: Similarity, turn
) -> tuple[int, int]:
    """Returns the numbers of vertices and triangles. frame: of the cameras and splats; turn [3, 3]: what to
    do to the mesh in the data set's coordinates, or None."""
    try:
        from skimage.measure import marching_cubes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path}: a mesh needs the package scikit-image: pip install scikit-image") from None
    grid = Grid(*_bounds(gaussians, cameras))
    black = torch.zeros(3, device=gaussians.device)
    for camera in cameras:
        rendered = render(camera, gaussians, pipe, black)
        grid.add(camera, outputs.depth(rendered), rendered.image.clamp(0, 1))
    distances, known = grid.distances.numpy(), grid.weights.numpy() > 0
    if not (known.any() and distances[known].min() < 0 < distances[known].max()):
        raise DataError(f"{path}: the views show no surface in the model's bounds")
    vertices, faces, _, _ = marching_cubes(distances, 0.0, mask=_whole_cubes(known))
    at = tuple(np.round(vertices).astype(int).T)
    colors = (grid.colors.numpy()[at] * 255 + 0.5).astype(np.uint8)
    places = frame.leave(vertices * grid.step + grid.low.numpy())
    places = places if turn is None else places @ np.asarray(turn).T
    _write(path, places, colors, faces)
    return len(vertices), len(faces)


def _whole_cubes(known: np.ndarray) -> np.ndarray:
    """Where all eight corners of a cube are known, at its last corner, by which scikit-image asks."""
    whole = np.zeros_like(known)
    whole[1:, 1:, 1:] = True
    for corner in np.ndindex(2, 2, 2):
        part = tuple(slice(k, k + n - 1) for k, n in zip(corner, known.shape))
        whole[1:, 1:, 1:] &= known[part]
    return whole


def _bounds(gaussians: GaussianModel, cameras: list[Camera]) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high corner [3] of what cameras look at, no farther from there than they are."""
    means = gaussians.means.detach()[gaussians.opacities.detach()[:, 0] > SOLID].cpu()
    poses = [Pose(c.center.double().cpu().numpy(), c.world_to_camera[:3, :3].T.double().cpu().numpy(), 1.0)
             for c in cameras]  # fmt: skip
    middle = torch.tensor(focus(poses), dtype=torch.float32)
    reach = max(float((torch.tensor(p.place, dtype=torch.float32) - middle).norm()) for p in poses)
    means = means[(means - middle).abs().amax(1) < reach]
    if len(means) < 4:
        raise DataError("the model has no opaque splats where the cameras look: there is nothing to mesh")
    ends = torch.tensor([OUTLIERS, 1 - OUTLIERS])
    order = means.sort(0).values
    low, high = order[(ends * (len(order) - 1)).round().long()]
    return low, high


class Grid:
    """Signed distances to the surface, in units of the band: positive where cameras see through."""

    def __init__(self, low: torch.Tensor, high: torch.Tensor):
        self.step = float((high - low).max()) / (VOXELS - 2 * BAND)
        self.low = low - BAND * self.step
        size = [int(n) for n in ((high - low) / self.step + 2 * BAND + 1).ceil()]
        self.distances, self.weights = torch.zeros(size), torch.zeros(size)
        self.colors = torch.zeros(*size, 3)

    def add(self, camera: Camera, depth: torch.Tensor, image: torch.Tensor) -> None:
        """What a view says about each voxel, averaged with the others."""
        to_pixels = camera.K.cpu() @ camera.world_to_camera.cpu()[:3]
        depth, image = depth.cpu(), image.cpu().permute(1, 2, 0)
        x, y, z = (low + torch.arange(n) * self.step for low, n in zip(self.low, self.weights.shape))
        for begin in range(0, len(x), SLICES):
            part = slice(begin, begin + SLICES)
            column, row, far = (
                a * x[part, None, None] + b * y[:, None] + c * z + d for a, b, c, d in to_pixels.tolist()
            )
            ahead = far.clamp_min(1e-6)
            column, row = (column / ahead).floor().long(), (row / ahead).floor().long()
            inside = (far > 0) & (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
            row, column = row.clamp(0, camera.height - 1), column.clamp(0, camera.width - 1)
            found = depth[row, column]
            distance = (found - far) / (BAND * self.step)
            inside &= (found > 0) & (distance > -1)
            self._average(part, inside, distance.clamp_max(1), image[row, column])

    def _average(self, part: slice, where: torch.Tensor, distance: torch.Tensor, color: torch.Tensor) -> None:
        weights = self.weights[part]
        share = where / (weights + 1)
        self.distances[part] += share * (distance - self.distances[part])
        self.colors[part] += share[..., None] * (color - self.colors[part])
        self.weights[part] = weights + where


def _write(path: Path, places: np.ndarray, colors: np.ndarray, faces: np.ndarray) -> None:
    vertex = np.empty(len(places), [(n, "f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")])
    for k, name in enumerate("xyz"):
        vertex[name] = places[:, k]
    for k, name in enumerate(("red", "green", "blue")):
        vertex[name] = colors[:, k]
    face = np.empty(len(faces), [("vertex_indices", "i4", (3,))])
    face["vertex_indices"] = faces
    elements = [PlyElement.describe(vertex, "vertex"), PlyElement.describe(face, "face")]
    with atomic_write(path) as file:
        PlyData(elements, byte_order="<").write(file)
