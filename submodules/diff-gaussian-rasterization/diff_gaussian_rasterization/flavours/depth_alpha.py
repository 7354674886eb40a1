"""Depth and alpha beside the color: (color, radii, depth [1, H, W], alpha [1, H, W]).

Depth is the sum of z alpha T, z being the camera's; it is not divided by alpha. Gradients flow through
both. The setting `confidence` [N, 1] multiplies the Gaussians' gradients.
"""

from __future__ import annotations

from ..compatibility import _fit
from ._view import Rasterizer, look, settings_with

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]

GaussianRasterizationSettings = settings_with(confidence=None)


class GaussianRasterizer(Rasterizer):
    def results(self, given):
        view = look(given, self.raster_settings)
        if (confidence := self.raster_settings.confidence) is not None:
            means = given["means3D"]
            view = view.with_gradients_times(_fit("confidence", confidence, means, len(means), 1).detach())
        color, depth, alpha = view.blend(view.depths)
        return color, view.radii, depth, alpha
