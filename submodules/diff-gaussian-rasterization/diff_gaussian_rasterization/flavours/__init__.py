"""The interfaces of well-known forks of the original rasterizer, for code that was written for them.

Each module has GaussianRasterizationSettings and GaussianRasterizer, as its callers expect them:

    from diff_gaussian_rasterization.flavours.mip import GaussianRasterizationSettings, GaussianRasterizer

Or no line is changed: with TILESPLAT_FLAVOUR=mip in the environment, `diff_gaussian_rasterization` itself
has that flavour's names. The work is done by stages.py; the package's README lists who needs which flavour.
"""

from __future__ import annotations

import importlib

FLAVOURS = (
    "abs_grad", "counters", "depth", "depth_alpha", "features", "filter", "median_depth", "mip", "pose",
)  # fmt: skip


def names_of(flavour: str) -> dict[str, object]:
    """What `import diff_gaussian_rasterization` has with TILESPLAT_FLAVOUR=flavour."""
    if flavour not in FLAVOURS:
        raise ImportError(f"TILESPLAT_FLAVOUR must be one of {', '.join(FLAVOURS)}, got {flavour!r}")
    module = importlib.import_module(f".{flavour}", __name__)
    return {name: getattr(module, name) for name in module.__all__}
