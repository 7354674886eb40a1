"""Pictures of Gaussians that are not their colors: depth, alpha, normals, centers, ellipsoids, and errors.

The page draws the same in the browser (viewer/splats.js), for those who have no rasterizer at hand.
"""

import copy
import math

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import PipelineParams
from gaussian_renderer import render
from scene.gaussian_model import GaussianModel

MODES = ("color", "depth", "alpha", "normals", "centers", "ellipsoids")
OF_RAYS = ("depth", "alpha", "normals")  # those that any scene has, whatever it is made of
DOT = 1e-4  # of the scene's size: the filter of half a pixel makes a dot of it
FAINT = -math.log(254)  # the logit of 1/255
PLATEAU = 100.0  # an opacity beyond 1 makes a splat solid up to three standard deviations,
SOLID = 1 / 3  # which is one, then
SEEN = 0.5  # alpha from which a pixel's depth counts for the range of colors
ERROR_GAIN = 4.0  # a quarter of full brightness has the last color of the scale


def picture(
    camera,
    gaussians: GaussianModel,
    pipe: PipelineParams,
    background: Tensor,
    mode: str = "color",
    scale: float = 1.0,
    degree: int = 3,
) -> Tensor:
    """[3, H, W], before the clamp to [0, 1]. scale: of all splats; degree: the highest of SH to show."""
    gaussians = copy.copy(gaussians)
    gaussians.active_sh_degree = min(degree, gaussians.active_sh_degree)
    if mode in ("centers", "ellipsoids"):
        return render(
            camera, _solid(gaussians.seen_by(camera)[0], mode), PipelineParams(), background, scale
        ).image
    rendered = render(camera, gaussians, pipe, background, scale)
    return rendered.image if mode == "color" else look(rendered, camera, mode, background)


def look(rendered: Rendered, camera, mode: str, background: Tensor) -> Tensor:
    """Depth, alpha or normals of a view, in colors."""
    alpha = rendered.alpha
    if mode == "alpha":
        return alpha.expand(3, -1, -1)
    colors = (
        inverse_depth_colors(rendered) if mode == "depth" else 0.5 + 0.5 * _facing(normals(rendered, camera))
    )
    return alpha * colors + (1 - alpha) * background[:, None, None]


def inverse_depth_colors(rendered: Rendered) -> Tensor:
    """Red is near. The range leaves out two percent at each end."""
    near = rendered.inv_depth[0] / rendered.alpha[0].clamp_min(1e-6)
    seen = near[rendered.alpha[0] > SEEN]
    if not len(seen):
        return scale_colors(near)
    low, high = (seen.kthvalue(1 + round(share * (len(seen) - 1))).values for share in (0.02, 0.98))
    return scale_colors((near - low / 1.02) / (high * 1.02 - low / 1.02))


def normals(rendered: Rendered, camera) -> Tensor:
    """[3, H, W] in camera space, of length 1, towards the camera: from the neighbors' depths."""
    depth = rendered.alpha[0] / rendered.inv_depth[0].clamp_min(1e-9)
    height, width = depth.shape
    K, kind = camera.K.to(depth), {"dtype": depth.dtype, "device": depth.device}
    x = (torch.arange(width, **kind) + 0.5 - K[0, 2]) / K[0, 0]
    y = (torch.arange(height, **kind) + 0.5 - K[1, 2]) / K[1, 1]
    points = torch.stack([x.expand(height, width) * depth, y[:, None].expand(height, width) * depth, depth])
    padded = torch.nn.functional.pad(points[None], (1, 1, 1, 1), mode="replicate")[0]
    across, down = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(down, across, dim=0), dim=0)


def error(image: Tensor, truth: Tensor) -> Tensor:
    """Mean difference of the channels, in colors."""
    return scale_colors(ERROR_GAIN * (image - truth).abs().mean(0))


def scale_colors(values: Tensor) -> Tensor:
    """[H, W] -> [3, H, W]: blue for 0, green, red for 1."""
    tops = torch.tensor([3.0, 2.0, 1.0], device=values.device)[:, None, None]
    return (1.5 - (4 * values.clamp(0, 1) - tops).abs()).clamp(0, 1)


def _facing(normal: Tensor) -> Tensor:
    """To the right is red, up is green, towards the camera is blue."""
    return normal * torch.tensor([1.0, -1.0, -1.0], device=normal.device)[:, None, None]


def _solid(gaussians: GaussianModel, mode: str) -> GaussianModel:
    """A model whose splats hide what is behind them."""
    p = {name: value.detach() for name, value in gaussians.params.items()}
    scales = gaussians.scales.detach() * SOLID
    if mode == "centers":
        scales = torch.full_like(scales, DOT * float(gaussians.scales.detach().mean()))
    model = _Solid(p, gaussians.sh_degree, gaussians.active_sh_degree)
    model.shown_scales = scales
    return model


class _Solid(GaussianModel):
    """Opacities and scales as they are given, not as the parameters mean them."""

    @property
    def scales(self) -> Tensor:
        return self.shown_scales

    @property
    def opacities(self) -> Tensor:
        return PLATEAU * (self.opacity_logits > FAINT).to(self.opacity_logits)
