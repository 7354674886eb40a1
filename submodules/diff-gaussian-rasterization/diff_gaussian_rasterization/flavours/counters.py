"""How much each Gaussian does to the picture.

    Mini-Splatting  (color, radii, weight_sum [N], count [N], max_count [N])
    AbsGS           (color, radii, weight_sum [N]), with means2D [N, 4]

weight_sum is the sum of alpha T over pixels, count the number of pixels, max_count the number of those to
which no other contributes more. None of them has a gradient. See abs_grad.py for AbsGS's means2D.
"""

from __future__ import annotations

from ._view import GaussianRasterizationSettings, Rasterizer, look
from .abs_grad import columns_of

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]


class GaussianRasterizer(Rasterizer):
    def results(self, given):
        columns = columns_of(given["means2D"])
        view = look(given, self.raster_settings, columns=columns)
        color, _ = view.blend()
        scores = view.scores()
        if columns == 4:
            return color, view.radii, scores.weight_sum
        return color, view.radii, scores.weight_sum, scores.pixels, scores.largest
