"""A few numbers for each train photo, with an optimizer of their own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arguments import Options
from per_view.module import PerView
from scene import Scene
from scene.cameras import Camera
from scene.frame import NEAR_PLANE
from utils.rigid import cross_matrices
from utils.schedules import log_linear

BETAS, EPS = (0.9, 0.99), 1e-15
MOST = 0.05, 0.95  # quantiles
POINTS = 5000  # that are looked at to know how far away things are
LARGEST = 10.0  # times a unit: the twists that are hardest to see
PAUSE = 300  # steps after an opacity reset in which the picture is too faint to learn from


class PerPhoto(PerView):
    """Numbers [V, ...]. A photo's row moves when the photo is trained on, and rests otherwise: its Adam
    counts visits. Rows belong to train photos; test views and those of the viewer are as they are without."""

    options: Options  # of the run, while training

    def __init__(self, names: Sequence[str], start: Tensor):
        self.rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
        start = start[: len(self.rows)].clone()
        self.values = nn.Parameter(start)
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)
        self.steps = start.new_zeros(len(start))
        self.rate = 0.0

    def row(self, camera: Camera) -> int | None:
        return None if camera.is_test else self.rows.get(camera.name)

    def parameters(self) -> list[Tensor]:
        return [self.values]

    def step(self) -> None:
        grad, self.values.grad = self.values.grad, None
        if grad is not None and self.rate > 0:
            self._move(grad)

    @torch.no_grad()
    def _move(self, grad: Tensor) -> None:
        trained = grad.flatten(1).ne(0).any(1)
        self.steps += trained
        wide = (-1, *[1] * (grad.dim() - 1))
        trained, steps = trained.view(wide), self.steps.view(wide)
        for moment, beta, value in zip((self.mean, self.square), BETAS, (grad, grad.square())):
            moment.copy_(torch.where(trained, torch.lerp(value, moment, beta), moment))
        mean, square = (m / (1 - beta**steps) for m, beta in zip((self.mean, self.square), BETAS))
        self.values -= self.rate * torch.where(trained, mean / (square.sqrt() + EPS), 0.0)

    def state_dict(self) -> dict:
        moments = {"mean": self.mean, "square": self.square, "steps": self.steps}
        return {"names": list(self.rows), "values": self.values.detach(), **moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Of another run: what it knows about the photos of this one."""
        names, count = state["names"], len(state["names"])
        if len(set(names)) != count or not all(type(name) is str for name in names):
            raise ValueError(f"its {self.name} must have different names")
        known = [name for name in names if name in self.rows]
        there, here = [names.index(name) for name in known], [self.rows[name] for name in known]
        for key, mine in self._rows().items():
            value, shape = state[key], (count, *mine.shape[1:])
            if not isinstance(value, Tensor) or value.shape != shape or value.dtype != mine.dtype:
                raise ValueError(f"{key} of {self.name} must be {list(shape)} floats")
            mine[here] = value[there]

    def _rows(self) -> dict[str, Tensor]:
        return {"values": self.values, "mean": self.mean, "square": self.square, "steps": self.steps}


def pose_rate(options: Options, iteration: int) -> float:
    """Of poses at this step; 0 while they rest."""
    views = options.views
    return rate(options, iteration, views.pose_from_iter, views.pose_lr_init, views.pose_lr_final)


def rate(options: Options, iteration: int, first: int, initial: float, final: float) -> float:
    """Of what moves after the step `first`, and rests after opacity resets."""
    if iteration <= first or dimmed(options, iteration):
        return 0.0
    return log_linear(iteration - first, initial, final, options.opt.iterations - first)


def dimmed(options: Options, iteration: int) -> bool:
    """Have opacities been reset just before?"""
    opt = options.opt
    since = (iteration - 1) % opt.opacity_reset_interval
    reset = iteration - 1 - since
    pause = min(PAUSE, opt.opacity_reset_interval // 10)
    return opt.strategy != "mcmc" and 0 < reset < opt.densify_until_iter and since < pause


# How far away things are, and what a pixel is


class Seen(NamedTuple):
    """The train photos that have rows, in their order."""

    world_to_camera: Tensor  # [V, 4, 4]
    K: Tensor  # [V, 3, 3]
    inverse_depths: Tensor  # [V], of what they show, on average
    ranges: Tensor  # [V, 2], of most of it, from far to near
    flows: Tensor  # [V, 6, 6], mean J^T J: twists in `units` by J move points in the picture, in pixels

    @property
    def units(self) -> Tensor:
        """What moves the picture by about a pixel: of shifts and of turns of each camera, [V, 6]."""
        return units(self.K, self.inverse_depths)

    @property
    def twists(self) -> Tensor:
        """Six twists of each camera, as columns, that do different things to its picture, each by a pixel.

        [V, 6, 6]. A shift to the side and a turn look nearly alike. What they do together is one of the six,
        and what sets them apart is another, and much larger. What is hardest to see moves less."""
        squares, axes = torch.linalg.eigh(self.flows.double())
        sizes = squares.clamp_min(0).sqrt().clamp_min(1 / LARGEST)
        return (self.units.double()[:, :, None] * axes / sizes[:, None]).float()


def seen(scene: Scene) -> Seen:
    test_first = sorted(scene.train_cameras, key=lambda camera: not camera.is_test)
    cameras = {camera.name: camera for camera in test_first}  # they can share names with train views
    found = [cameras[name] for name in dict.fromkeys(scene.exposure_names)]
    xyz = scene.points.xyz
    points = torch.tensor(xyz[:: -(-len(xyz) // POINTS)], dtype=torch.float32, device=scene.background.device)
    in_view = [_in_view(camera, points) for camera in found]
    depths = torch.stack([_inverse_depths(points) for points in in_view])  # [V, 3]
    others = depths.nanmean(0).nan_to_num(1 / max(scene.extent, 1e-9))
    depths = torch.where(depths.isfinite(), depths, others)
    matrices, intrinsics = (torch.stack(part) for part in zip(*((c.world_to_camera, c.K) for c in found)))
    sizes = units(intrinsics, depths[:, 0])
    flows = torch.stack([_flow(*of) for of in zip(in_view, depths[:, 1:], intrinsics, sizes)])
    return Seen(matrices, intrinsics, depths[:, 0], depths[:, 1:], flows)


def units(K: Tensor, inverse_depths: Tensor) -> Tensor:
    turns = 1 / K[:, 0, 0]
    return torch.stack([turns / inverse_depths] * 3 + [turns] * 3, 1)


def _in_view(camera: Camera, points: Tensor) -> Tensor:
    """The points in the picture, in the camera's axes: [n, 3]."""
    x, y, z = seen = (points @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]).T
    u, v, _ = camera.K @ seen
    inside = (z > NEAR_PLANE) & (u >= 0) & (u < z * camera.width) & (v >= 0) & (v < z * camera.height)
    return seen.T[inside]


def _inverse_depths(points: Tensor) -> Tensor:
    """Mean, and where most are; not numbers if there are no points. [3]"""
    if len(points) == 0:
        return points.new_full((3,), torch.nan)
    inverse = 1 / points[:, 2]
    return torch.cat([inverse.mean()[None], inverse.quantile(inverse.new_tensor(MOST))])


def _flow(points: Tensor, between: Tensor, K: Tensor, sizes: Tensor) -> Tensor:
    """Seen.flows of one camera, by the points between these inverse depths. Of none: as if all twists were
    different."""
    x, y, z = (points := points[(points[:, 2:] * between - 1).prod(1) <= 0]).T
    if len(points) == 0:
        return torch.eye(6, device=points.device)
    still = torch.eye(3, device=points.device).expand(len(points), 3, 3)
    moves = torch.cat([still, -cross_matrices(points)], 2)  # of points, by twists
    zero = torch.zeros_like(z)
    by_u = torch.stack([K[0, 0] / z, zero, -K[0, 0] * x / z.square()], 1)
    by_v = torch.stack([zero, K[1, 1] / z, -K[1, 1] * y / z.square()], 1)
    J = (torch.stack([by_u, by_v], 1) @ moves).flatten(0, 1) * sizes  # [2 n, 6]
    return J.T @ J / len(points)
