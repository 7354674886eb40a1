"""What goes in and comes out of `rasterize` besides plain tensors. N Gaussians, an image of H x W pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rendered(NamedTuple):
    """One view of the Gaussians."""

    image: Tensor  # [3, H, W]  the background blended in, not clamped
    alpha: Tensor  # [1, H, W]  how much of the background is hidden
    inv_depth: Tensor  # [1, H, W]  sum of 1/z, weighted like colors; not divided by alpha
    radii: Tensor  # [N] int32  pixels; 0 where a Gaussian is not in this view


@dataclass
class ScreenStats:
    """How hard the image pulls at each Gaussian: what densification decides by. Added to in every backward.

    Gradients of the projected mean are in NDC units: per half image width and half image height.
    """

    grad_norm_sum: Tensor  # [N] float32  sum over views of |gradient|
    visits: Tensor  # [N] float32  number of views with radius > 0
    abs_grad_norm_sum: Tensor | None = None  # [N] float32  same as the first, of per-pixel absolute gradients

    @classmethod
    def zeros(cls, count: int, device: torch.device | str, absolute: bool = False) -> ScreenStats:
        """Fresh statistics for `count` Gaussians; with `absolute`, the third kind too."""
        return cls(*(torch.zeros(count, device=device) for _ in range(3 if absolute else 2)))
