"""SplaTAM's variant of depth: (color, radii, median depth [1, H, W]).

The median is the camera's z of the splat at which T falls to 0.5, 15 where it never does; it has no
gradient.
"""

from __future__ import annotations

import torch

from .. import stages
from ._view import GaussianRasterizationSettings, Rasterizer, look

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]

EMPTY = 15.0


class GaussianRasterizer(Rasterizer):
    def results(self, given):
        view = look(given, self.raster_settings)
        color, _ = view.blend()
        with torch.no_grad():
            return color, view.radii, stages.median_depth(view.projected, view.tiles, EMPTY)
