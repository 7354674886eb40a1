"""The original's call, (color, radii), whose means2D may have four columns: [N, 4].

Its gradient is then (sum of gx, sum of gy, sum of |gx|, sum of |gy|) over pixels, in NDC units: pulls in
opposite directions cancel in the first two and add up in the last two.
"""

from __future__ import annotations

from typing import Any

from ._view import GaussianRasterizationSettings, Rasterizer, look

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]


class GaussianRasterizer(Rasterizer):
    def results(self, given):
        view = look(given, self.raster_settings, columns=columns_of(given["means2D"]))
        return view.blend()[0], view.radii


def columns_of(means2d: Any) -> int:
    return 4 if getattr(means2d, "shape", ())[-1:] == (4,) else 3
