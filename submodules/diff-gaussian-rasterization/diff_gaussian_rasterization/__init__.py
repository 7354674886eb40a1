"""Differentiable Gaussian splatting for CPU and CUDA.

Two interfaces to the same operators:
- the names of the original rasterizer, for code that was written for it: GaussianRasterizationSettings,
  GaussianRasterizer, SparseGaussianAdam (compatibility.py);
- our own, typed and documented: rasterize, ssim, photometric_loss, knn_mean_dist2, FusedAdam.
The interfaces of other rasterizers that grew from the original are in flavours/.
"""

import os

from . import _fake  # noqa: F401  registers what torch.compile asks for
from .api import mark_visible, rasterize, rasterize_views
from .compatibility import GaussianRasterizationSettings, GaussianRasterizer
from .knn import knn_mean_dist2
from .losses import photometric_loss, ssim
from .optim import FusedAdam, SparseGaussianAdam
from .training import PartStep, TrainStep
from .types import Rendered, ScreenStats

__all__ = [
    "FusedAdam",
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "PartStep",
    "Rendered",
    "ScreenStats",
    "SparseGaussianAdam",
    "TrainStep",
    "knn_mean_dist2",
    "mark_visible",
    "photometric_loss",
    "rasterize",
    "rasterize_views",
    "ssim",
]

if _flavour := os.environ.get("TILESPLAT_FLAVOUR"):  # code that expects a fork of the original imports one
    from .flavours import names_of as _names_of

    globals().update(_names_of(_flavour))
