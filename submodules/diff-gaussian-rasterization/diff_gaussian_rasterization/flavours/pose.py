"""Gradients for the camera, as SLAM needs them: (color, radii, depth, opacity, n_touched).

`theta` and `rho` [1, 3], keywords of forward, only carry gradients: those of exp([rho, theta]) W at 0, W
being world to camera. Their values are not read. Depth is the sum of z alpha T; opacity is alpha [1, H, W],
without gradient; n_touched [N] int32 is the number of pixels to which a Gaussian contributes while more
than half of the light reaches it. The setting `projmatrix_raw` is not read, since projmatrix contains it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compatibility import _camera, _fit
from ._view import Rasterizer, look, settings_with

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]

GaussianRasterizationSettings = settings_with("projmatrix_raw", after="projmatrix")


class GaussianRasterizer(Rasterizer):
    keywords = ("theta", "rho")

    def results(self, given, theta=None, rho=None):
        means = given["means3D"]
        camera = _camera(self.raster_settings, means)
        if theta is not None or rho is not None:
            motion = (_motion("theta", theta, means), _motion("rho", rho, means))
            camera |= {"world_to_camera": _moved(camera["world_to_camera"], *motion), "camera_center": None}
        view = look(given, self.raster_settings, camera=camera)
        color, depth, alpha = view.blend(view.depths)
        return color, view.radii, depth, alpha.detach(), view.scores().bright


def _motion(name: str, value: Tensor | None, like: Tensor) -> Tensor:
    """0 in value: [3]"""
    if value is None:
        return like.new_zeros(3)
    value = _fit(name, value, like, 3)
    return value - value.detach()


def _moved(world_to_camera: Tensor, theta: Tensor, rho: Tensor) -> Tensor:
    """exp([rho, theta]) world_to_camera, to first order."""
    top = world_to_camera[:3]
    turned = torch.linalg.cross(theta[:, None].expand(3, 4), top, dim=0)
    return torch.cat([top + turned + F.pad(rho[:, None], (3, 0)), world_to_camera[3:]])
