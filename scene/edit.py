"""Changes to a finished model: turned, fewer splats, less SH."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scene.frame import Similarity
from scene.gaussian_model import GaussianModel
from utils.files import DataError, read_json
from utils.geometry import rotation_matrices
from utils.sh import basis

PROBES = 64  # directions from which the matrices of SH are found
UP = (0.0, -1.0, 0.0)  # y points down
DIRECTIONS = 2048


def with_params(gaussians: GaussianModel, params: dict[str, Tensor], sh_degree: int) -> GaussianModel:
    model = GaussianModel(params, sh_degree, active_sh_degree=min(gaussians.active_sh_degree, sh_degree))
    model.extent, model.antialiased = gaussians.extent, gaussians.antialiased
    return model


def rows(gaussians: GaussianModel, index: Tensor) -> GaussianModel:
    """These splats, by number or by mask."""
    params = {name: value.detach()[index] for name, value in gaussians.params.items()}
    return with_params(gaussians, params, gaussians.sh_degree)


def limit_sh(gaussians: GaussianModel, degree: int) -> GaussianModel:
    degree = min(degree, gaussians.sh_degree)
    params = {name: value.detach() for name, value in gaussians.params.items()}
    params["sh_rest"] = params["sh_rest"][:, : (degree + 1) ** 2 - 1]
    return with_params(gaussians, params, degree)


class Box(NamedTuple):
    """One that may be turned."""

    center: Tensor  # [3]
    size: Tensor  # [3] from end to end, along its own axes
    axes: Tensor  # [3, 3] those are its columns

    @classmethod
    def of(cls, numbers: list[float]) -> "Box":
        """x y z X Y Z, two corners; or its center, its size and how it is turned: degrees about x, y and z,
        one after the other."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if len(values) == 6:
            low, high = values.view(2, 3)
            return cls((low + high) / 2, high - low, torch.eye(3, dtype=torch.float64))
        return cls(values[:3], values[3:6], euler(values[6:].deg2rad()))

    @classmethod
    def read(cls, path: Path) -> "Box":
        """The crop of nerfstudio's camera_path.json, whose turn is in radians."""
        crop = read_json(path).get("crop")
        try:
            rows = [crop[f"crop_{name}"] for name in ("center", "scale", "rot")]
            center, size, turn = (torch.tensor(row, dtype=torch.float64).reshape(3) for row in rows)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise DataError(f"{path}: must have a crop with crop_center, crop_scale and crop_rot") from None
        return cls(center, size, euler(turn))

    def holds(self, gaussians: GaussianModel) -> Tensor:
        """Mask [N] of centers that are inside."""
        offsets = (gaussians.means.detach().double().cpu() - self.center) @ self.axes
        return (offsets.abs() <= self.size / 2).all(1).to(gaussians.device)


def euler(angles: Tensor) -> Tensor:
    """The rotation [3, 3] about x, then y, then z, by so many radians each."""
    half = 0.5 * angles
    turns = torch.zeros(3, 4, dtype=torch.float64)
    turns[:, 0] = half.cos()
    turns[range(3), range(1, 4)] = half.sin()
    about_x, about_y, about_z = rotation_matrices(turns)
    return about_z @ about_y @ about_x


def in_hull(gaussians: GaussianModel, corners: Tensor) -> Tensor:
    """Mask [N] of centers in the convex hull of these points [P, 3], as DIRECTIONS of half-spaces know it."""
    k = torch.arange(DIRECTIONS, dtype=torch.float64) + 0.5
    z, angle = 1 - 2 * k / DIRECTIONS, k * math.pi * (3 - 5**0.5)  # evenly over the sphere
    ring = (1 - z * z).sqrt()
    sides = torch.stack([ring * angle.cos(), ring * angle.sin(), z])
    middle = corners.mean(0)
    farthest = ((corners - middle) @ sides).amax(0)
    offsets = gaussians.means.detach().double().cpu() - middle
    masks = [((piece @ sides) <= farthest).all(1) for piece in offsets.split(1 << 14)]
    return torch.cat(masks).to(gaussians.device) if masks else torch.zeros(0, dtype=torch.bool)


def into(gaussians: GaussianModel, frame: Similarity) -> GaussianModel:
    """From the data set's coordinates to those of a frame."""
    if frame.trivial:
        return gaussians
    params = {name: value.detach() for name, value in gaussians.params.items()}
    means = frame.enter(params["means"].double().cpu().numpy())
    params["means"] = torch.from_numpy(means).to(params["means"])
    params["log_scales"] = params["log_scales"] - frame.log_unit
    return with_params(gaussians, params, gaussians.sh_degree)


def most_visible(gaussians: GaussianModel, share: float, score: Tensor | None = None) -> Tensor:
    """Numbers of this share of the splats: those with the highest score. Without scores [N], those whose two
    longest axes and opacity cover the most."""
    if score is None:
        axes = gaussians.log_scales.detach().sort(1).values[:, 1:]
        score = axes.sum(1) + torch.nn.functional.logsigmoid(gaussians.opacity_logits.detach()[:, 0])
    return score.topk(round(share * len(gaussians))).indices.sort().values


def turn(gaussians: GaussianModel, quat: Tensor) -> GaussianModel:
    """The scene turned about the origin by this quaternion (w, x, y, z): shapes and SH along with it."""
    rotation = rotation_matrices(quat.double()[None])[0].cpu()
    params = {name: value.detach() for name, value in gaussians.params.items()}
    kind = params["means"]
    params["means"] = params["means"] @ rotation.T.to(kind)
    params["raw_quats"] = _product(quat.to(kind), params["raw_quats"])
    matrix = sh_rotation(rotation, gaussians.sh_degree).to(kind)
    params["sh_rest"] = torch.einsum("ij,njc->nic", matrix, params["sh_rest"])
    return with_params(gaussians, params, gaussians.sh_degree)


def turn_back(quat: Tensor) -> Tensor:
    """The inverse of a turn."""
    return quat * torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=quat.dtype)


def sh_rotation(rotation: Tensor, degree: int) -> Tensor:
    """The matrix [K-1, K-1] (float64) that turns SH coefficients 1 and up along with the scene. Degrees do
    not mix: for each, it is solved for on some directions."""
    matrix = torch.zeros((degree + 1) ** 2 - 1, (degree + 1) ** 2 - 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(PROBES, 3, dtype=torch.float64, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=1)
    turned, before = basis(degree, directions), basis(degree, directions @ rotation.double())
    for l in range(1, degree + 1):
        band = slice(l * l, (l + 1) ** 2)
        block = torch.linalg.lstsq(turned[:, band], before[:, band]).solution
        matrix[l * l - 1 : (l + 1) ** 2 - 1, l * l - 1 : (l + 1) ** 2 - 1] = block
    return matrix


def quat_between(a: Tensor, b: Tensor) -> Tensor:
    """The shortest turn [4] from direction a to direction b."""
    a, b = (torch.nn.functional.normalize(v.double(), dim=0) for v in (a, b))
    if a @ b < -1 + 1e-12:  # half a turn about any axis across
        across = torch.linalg.cross(a, torch.eye(3, dtype=torch.float64)[a.abs().argmin()])
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.nn.functional.normalize(across, dim=0)])
    return torch.nn.functional.normalize(torch.cat([(1 + a @ b)[None], torch.linalg.cross(a, b)]), dim=0)


def to_up(up: Tensor) -> Tensor:
    """The turn after which `up` is up, as in the camera of an upright photo."""
    return quat_between(up, torch.tensor(UP))


def mean_up(cameras: list[dict], path: Path) -> Tensor:
    """Of the entries of cameras.json: the second column of a rotation points down."""
    try:
        down = np.array([camera["rotation"] for camera in cameras], np.float64).reshape(-1, 3, 3)[:, :, 1]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: every camera must have a rotation of 3 x 3 numbers") from None
    up = -down.sum(0)
    if not np.linalg.norm(up) > 1e-3 * max(1, len(down)):
        raise DataError(f"{path}: the cameras must agree about where up is; name an axis with --up")
    return torch.from_numpy(up)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Quaternion a [4] times each of b [N, 4]."""
    w, x, y, z = a.unbind()
    rows = [[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    return b @ torch.stack([torch.stack(row) for row in rows]).T
