"""The original's call, and two functions beside it.

Scaffold-GS and those after it ask `visible_filter` which Gaussians are in view, before they make them.
3DGS-MCMC asks `compute_relocation` for copies of a Gaussian that together look like it.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .. import compatibility, stages
from ..compatibility import GaussianRasterizationSettings, _camera, _fit, _shapes

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer", "compute_relocation"]


class GaussianRasterizer(compatibility.GaussianRasterizer):
    @torch.no_grad()
    def visible_filter(
        self,
        means3D: Tensor,
        scales: Tensor | None = None,
        rotations: Tensor | None = None,
        cov3D_precomp: Tensor | None = None,
    ) -> Tensor:
        """Radii in pixels, 0 where a Gaussian is not in view: int32 [N]."""
        given = {
            "means3D": means3D, "scales": scales, "rotations": rotations, "cov3D_precomp": cov3D_precomp,
            "opacities": means3D.new_ones(len(means3D), 1),
        }  # fmt: skip
        compatibility._expect_one_shape(given)
        shapes, camera = _shapes(given, self.raster_settings), _camera(self.raster_settings, means3D)
        names = ("world_to_camera", "K", "width", "height")
        return stages.project(**shapes, **{name: camera[name] for name in names}).radii


def compute_relocation(
    opacity: Tensor,  # [N]
    scale: Tensor,  # [N, 3]
    ratio: Tensor,  # [N]  whole numbers, 1 to n_max
    binoms: Tensor,  # not read: made here in float64, as C(50, 25) needs it
    n_max: int,
) -> tuple[Tensor, Tensor]:
    """Opacity [N] and scales [N, 3] of each of `ratio` Gaussians in the place of one.

    With o' = 1 - (1 - o)^(1/R) they are as opaque together, and with s' = s o / D the integral of alpha along
    a line through the center stays, where D = sum over k = 1..R of C(R, k) (-1)^(k-1) o'^k / sqrt(k).
    """
    ratio = _fit("ratio", ratio, ratio, len(opacity)).long().clamp(1, n_max)
    scale = _fit("scale", scale, opacity, len(opacity), 3, rows=True)
    whole = opacity.double()
    share = 1 - (1 - whole) ** (1 / ratio)
    total = torch.zeros_like(share)
    for term in _terms(n_max, opacity.device)[ratio].flip(1).unbind(1):  # Horner's scheme
        total = (total + term) * share
    factor = torch.where(total > 0, whole / total, 1)
    return share.to(opacity), scale * factor.to(opacity)[:, None]


@cache
def _terms(n_max: int, device: torch.device) -> Tensor:
    """Factor of o'^k in D at row R, column k - 1, float64."""
    numbers = range(1, n_max + 1)
    rows = [[math.comb(n, k) * (-1) ** (k - 1) / math.sqrt(k) for k in numbers] for n in (0, *numbers)]
    return torch.tensor(rows, dtype=torch.float64, device=device)
