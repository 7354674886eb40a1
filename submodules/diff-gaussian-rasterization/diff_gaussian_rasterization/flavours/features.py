"""Pictures of features beside the color. The keyword of forward tells whose caller it is:

    language_feature_precomp [N, 3]  LangSplat          (color, feature [3, H, W], radii)
    sh_objs [N, 1, 16]               gaussian-grouping  (color, radii, objects [16, H, W])
    semantic_feature [N, 1, C]       feature-3dgs       (color, feature [C, H, W], radii, depth [1, H, W])
    semantics [N, S]                 Street Gaussians   (color, radii, depth, alpha, semantic [S, H, W])

Features are blended over nothing, depth as in flavours/depth.py. LangSplat's setting
`include_feature=False` leaves its feature out: the picture is 0 then.
"""

from __future__ import annotations

from torch import Tensor

from ..compatibility import _fit
from ..types import expect_tensor
from ._view import Rasterizer, View, look, settings_with

__all__ = ["GaussianRasterizationSettings", "GaussianRasterizer"]

GaussianRasterizationSettings = settings_with(include_feature=True)


class GaussianRasterizer(Rasterizer):
    keywords = ("language_feature_precomp", "sh_objs", "semantic_feature", "semantics")

    def results(self, given, **features):
        if len(features) != 1:
            raise TypeError(f"forward needs one of {', '.join(self.keywords)}, got {len(features)}")
        name, feature = next(iter(features.items()))
        view = look(given, self.raster_settings)
        if name == "language_feature_precomp" and not self.raster_settings.include_feature:
            color, _ = view.blend()
            return color, color.new_zeros(color.shape), view.radii
        return RESULTS[name](view, _rows(name, feature, given["means3D"]))


def _rows(name: str, feature: Tensor, means: Tensor) -> Tensor:
    """[N, D]"""
    expect_tensor(name, feature)
    any_number = feature.shape[-1] if feature.dim() else 1
    shapes = {"language_feature_precomp": (3,), "sh_objs": (1, 16), "semantic_feature": (1, any_number)}
    shape = shapes.get(name, (any_number,))
    return _fit(name, feature, means, len(means), *shape, rows=True).reshape(len(means), shape[-1])


def _language(view: View, feature: Tensor) -> tuple[Tensor, ...]:
    color, picture, _ = view.blend(feature)
    return color, picture, view.radii


def _objects(view: View, feature: Tensor) -> tuple[Tensor, ...]:
    color, picture, _ = view.blend(feature)
    return color, view.radii, picture


def _semantic(view: View, feature: Tensor) -> tuple[Tensor, ...]:
    color, picture, depth, _ = view.blend(feature, view.depths)
    return color, picture, view.radii, depth


def _street(view: View, feature: Tensor) -> tuple[Tensor, ...]:
    color, depth, picture, alpha = view.blend(view.depths, feature)
    return color, view.radii, depth, alpha, picture


RESULTS = dict(zip(GaussianRasterizer.keywords, (_language, _objects, _semantic, _street)))
