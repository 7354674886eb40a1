"""How much each Gaussian matters in pictures: sums over the pixels that it is seen in.

They are made by the native stages, so an edit of render() does not change them.
"""

from collections.abc import Callable, Iterator

import torch
from diff_gaussian_rasterization import photometric_loss, stages
from torch import Tensor

from arguments import PipelineParams
from gaussian_renderer import Splats, render
from gaussian_renderer.sharded import ShardedSplats
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from utils.geometry import camera_center
from utils.image import to_float

GRAY = (0.299, 0.587, 0.114)


@torch.no_grad()
def scores(gaussians: GaussianModel, camera: Camera, pipe: PipelineParams, **pictures) -> stages.Scores:
    """What they do to the picture of one view; `pictures` as stages.scores takes them."""
    scales, opacities = gaussians.shown()
    projected = stages.project(
        gaussians.means,
        gaussians.quats,
        scales,
        opacities,
        world_to_camera=camera.world_to_camera,
        K=camera.K,
        width=camera.width,
        height=camera.height,
        compensation="antialiasing" if pipe.antialiasing else "none",
    )
    return stages.scores(projected, stages.lists(projected), **pictures)


def shares(gaussians: GaussianModel, camera: Camera, pipe: PipelineParams, weights: Tensor) -> Tensor:
    """[N]: sum over pixels of weights [H, W] times the part that a Gaussian has in them."""
    return scores(gaussians, camera, pipe, weights=weights.to(gaussians.means.dtype)).weight_sum


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
            yield shares(gaussians, camera, splats.pipe, weights(camera))


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


def disagreement(
    gaussians: GaussianModel,
    cameras: list[Camera],
    pipe: PipelineParams,
    background: Tensor,
    lambda_dssim: float,
) -> Tensor:
    """[N]: how unlike the pulls of its pixels on a Gaussian's opacity are (after LiteGS, Liao et al. 2025).

    It is their variance times their number, times the opacity squared. What is pulled up here and down there
    is too coarse.
    """
    background = background.to(gaussians.device)
    views = [_pulls(gaussians, camera, pipe, background, lambda_dssim) for camera in cameras]
    count, pull, square = (torch.stack(values).sum(0) for values in zip(*views))
    return (square - pull**2 / count.clamp_min(1)).clamp_min(0) * gaussians.opacities[:, 0] ** 2


@torch.no_grad()
def _pulls(
    gaussians: GaussianModel, camera: Camera, pipe: PipelineParams, background: Tensor, lambda_dssim: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Their number, sum and sum of squares [N]."""
    all_rows, (gaussians, _) = gaussians, gaussians.seen_by(camera)
    picture = render(camera, gaussians, pipe, background).image.requires_grad_()
    with torch.enable_grad():
        loss = photometric_loss(picture, camera.image(), lambda_dssim, camera.mask())[0]
    (gradient,) = torch.autograd.grad(loss, picture)
    colors = stages.sh_colors(
        gaussians.means,
        gaussians.sh_dc,
        gaussians.sh_rest,
        camera_center(camera.world_to_camera),
        gaussians.active_sh_degree,
    )
    found = scores(gaussians, camera, pipe, colors=colors, background=background, gradient=gradient)
    assert found.opacity_grad is not None and found.opacity_moment is not None
    sums = found.pixels, found.opacity_grad, found.opacity_moment
    number, pull, square = (all_rows.spread(gaussians, value) for value in sums)
    return number, pull, square
