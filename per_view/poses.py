"""Poses: where each train photo was taken from, corrected while training (--poses).

A twist x = (shift, rotation) of each camera, in its own axes: world to camera becomes exp(x) @ it. It is made
of six that each move the picture by a pixel, so that one rate suits all. What all cameras do together, a
similarity of the world, changes no picture: it is taken out after each step, so that test views fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view.per_photo import PerPhoto, pose_rate, seen
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json
from utils.rigid import cross_matrices, rigid, se3_exp, so3_exp

PULL = 5e-3  # of the loss: for each pixel that a pose is from the given one
NEAR, FAR = 0.1, 1.0  # pixels: nearer it is pulled less, and farther, since it was wrong then


class Poses(PerPhoto):
    name = "poses"

    def __init__(self, names: Sequence[str], units: Tensor):
        """units [V, 6, 6]: the twists whose multiples are learned, as columns."""
        super().__init__(names, units.new_zeros(len(units), 6))
        self.units = units
        self.gauge: Tensor | None = None

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Poses":
        views = seen(scene)
        poses = cls(scene.exposure_names, views.twists)
        poses.options = options
        poses.gauge = gauge(views.world_to_camera, poses.units)
        return poses

    def cameras(self, camera: Camera) -> list[Camera]:
        if (row := self.row(camera)) is None:
            return [camera]
        return [moved(camera, se3_exp(self.units[row] @ self.values[row]))]

    def sharp_camera(self, camera: Camera) -> Camera:
        return self.cameras(camera)[0]

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        """Poses that bend the scene along with them change no train picture: without need they stay."""
        if (row := self.row(camera)) is None:
            return 0.0
        away = (NEAR**2 + self.values[row].square().sum()).sqrt() - NEAR
        return PULL * FAR * (1 + away / FAR).log()

    def schedule(self, iteration: int) -> None:
        self.rate = pose_rate(self.options, iteration)

    def step(self) -> None:
        super().step()
        if self.gauge is not None and self.rate > 0:
            with torch.no_grad():
                self.values.sub_(common(self.values, self.gauge))

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        twists = (self.units @ self.values.detach()[..., None])[..., 0].cpu().tolist()
        path = folder.ply(iteration).with_name("poses.json")
        write_json(path, {name: twists[row] for name, row in self.rows.items()}, 1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Poses":
        data = read_json(path)
        twists = numbers(path, data, (6,)).to(device)
        poses = cls(list(data), torch.eye(6, device=device).expand(len(twists), 6, 6))
        with torch.no_grad():
            poses.values.copy_(twists)
        return poses


def numbers(path: Path, data: dict, shape: tuple[int, ...]) -> Tensor:
    """The values of a file that has a list of numbers for each photo, [V, *shape]."""
    try:
        values = torch.tensor(list(data.values()), dtype=torch.float32).reshape(len(data), *shape)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise DataError(f"{path}: must hold {'x'.join(map(str, shape))} numbers for each photo") from None
    if not values.isfinite().all():
        raise DataError(f"{path}: must hold finite numbers")
    return values


def moved(camera: Camera, motion: Tensor) -> Camera:
    """The camera after a motion [4, 4] in its own axes."""
    return replace(camera, world_to_camera=motion @ camera.world_to_camera)


def places(camera: Camera, motions: Tensor) -> list[Camera]:
    """The camera after each of the motions [n, 4, 4]."""
    return [replace(camera, world_to_camera=matrix) for matrix in motions @ camera.world_to_camera]


def motions_to(poses: Tensor) -> Tensor:
    """The motions [n, 4, 4] of a camera's axes to poses [n, 6] in them, (shift, rotation vector)."""
    shifts, turns = poses.split(3, dim=1)
    rotations = so3_exp(turns)
    return rigid(rotations, -(rotations @ shifts[..., None])[..., 0])


# The gauge: what no picture tells


def gauge(matrices: Tensor, units: Tensor) -> Tensor:
    """An orthonormal basis [6 V, 7] of the twists that a turn, a shift and a scaling of the world give to all
    cameras [V, 4, 4], in units [V, 6, 6]."""
    matrices = matrices.double()
    rotations, shifts = matrices[:, :3, :3], matrices[:, :3, 3]
    centers = -(rotations.mT @ shifts[:, :, None])[..., 0]
    around = centers - centers.mean(0)  # turning and scaling about the middle
    zero = torch.zeros_like(rotations)
    by_shift = torch.cat([rotations, zero], 1)  # [V, 6, 3]
    by_turn = torch.cat([-rotations @ cross_matrices(around), rotations], 1)
    by_scale = torch.cat([rotations @ around[:, :, None], zero[..., :1]], 1)
    basis = torch.linalg.solve(units.double(), torch.cat([by_shift, by_turn, by_scale], 2))
    basis /= basis.square().sum((0, 1)).sqrt().clamp_min(1e-12)
    u, stretch, _ = torch.linalg.svd(basis.flatten(0, 1), full_matrices=False)
    return (u * (stretch > 1e-6 * stretch.max())).to(torch.float32)


def common(twists: Tensor, basis: Tensor) -> Tensor:
    """The part of twists [V, 6] that is one similarity of the world."""
    return (basis @ (basis.T @ twists.flatten())).view_as(twists)
