"""How much each Gaussian matters in pictures: its part in pixels, summed up with weights of the pixels.

A pixel's color is the sum of colors times alpha T. So the gradient of sum(weights * picture) by the color of
a Gaussian is sum(weights * alpha T), and any backend that can train can score, too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arguments import PipelineParams
from gaussian_renderer import render
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from utils.image import to_float

GRAY = (0.299, 0.587, 0.114)


@torch.enable_grad()
def shares(gaussians: GaussianModel, camera: Camera, pipe: PipelineParams, weights: Tensor) -> Tensor:
    """[N, C], C up to 3: sum over pixels of weights [C, H, W] times the part that a Gaussian has in them."""
    colors = torch.zeros(len(gaussians), 3, device=gaussians.device, requires_grad=True)
    image = render(camera, gaussians, pipe, torch.zeros(3, device=colors.device), override_color=colors).image
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
def errors(camera: Camera, gaussians: GaussianModel, pipe: PipelineParams, background: Tensor) -> Tensor:
    """[H, W]: how far the picture is from the photo, where that counts; the mean over channels."""
    picture = render(camera, gaussians, pipe, background.to(gaussians.device)).image.clamp(0, 1)
    found = (picture - to_float(camera.image())).abs().mean(0)
    mask = camera.mask()
    return found if mask is None else found * mask


def relative_shares(
    gaussians: GaussianModel,
    cameras: list[Camera],
    pipe: PipelineParams,
    weights: Callable[[Camera], Tensor],
) -> Tensor:
    """[N]: shares in the weighted pixels, in each view relative to the mean of those that have any."""
    total = torch.zeros(len(gaussians), device=gaussians.device)
    for camera in cameras:
        part = shares(gaussians, camera, pipe, weights(camera)[None])[:, 0]
        total += part / (part.sum() / (part > 0).sum().clamp_min(1)).clamp_min(1e-12)
    return total / max(len(cameras), 1)


def visibility(gaussians: GaussianModel, cameras: list[Camera], pipe: PipelineParams) -> Tensor:
    """[N]: sum over views and pixels, where photos count, of the part that a Gaussian has in them."""
    total = torch.zeros(len(gaussians), device=gaussians.device)
    for camera in cameras:
        mask = camera.mask()
        weights = torch.ones(camera.height, camera.width, device=total.device) if mask is None else mask
        total += shares(gaussians, camera, pipe, weights[None])[:, 0]
    return total
