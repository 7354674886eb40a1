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


def describe(tensor: Tensor) -> str:
    """As the native errors do: [6, 2] float32 on cpu"""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def expect_tensor(name: str, value: object) -> None:
    """Lists and arrays of numpy are not converted in silence: that would cost a copy in every call."""
    if not isinstance(value, Tensor):
        advice = "" if value is None else ", which torch.as_tensor() makes of it"
        raise TypeError(f"{name} must be a tensor{advice}, got {type(value).__name__}")


def expect_tensors(**arguments: Tensor | None) -> None:
    """Each is a tensor, or was not given."""
    for name, value in arguments.items():
        if value is not None:
            expect_tensor(name, value)
