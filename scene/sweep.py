"""Points from photos whose cameras are known, for data sets without points: a plane sweep (Collins 1996).

Every photo, scaled down, gets a depth map. For each of many depths its neighbors are warped as if all they
show were there, and the depth at which patches look most alike wins. Points are the pixels for which the
depth maps of two photos agree.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from scene.cameras import Camera
from scene.points import PointCloud, nearest_to_axes

Result = TypeVar("Result")
PIXELS = 25_000  # of a photo when it is compared
VIEWS = 128  # at most, evenly chosen
NEIGHBORS = 4  # with which a view is compared; the two that fit best count, as the view of others is blocked
BASELINE = 0.15  # of neighbors, wanted, as a fraction of the distance to what the cameras look at;
MIN_BASELINE = 0.02  # and the least
MAX_TURN = 60.0  # degrees between the axes of neighbors
DEPTHS = 96  # steps of inverse depth
AT_ONCE = 8  # of them, so that what is computed stays in a CPU's cache
REACH = 0.7  # the nearest depth shifts the picture of a neighbor by its longer side times this
PATCH = 5  # pixels
ALIKE = 0.7  # least normalized cross-correlation of patches that show the same
CONTRAST = 1.5 / 255  # patches with a smaller standard deviation show nothing
AGREE = 0.5  # steps between inverse depths that are the same


@dataclass
class Small:
    """A view, scaled down."""

    rgb: Tensor  # [3, h, w] in 0..1
    gray: Tensor  # [h, w]
    counts: Tensor  # [h, w] bool
    K: Tensor  # [3, 3]
    rotation: Tensor  # [3, 3] world to camera
    shift: Tensor  # [3]
    rays: Tensor  # [3, h * w] of the pixels' centers, in the camera's axes, z = 1

    @classmethod
    def of(cls, camera: Camera) -> "Small":
        image, mask = camera.image()[None].float() / 255, camera.mask()
        scale = min(1, math.sqrt(PIXELS / (camera.width * camera.height)))
        w, h = (max(round(scale * side), 1) for side in (camera.width, camera.height))
        rgb = interpolate(image, (h, w), mode="bilinear", antialias=True)[0]
        if mask is None:
            counts = torch.ones_like(rgb[0], dtype=torch.bool)
        else:
            counts = interpolate(mask[None, None], (h, w), mode="area")[0, 0] > 0.99
        K = rgb.new_tensor([w / camera.width, h / camera.height, 1]).diag() @ camera.K
        y, x = ((torch.arange(n, device=rgb.device) + 0.5 - K[i, 2]) / K[i, i] for i, n in ((1, h), (0, w)))
        rays = torch.stack([x.repeat(h), y.repeat_interleave(w), torch.ones(h * w, device=rgb.device)])
        rotation, shift = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
        return cls(rgb, rgb.mean(dim=0), counts, K, rotation, shift, rays)

    @property
    def center(self) -> Tensor:
        return -self.rotation.T @ self.shift

    def lift(self, inverse_depth: Tensor) -> Tensor:
        """World points [h * w, 3] of all pixels."""
        return (self.rays / inverse_depth.flatten() - self.shift[:, None]).T @ self.rotation


@dataclass
class Swept:
    inverse_depth: Tensor  # [h, w]
    alike: Tensor  # [h, w] -1..1
    step: Tensor  # of inverse depth


@torch.no_grad()
def points_from_photos(cameras: list[Camera], count: int, seed: int) -> PointCloud:
    """At most `count` points on the surfaces that the cameras show."""
    cameras = sorted(cameras, key=lambda camera: camera.uid)
    chosen = torch.linspace(0, len(cameras) - 1, min(len(cameras), VIEWS)).long()
    views = [Small.of(cameras[i]) for i in chosen]
    near = neighbors(views)
    swept = _side_by_side(lambda i: sweep(views[i], [views[j] for j in near[i]]), range(len(views)))
    xyz, rgb = [torch.empty(0, 3)], [torch.empty(0, 3)]
    sure = _side_by_side(
        lambda i: agreed(views[i], swept[i], [(views[j], swept[j]) for j in near[i]]), range(len(views))
    )
    for view, own, good in zip(views, swept, sure):
        xyz.append(view.lift(own.inverse_depth)[good].cpu())
        rgb.append(view.rgb.flatten(1).T[good].cpu())
    return PointCloud(torch.cat(xyz).numpy(), torch.cat(rgb).numpy()).at_most(count, seed)


def _side_by_side(work: Callable[[int], Result], numbers: Iterable[int]) -> list[Result]:
    """work(i) of each number. Each thread takes whole views and shares its operations with no other: those
    are so short that threads which work on one together mostly wait for each other, the more so when other
    programs are running, too."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.no_grad()(work), numbers))
    finally:
        torch.set_num_threads(threads)  # PyTorch gives this to threads that begin later


def neighbors(views: list[Small]) -> list[list[int]]:
    """Of each view, those from where the scene looks alike, but not the same."""
    centers = torch.stack([view.center for view in views]).cpu()
    axes = torch.stack([view.rotation[2] for view in views]).cpu()
    focus = torch.from_numpy(nearest_to_axes(centers.double().numpy(), axes.double().numpy())).float()
    found = []
    for center, axis in zip(centers, axes):
        baseline = (centers - center).norm(dim=1) / (focus - center).norm()
        fits = (baseline > MIN_BASELINE) & (axes @ axis > math.cos(math.radians(MAX_TURN)))
        order = (baseline / BASELINE).log().abs().where(fits, torch.inf).argsort()
        found.append(order[: min(NEIGHBORS, int(fits.sum()))].tolist())
    return found


def sweep(view: Small, others: list[Small]) -> Swept:
    """The depth map of a view. Without others, or where patches do not fit in, nothing looks alike."""
    h, w = view.gray.shape
    if not others or min(h, w) < PATCH:
        return Swept(torch.ones_like(view.gray), torch.full_like(view.gray, -1), view.gray.new_ones(()))
    baseline = torch.stack([other.center for other in others]).sub(view.center).norm(dim=1).mean()
    nearest = view.K[0, 0] * baseline / (REACH * max(h, w))
    steps = torch.linspace(0, 1, DEPTHS, device=view.K.device) / nearest  # of inverse depth
    patches = Patches(view.gray)
    parts = []
    for part in steps.split(AT_ONCE):
        parts.append(_best_two([patches.alike(_warped(other, view, part)) for other in others]))
    scores = pad(torch.cat(parts), [PATCH // 2] * 4, value=-1.0)
    alike, best = scores[1:-1].max(dim=0)
    before, here, after = (scores.gather(0, best[None] + k)[0] for k in range(3))
    # The top of the parabola through them, from where the best is
    top = 0.5 * (before - after) / (before - 2 * here + after).clamp_max(-1e-6)
    return Swept((best + 1 + top.clamp(-0.5, 0.5)) * steps[1], alike, steps[1])


def _best_two(scores: list[Tensor]) -> Tensor:
    """Their mean, element by element; of a single one, itself."""
    if len(scores) == 1:
        return scores[0]
    best, second = torch.maximum(*scores[:2]), torch.minimum(*scores[:2])
    for score in scores[2:]:
        second = torch.minimum(best, score).maximum(second)
        best = torch.maximum(best, score)
    return (best + second) / 2


def _warped(other: Small, view: Small, inverse_depths: Tensor) -> Tensor:
    """What another view shows at the pixels of this one, were they at these depths, [D, h, w]. Black where it
    shows nothing."""
    rotation = other.rotation @ view.rotation.T
    far = other.K @ rotation @ view.rays  # [3, h * w]
    move = other.K @ (other.shift - rotation @ view.shift)
    x, y, z = (a + inverse_depths[:, None] * b for a, b in zip(far, move))  # [D, h * w]
    (h, w), (height, width) = view.gray.shape, other.gray.shape
    z = z.clamp_min(1e-6)
    grid = torch.stack([2 / width * x / z - 1, 2 / height * y / z - 1], -1)
    shown = grid_sample(other.gray[None, None], grid.view(1, -1, w, 2), align_corners=False)
    return shown.view(-1, h, w)


class Patches:
    """The patches of a picture, to be compared with those of others."""

    def __init__(self, picture: Tensor):
        self.picture = picture
        self.mean = _box(picture)
        self.variance = (_box(picture**2) - self.mean**2).clamp_min(CONTRAST**2)

    def alike(self, other: Tensor) -> Tensor:
        """Normalized cross-correlation, -1..1 [D, h - PATCH + 1, w - PATCH + 1]."""
        mean = _box(other)
        variance = (_box(other**2) - mean**2).clamp_min(CONTRAST**2)
        return (_box(other * self.picture) - mean * self.mean) * (variance * self.variance).rsqrt()


def _box(x: Tensor) -> Tensor:
    """Means of all patches, [..., h - PATCH + 1, w - PATCH + 1]."""
    h, w = x.shape[-2] - PATCH + 1, x.shape[-1] - PATCH + 1
    rows: Any = sum(x[..., k : k + w] for k in range(PATCH))
    patches: Any = sum(rows[..., k : k + h, :] for k in range(PATCH))
    return patches / PATCH**2


def agreed(view: Small, own: Swept, others: list[tuple[Small, Swept]]) -> Tensor:
    """The pixels whose depth another view confirms, bool [h * w]."""
    world = view.lift(own.inverse_depth)
    confirmed = torch.zeros(len(world), dtype=torch.bool, device=world.device)
    for other, swept in others:
        h, w = other.gray.shape
        x, y, z = other.K @ (other.rotation @ world.T + other.shift[:, None])
        column, row = ((a / z).floor() for a in (x, y))
        inside = (z > 0) & (column >= 0) & (column < w) & (row >= 0) & (row < h)
        there = swept.inverse_depth.flatten()[(row * w + column).where(inside, 0).long()]
        confirmed |= inside & ((there - 1 / z).abs() < AGREE * swept.step)
    return confirmed & ((own.alike > ALIKE) & view.counts).flatten()
