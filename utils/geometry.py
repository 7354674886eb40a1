"""Geometry of one Gaussian and of one pinhole camera, in Python.

Quaternions are (w, x, y, z). World to camera is a [4, 4] matrix that acts on column vectors, x right, y down,
z forward.
"""

import math

import torch
from torch import Tensor


def rotation_matrices(quats: Tensor) -> Tensor:
    """[N, 4] quaternions of any length -> [N, 3, 3] rotations."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def covariances(scales: Tensor, quats: Tensor, scale_modifier: float = 1.0) -> Tensor:
    """Sigma = R S Sᵀ Rᵀ (paper, equation 6) as its upper triangle [N, 6]: xx xy xz yy yz zz."""
    factor = rotation_matrices(quats) * (scale_modifier * scales).unsqueeze(-2)  # R S: the columns scaled
    sigma = factor @ factor.transpose(-1, -2)
    rows, columns = torch.triu_indices(3, 3).unbind(0)
    return sigma[:, rows, columns]


def camera_center(world_to_camera: Tensor) -> Tensor:
    """Where the camera stands: the point that the matrix sends to the origin, -Rᵀ t."""
    return -(world_to_camera[:3, :3].T @ world_to_camera[:3, 3])


def focal_from_fov(fov: float, pixels: int) -> float:
    return 0.5 * pixels / math.tan(0.5 * fov)


def fov_from_focal(focal: float, pixels: int) -> float:
    return 2.0 * math.atan(0.5 * pixels / focal)


def intrinsics_from_fov(fov_x: float, fov_y: float, width: int, height: int) -> Tensor:
    """K [3, 3] of a camera whose principal point is the middle of the picture."""
    fx, fy = focal_from_fov(fov_x, width), focal_from_fov(fov_y, height)
    return torch.tensor([[fx, 0.0, 0.5 * width], [0.0, fy, 0.5 * height], [0.0, 0.0, 1.0]])


def morton_codes(points: Tensor) -> Tensor:
    """Numbers [N] int64 along a curve through space: sorted by them, neighbors in memory are neighbors in
    space. Points [N, 3] far outside are drawn in, so that a few of them do not coarsen the rest."""
    if len(points) == 0:
        return torch.empty(0, dtype=torch.int64, device=points.device)
    middle = torch.stack([axis.median() for axis in points.unbind(1)])
    distance = (points - middle).abs().median().clamp_min(1e-12)
    inside = (points - middle) / distance
    inside = inside / (1 + inside.abs())  # in (-1, 1)
    cell = ((inside + 1) * 512).long().clamp(0, 1023)
    for shift, mask in ((16, 0x30000FF), (8, 0x300F00F), (4, 0x30C30C3), (2, 0x9249249)):
        cell = (cell | cell << shift) & mask  # two zeros after each bit
    return cell[:, 0] | cell[:, 1] << 1 | cell[:, 2] << 2
