"""Depth beside the color: (color, radii, depth [1, H, W]).

Depth is the sum of z alpha T, z being the camera's; it is not divided by alpha. Gradients flow through it.
"""

from __future__ import annotations

from ._view import GaussianRasterizationSettings, Rasterizer, look

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]


class GaussianRasterizer(Rasterizer):
    def results(self, given):
        view = look(given, self.raster_settings)
        color, depth, _ = view.blend(view.depths)
        return color, view.radii, depth
