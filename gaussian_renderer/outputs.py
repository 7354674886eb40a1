"""What a view can be written as: colors, depth, normals, alpha."""

from collections.abc import Iterable

import numpy as np
import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from gaussian_renderer import looks
from scene.cameras import Camera

SEEN = 0.5  # alpha from which on a pixel has a depth
LEVELS = 65535  # of a depth in 16 bits; 0: nothing is there
Range = tuple[float, float]  # of inverse depths: the far end of the scale, and the near one


def depth(rendered: Rendered) -> Tensor:
    """Distance along the axis of view [H, W], in the scene's units; 0 where nothing is. It is the harmonic
    mean of what a pixel shows."""
    alpha, inverse = rendered.alpha[0], rendered.inv_depth[0]
    return torch.where((alpha > SEEN) & (inverse > 0), alpha / inverse.clamp_min(1e-12), 0)


def depth_range(views: Iterable[Rendered]) -> Range:
    """Of inverse depths in these views, without two percent at each end."""
    near = [1 / d[d > 0] for d in map(depth, views)]
    near = torch.cat(near) if near else torch.empty(0)
    if not len(near):
        return 0.0, 1.0
    low, high = (near.kthvalue(1 + round(share * (len(near) - 1))).values for share in (0.02, 0.98))
    return float(low) / 1.02, float(high) * 1.02


def picture(
    rendered: Rendered, camera: Camera, kind: str, background: Tensor, near: Range = (0.0, 1.0)
) -> Tensor:
    """A kind of output in colors [3, H, W]. In depths, red is near."""
    if kind == "rgb":
        return rendered.image
    if kind != "depth":
        return looks.look(rendered, camera, kind, background)
    low, high = near
    at = rendered.inv_depth[0] / rendered.alpha[0].clamp_min(1e-6)
    colors, alpha = looks.scale_colors((at - low) / (high - low)), rendered.alpha
    return alpha * colors + (1 - alpha) * background[:, None, None]


def depth_levels(rendered: Rendered) -> tuple[np.ndarray, float]:
    """Depths as uint16 [H, W], and the distance that a level stands for."""
    values = depth(rendered).double().cpu().numpy()
    level = float(values.max()) / LEVELS or 1.0
    return np.round(values / level).astype(np.uint16), level
