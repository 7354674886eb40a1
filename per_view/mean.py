"""A blurred picture as the mean of sharp ones."""

from collections.abc import Sequence

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

GAMMA = 2.2  # light = number ** GAMMA
DARK = 1 / 1024  # below it no photo tells numbers apart, and the curve becomes too steep


def mean(pictures: Sequence[Rendered], space: str, weights: Tensor | None = None) -> Rendered:
    """Of pictures of one view. A photo cannot show more than white: each is clamped before. The weights, [n]
    or [n, H, W], sum to one; without them, all count alike."""
    if len(pictures) == 1:
        return pictures[0]
    images, alphas, depths, radii = (torch.stack(parts) for parts in zip(*pictures))
    return Rendered(_mean(images, space, weights), alphas.mean(0), depths.mean(0), radii.amax(0))


def _mean(images: Tensor, space: str, weights: Tensor | None) -> Tensor:
    if space == "linear":
        return _sum(images.clamp(DARK, 1).pow(GAMMA), weights).pow(1 / GAMMA)
    return _sum(images.clamp_max(1), weights)


def _sum(images: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return images.mean(0)
    return torch.tensordot(weights, images, 1) if weights.dim() == 1 else (weights[:, None] * images).sum(0)
