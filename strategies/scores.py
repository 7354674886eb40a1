"""How much each Gaussian matters in pictures: sums over the pixels that it is seen in.

They are made by the native stages, so an edit of render() does not change them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from diff_gaussian_rasterization import photometric_loss, stages
from torch import Tensor

from arguments import PipelineParams
from gaussian_renderer import Splats
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
    """Of each view, [N]: sum over pixels of weights [H, W] times the part that a Gaussian has in them."""

    def pictures(camera: Camera) -> dict[str, Tensor]:
        return {"weights": weights(camera).to(splats.gaussians.means.dtype)}

    return (part[:, 0] for part in each_score(splats, cameras, pictures, ["weight_sum"]))


def each_score(
    splats: Splats, cameras: list[Camera], pictures: Callable[[Camera], dict], names: Sequence[str]
) -> Iterator[Tensor]:
    """Of each view, what stages.scores() makes of its pictures: [N, names], of all processes' Gaussians.
    Several processes take a view each at a time."""
    gaussians, ranks = splats.gaussians, splats.gaussians.ranks
    for first in range(0, len(cameras), ranks.count):
        some = cameras[first : first + ranks.count]
        camera = some[min(ranks.rank, len(some) - 1)]  # if there are too few, it is shown twice
        given = pictures(camera)
        if isinstance(splats, ShardedSplats):
            parts = splats.scores(camera, names, **given)[: len(some)]
            yield from gaussians.from_all(parts.transpose(0, 1).contiguous()).unbind(1)
        else:
            part = gaussians.seen_by(camera)[0] if "gradient" in given else gaussians
            colors = {"colors": _colors(part, camera)} if "gradient" in given else {}
            found = scores(part, camera, splats.pipe, **colors, **given)
            columns = [getattr(found, name).to(gaussians.means.dtype) for name in names]
            yield torch.stack([gaussians.spread(part, column) for column in columns], 1)


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


@torch.no_grad()
def disagreement(splats: Splats, cameras: list[Camera], lambda_dssim: float) -> Tensor:
    """[N]: how unlike the pulls of its pixels on a Gaussian's opacity are (after LiteGS, Liao et al. 2025).

    It is their variance times their number, times the opacity squared. What is pulled up here and down there
    is too coarse. Of all processes' Gaussians.
    """
    gaussians, pull = splats.gaussians, partial(_pull, splats, lambda_dssim)
    views = list(each_score(splats, cameras, pull, ["pixels", "opacity_grad", "opacity_moment"]))
    count, pull, square = torch.stack(views).sum(0).unbind(1)
    opacities = gaussians.from_all(gaussians.opacities[:, 0])
    return (square - pull**2 / count.clamp_min(1)).clamp_min(0) * opacities**2


@torch.no_grad()
def _pull(splats: Splats, lambda_dssim: float, camera: Camera) -> dict[str, Tensor]:
    """The background, and what the loss wants of each pixel."""
    picture = splats.picture(camera).image.requires_grad_()
    with torch.enable_grad():
        loss = photometric_loss(picture, camera.image(), lambda_dssim, camera.mask())[0]
    (gradient,) = torch.autograd.grad(loss, picture)
    return {"background": splats.background, "gradient": gradient}


def _colors(gaussians: GaussianModel, camera: Camera) -> Tensor:
    center, sh = camera_center(camera.world_to_camera), (gaussians.sh_dc, gaussians.sh_rest)
    return stages.sh_colors(gaussians.means, *sh, center, gaussians.active_sh_degree)
