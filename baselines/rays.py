"""What NeRF and voxel grids share: rays of the photos, where a scene lies, and compositing along a ray.

A ray is origin + t * direction. Directions have length 1 along the camera's axis, so t is the depth.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import ConfigError, FieldParams, Options
from scene import Camera, Scene
from scene.torch_file import read_torch_file
from training.checkpoint import moved
from utils.files import DataError, atomic_write

BLENDER = 2.0, 6.0  # nearest and farthest, by the convention of these data sets
MIDDLE = 0.05, 0.95  # the share of the points that an unbounded scene's box has, per axis


class Rays(NamedTuple):
    origins: Tensor  # [N, 3]
    directions: Tensor  # [N, 3]

    @property
    def lengths(self) -> Tensor:
        """World units that t = 1 is, [N, 1]."""
        return self.directions.norm(dim=-1, keepdim=True)

    @property
    def views(self) -> Tensor:
        """The directions with length 1."""
        return self.directions / self.lengths


class Seen(NamedTuple):
    """What rays see."""

    color: Tensor  # [N, 3] with the background
    left: Tensor  # [N] how much of the background shows
    inv_depth: Tensor  # [N] sum of 1/t, weighted like colors


def rays_through(x: Tensor, y: Tensor, K: Tensor, world_to_camera: Tensor) -> Rays:
    """Through the points (x, y) in pixels, [N] each; K [N, 3, 3] and world_to_camera [N, 4, 4], or one."""
    local = torch.stack(
        [
            (x - K[..., 0, 2]) / K[..., 0, 0],
            (y - K[..., 1, 2]) / K[..., 1, 1],
            torch.ones_like(x),
        ],
        dim=-1,
    )
    rotation, shift = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]  # world to camera
    origins = -(rotation * shift[..., :, None]).sum(-2)
    directions = (rotation * local[..., :, None]).sum(-2)
    return Rays(origins.expand_as(directions), directions)


def rays_of(camera: Camera) -> Rays:
    """Through the middles of all pixels, row by row."""
    rows, columns = torch.meshgrid(
        torch.arange(camera.height, device=camera.device),
        torch.arange(camera.width, device=camera.device),
        indexing="ij",
    )
    return rays_through(columns.flatten() + 0.5, rows.flatten() + 0.5, camera.K, camera.world_to_camera)


class Photos:
    """Every pixel of the train photos, with its ray made when it is asked for."""

    def __init__(self, cameras: list[Camera]):
        self.cameras = cameras
        device = cameras[0].device
        self.pixels = torch.cat([camera.image().flatten(1).T for camera in cameras])  # [P, 3] uint8
        counts = [camera.counts() for camera in cameras]
        self._counts: Tensor | None = None  # [P] uint8
        if any(count is not None for count in counts):
            whole = [
                torch.ones(c.height, c.width, device=device) if n is None else n
                for c, n in zip(cameras, counts)
            ]
            self._counts = torch.cat([one.flatten() for one in whole]).to(torch.uint8)
        sizes = torch.tensor([[camera.height, camera.width] for camera in cameras])
        self._sizes = sizes.to(device)
        ends = sizes.prod(1).cumsum(0)
        self._starts = (ends - sizes.prod(1)).to(device)
        self._ends = ends.to(device)
        self._K = torch.stack([camera.K for camera in cameras])
        self._poses = torch.stack([camera.world_to_camera for camera in cameras])

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, count: int, middle: float = 1.0) -> Tensor:
        """Numbers of random pixels; `middle`: of the middle fraction of height and width only."""
        device = self.pixels.device
        view = torch.randint(len(self.cameras), (count,), device=device)
        size = self._sizes[view]
        place = 0.5 + middle * (torch.rand(count, 2, device=device) - 0.5)
        row, column = torch.minimum((place * size).long(), size - 1).unbind(1)
        return self._starts[view] + row * size[:, 1] + column

    def at(self, pixel: Tensor) -> tuple[Rays, Tensor, Tensor]:
        """Rays, colors [N, 3] and whether they count [N, 1], of the pixels with these numbers."""
        view = torch.searchsorted(self._ends, pixel, right=True)
        inner, width = pixel - self._starts[view], self._sizes[view, 1]
        row, column = torch.div(inner, width, rounding_mode="floor"), inner % width
        rays = rays_through(column + 0.5, row + 0.5, self._K[view], self._poses[view])
        colors = self.pixels[pixel] / 255
        count = torch.ones_like(colors[:, :1]) if self._counts is None else self._counts[pixel, None].float()
        return rays, colors, count


@dataclass
class Space:
    """Where a scene lies. Of an unbounded one, `low` to `high` is the box that holds most of it; this box
    becomes -1 to 1, and all that is outside is drawn in to -2 to 2: y * (2 - 1/n) / n with n = max |y|."""

    near: float  # depth
    far: float
    low: Tensor  # [3]
    high: Tensor  # [3]
    unbounded: bool

    def inside(self, points: Tensor) -> Tensor:
        """Where points [..., 3] of the world lie in the space that is modeled."""
        if not self.unbounded:
            return points
        y = (points - (self.low + self.high) / 2) * (2 / (self.high - self.low))
        n = y.abs().amax(-1, keepdim=True).clamp_min(1.0)
        return y * (2 - 1 / n) / n

    def depths(self, count: int, device: torch.device) -> Tensor:
        """From the nearest to the farthest: evenly spaced, in 1/depth if unbounded."""
        s = torch.linspace(0, 1, count, device=device)
        if self.unbounded:
            return 1 / ((1 - s) / self.near + s / self.far)
        return self.near * (1 - s) + self.far * s

    def state(self) -> dict:
        return asdict(self)


def space_of(scene: Scene, params: FieldParams) -> Space:
    """Blender scenes: what lies between their nearest and farthest depth. Others: by the points."""
    cameras = [camera for camera in scene.train_cameras if not camera.is_test]
    if scene.cube is not None:
        near, far = params.near or BLENDER[0], params.far or BLENDER[1]
        low, high = bounds(cameras, near, far)
        return Space(near, far, low, high, unbounded=False)
    points = torch.as_tensor(scene.points.xyz, dtype=torch.float32, device=cameras[0].device)
    if len(points) < 2:
        raise DataError(f"NeRF and voxel grids need points that tell where the scene is, got {len(points)}")
    low, high = (torch.quantile(points[:100_000], share, dim=0) for share in MIDDLE)
    margin = 0.1 * (high - low).amax()
    depths = torch.cat([_depths(camera, points[:100_000]) for camera in cameras]).sort().values
    if not len(depths):
        raise DataError("no point of the data set is in front of a train camera")
    near = params.near or 0.5 * float(depths[len(depths) // 100])
    far = params.far or 10 * float(depths[-1 - len(depths) // 100])
    return Space(near, far, low - margin, high + margin, unbounded=True)


def _depths(camera: Camera, points: Tensor) -> Tensor:
    """Of up to 1,000 of the points that are in this view."""
    local = points @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    local = local[local[:, 2] > 1e-6]
    x, y, _ = (local @ camera.K.T / local[:, 2:]).unbind(1)
    seen = local[(x > 0) & (x < camera.width) & (y > 0) & (y < camera.height), 2]
    return seen[:: len(seen) // 1000 + 1]


def bounds(cameras: list[Camera], near: float, far: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of what the cameras see between two depths."""
    ends = []
    for camera in cameras:
        w, h = camera.width, camera.height
        x, y = torch.tensor([[0.0, w, 0, w], [0, 0, h, h]], device=camera.device)  # the corners go farthest
        o, d = rays_through(x, y, camera.K, camera.world_to_camera)
        ends += [o + near * d, o + far * d]
    every = torch.cat(ends)
    return every.amin(0), every.amax(0)


def composite(tau: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, S] of the samples of each ray, and what is left for the background [N].

    tau [N, S] is density times length: a sample hides 1 - exp(-tau) of what is behind. They sum to 1.
    """
    through = torch.exp(-torch.cumsum(tau, dim=-1))  # behind each sample
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    return before * -torch.expm1(-tau), through[:, -1]


def encode(x: Tensor, octaves: int) -> Tensor:
    """x itself, and sine and cosine of x * 1, 2, 4, ...: [N, 3] -> [N, 3 + 6 * octaves]."""
    if octaves < 1:
        return x
    angles = x[..., None, :] * torch.exp2(torch.arange(octaves, dtype=x.dtype, device=x.device))[:, None]
    return torch.cat([x, torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)], dim=-1)


@torch.no_grad()
def picture(camera: Camera, see: Callable[[Rays], Seen], chunk: int) -> Rendered:
    """A whole view, `chunk` rays at a time."""
    rays = rays_of(camera)
    parts = [see(Rays(o, d)) for o, d in zip(rays.origins.split(chunk), rays.directions.split(chunk))]
    color, left, inv_depth = (torch.cat(part) for part in zip(*parts))
    shape = 1, camera.height, camera.width
    nothing = torch.zeros(0, dtype=torch.int32, device=camera.device)
    return Rendered(color.T.view(3, *shape[1:]), 1 - left.view(shape), inv_depth.view(shape), nothing)


def adam(groups: list[dict]) -> torch.optim.Optimizer:
    """Fused where PyTorch has it: the rate is a number on the host, nothing waits for it."""
    return torch.optim.Adam(groups, eps=1e-8, fused=True)


def refuse(options: Options) -> None:
    """Flags that only Gaussians know."""
    wanted = {
        "train_test_exp": options.model.train_test_exp,
        "depths": options.model.depths,
        "poses": options.views.poses,
        "blur": options.views.blur != "none",
        "appearance": options.views.appearance != "none",
    }
    for name, is_on in wanted.items():
        if is_on:
            raise ConfigError(f"{name} is for --method gaussians, got --method {options.model.method}")


# A saved model: its options and tensors, in a file that loads safely.


def write(path: Path, state: dict) -> Path:
    with atomic_write(path) as file:
        torch.save(state, file)
    return path


def read(path: Path, method: str, device: torch.device) -> dict:
    try:
        state = moved(read_torch_file(path), device)
        if state["method"] != method:
            raise ValueError(f"it is of method {state['method']}")
        return state
    except Exception as error:  # torn files raise a dozen kinds
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{path}: must be a model that --method {method} saved ({reason})") from None
