"""Mip-Splatting's filter: (color, radii), and with `return_accumulation` alpha [1, H, W] as the third.

The setting `kernel_size`, in square pixels, takes the place of the original's 0.3 by which splats are
widened, and they are dimmed by the rule "mip" of stages.project. `subpixel_offset` [H, W, 2] moves the
point that a pixel looks at. `return_accumulation` may be a setting or a keyword of forward.
"""

from __future__ import annotations

import math

from ..compatibility import _camera, _fit, _number
from ._view import Rasterizer, look, settings_with

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]

GaussianRasterizationSettings = settings_with(
    "kernel_size", "subpixel_offset", after="tanfovy", return_accumulation=False
)


class GaussianRasterizer(Rasterizer):
    keywords = ("return_accumulation",)

    def results(self, given, return_accumulation=None):
        settings, means = self.raster_settings, given["means3D"]
        camera, offset = _camera(settings, means), settings.subpixel_offset
        if offset is not None:
            offset = _fit("subpixel_offset", offset, means, camera["height"], camera["width"], 2)
        view = look(
            given, settings, camera=camera, offset=offset, blur=_kernel_size(settings), compensation="mip"
        )
        color, alpha = view.blend()
        wanted = settings.return_accumulation if return_accumulation is None else return_accumulation
        return (color, view.radii, alpha) if wanted else (color, view.radii)


def _kernel_size(settings) -> float:
    size = _number("kernel_size", settings.kernel_size)
    if not 0 <= size < math.inf:
        raise ValueError(f"kernel_size must be a finite number, 0 or more, got {size:g}")
    return size
