"""How much each Gaussian matters in pictures: its part in pixels, summed up with weights of the pixels.

A pixel's color is the sum of colors times alpha T. So the gradient of sum(weights * picture) by the color of
a Gaussian is sum(weights * alpha T), and any backend that can train can score, too.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from arguments import PipelineParams
from gaussian_renderer import Splats, render
from gaussian_renderer.sharded import ShardedSplats
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from utils.image import to_float

GRAY = (0.299, 0.587, 0.114)


@torch.enable_grad()
def shares(gaussians: GaussianModel, camera: Camera, pipe: PipelineParams, weights: Tensor) -> Tensor:
    """[N, C], C up to 3: sum over pixels of weights [C, H, W] times the part that a Gaussian has in them."""
    colors = torch.zeros_like(gaussians.means).requires_grad_()
    image = render(camera, gaussians, pipe, colors.new_zeros(3), override_color=colors).image
    (parts,) = torch.autograd.grad((image[: len(weights)] * weights).sum(), colors)
    return parts[:, : len(weights)]


@torch.no_grad()
def edges(camera: Camera) -> Tensor:
    """[H, W] in [0, 1]: how much brighter a pixel of the photo is than those around it. 0 at the border, and
    where the photo does not count."""
    red, green, blue = to_float(camera.image())
    gray = GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue
    around = torch.nn.functional.avg_pool2d(gray[None, None], 3, stride=1)[0, 0]
    inner = (9 * (gray[1:-1, 1:-1] - around)).clamp(0, 1)  # 8 in the middle, -1 around
    found = torch.nn.functional.pad(inner, (1, 1, 1, 1))
    mask = camera.mask()
    found = found if mask is None else found * mask
    return found / found.max().clamp_min(1e-12)


@torch.no_grad()
def errors(camera: Camera, splats: Splats) -> Tensor:
    """[H, W]: how far the picture is from the photo, where that counts; the mean over channels."""
    found = (splats.picture(camera).image.clamp(0, 1) - to_float(camera.image())).abs().mean(0)
    mask = camera.mask()
    return found if mask is None else found * mask


def relative_shares(splats: Splats, cameras: list[Camera], weights: Callable[[Camera], Tensor]) -> Tensor:
    """[N]: shares in the weighted pixels, in each view relative to the mean of those that have any. Of all
    processes' Gaussians."""
    gaussians = splats.gaussians
    total = torch.zeros(gaussians.total, device=gaussians.device)
    for part in each_share(splats, cameras, weights):
        total += part / (part.sum() / (part > 0).sum().clamp_min(1)).clamp_min(1e-12)
    return total / max(len(cameras), 1)


def each_share(
    splats: Splats, cameras: list[Camera], weights: Callable[[Camera], Tensor]
) -> Iterator[Tensor]:
    """Of each view, shares() [N] in its weighted pixels. Several processes take a view each at a time."""
    gaussians, ranks = splats.gaussians, splats.gaussians.ranks
    for first in range(0, len(cameras), ranks.count):
        some = cameras[first : first + ranks.count]
        camera = some[min(ranks.rank, len(some) - 1)]  # if there are too few, it is shown twice
        if isinstance(splats, ShardedSplats):
            parts = splats.shares(camera, weights(camera))[: len(some)]
            yield from gaussians.from_all(parts.T.contiguous()).unbind(1)
        else:
            yield shares(gaussians, camera, splats.pipe, weights(camera)[None])[:, 0]


def visibility(splats: Splats, cameras: list[Camera]) -> Tensor:
    """[N]: sum over views and pixels, where photos count, of the part that a Gaussian has in them. Of all
    processes' Gaussians."""
    total = torch.zeros(splats.gaussians.total, device=splats.gaussians.device)
    for part in each_share(splats, cameras, counted):
        total += part
    return total


def counted(camera: Camera) -> Tensor:
    """[H, W]: 1 where the photo counts."""
    mask = camera.mask()
    return torch.ones(camera.height, camera.width, device=camera.device) if mask is None else mask
