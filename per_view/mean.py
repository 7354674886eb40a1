"""A blurred picture as the mean of sharp ones."""

from collections.abc import Sequence

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

GAMMA = 2.2  # light = number ** GAMMA
DARK = 1 / 1024  # below it no photo tells numbers apart, and the curve becomes too steep


def mean(pictures: Sequence[Rendered], space: str) -> Rendered:
    """Of pictures of one view. A photo cannot show more than white: each is clamped before."""
    if len(pictures) == 1:
        return pictures[0]
    images, alphas, depths, radii = (torch.stack(parts) for parts in zip(*pictures))
    return Rendered(_mean(images, space), alphas.mean(0), depths.mean(0), radii.amax(0))


def _mean(images: Tensor, space: str) -> Tensor:
    if space == "srgb":
        return images.clamp_max(1).mean(0)
    return images.clamp(DARK, 1).pow(GAMMA).mean(0).pow(1 / GAMMA)
