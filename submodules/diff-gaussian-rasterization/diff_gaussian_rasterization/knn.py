"""Nearest neighbors: how far apart points are decides how large their first Gaussians become."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from .types import expect_tensors


def knn_mean_dist2(points: Tensor) -> Tensor:
    """Mean squared distance of each point [N, 3] to its three nearest others -> [N].

    Duplicates of a point are among its others, at distance 0.
    """
    expect_tensors(points=points)
    return torch.ops.tilesplat.knn_mean_dist2(points.detach().contiguous())
