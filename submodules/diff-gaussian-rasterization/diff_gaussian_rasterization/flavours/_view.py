"""What the flavours share: from a caller's arguments to Gaussians that can be blended into any picture."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compatibility, reference, stages
from ..compatibility import _arguments, _camera, _expect_carrier, _harmonics, _rows, _shapes

MOST_CHANNELS = 512  # of one call of stages.blend


def settings_with(*required: str, after: str = "debug", **optional: Any) -> Any:
    """The original's settings and more: `required` ones behind the field `after`, `optional` ones behind
    debug."""
    fields = list(compatibility.GaussianRasterizationSettings._fields)
    fields.remove("antialiasing")
    at = fields.index(after) + 1
    fields[at:at] = required
    names = [*fields, *optional, "antialiasing"]
    return namedtuple("GaussianRasterizationSettings", names, defaults=(False, *optional.values(), False))


GaussianRasterizationSettings = settings_with()


class Rasterizer(compatibility.GaussianRasterizer):
    """The original's class, for flavours to say what they return."""

    keywords: tuple[str, ...] = ()  # of forward, beside the original's
    raster_settings: Any

    def __init__(self, raster_settings: Any):
        super().__init__(raster_settings)

    def forward(self, means3D, means2D, opacities, *args, **kwargs):
        """As the original's, which see, and the keywords of this flavour."""
        more = {name: kwargs.pop(name) for name in self.keywords if name in kwargs}
        given = {
            "means3D": means3D, "means2D": means2D, "opacities": opacities, **_arguments(args, kwargs),
        }  # fmt: skip
        compatibility._expect_one_of_each(given)
        try:
            return self.results(given, **more)
        except Exception:
            if self.raster_settings.debug:
                compatibility._leave_snapshot({**given, **more, **self.raster_settings._asdict()})
            raise

    def results(self, given: dict, **more: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError


class View(NamedTuple):
    """Gaussians before a camera."""

    projected: stages.Projected  # radius 0 also where a color is not finite
    tiles: stages.Tiles
    colors: Tensor  # [N, 3]
    background: Tensor  # [3]
    absolute: Tensor | None  # [N, 2]  carrier of absolute gradients

    @property
    def radii(self) -> Tensor:
        return self.projected.radii

    @property
    def depths(self) -> Tensor:
        """As a feature: [N, 1]"""
        return self.projected.depths[:, None]

    def blend(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Color [3, H, W] over the background, a picture [D, H, W] of each feature [N, D] over nothing, and
        alpha [1, H, W], all by one walk over the splats."""
        every = torch.cat([self.colors, *features], dim=1)
        background = F.pad(self.background, (0, every.shape[1] - 3))
        parts = [
            stages.blend(self.projected, part, self.tiles, behind, self.absolute)
            for part, behind in zip(every.split(MOST_CHANNELS, dim=1), background.split(MOST_CHANNELS))
        ]
        image = parts[0].image if len(parts) == 1 else torch.cat([part.image for part in parts])
        ends = [3]
        for feature in features:
            ends.append(ends[-1] + feature.shape[1])
        # Slices may be changed in place before the backward, what split() gives may not.
        return *(image[a:b] for a, b in zip([0, *ends], ends)), parts[0].alpha

    def scores(self) -> stages.Scores:
        return stages.scores(self.projected, self.tiles)

    def with_gradients_times(self, weights: Tensor) -> View:
        """The same, but gradients are multiplied by weights [N] on the way back to the Gaussians."""
        names = ("means2d", "conics", "opacities", "depths")
        screen = {name: _weighed(getattr(self.projected, name), weights) for name in names}
        projected = self.projected._replace(**screen)
        return self._replace(projected=projected, colors=_weighed(self.colors, weights))


def look(
    given: dict,
    settings: Any,
    columns: int = 3,
    camera: dict | None = None,
    offset: Tensor | None = None,
    **options,
) -> View:
    """From the arguments of forward. means2D has this number of columns; `camera` is that of the settings if
    None; `offset` is for stages.lists, `options` are for stages.project."""
    shapes, means2d = _shapes(given, settings), given["means2D"]
    _expect_carrier(means2d, len(given["means3D"]), columns)
    camera = dict(camera or _camera(settings, given["means3D"]))
    center, background = camera.pop("camera_center"), camera.pop("background")
    options = {"compensation": "antialiasing" if settings.antialiasing else "none", **options}
    projected = stages.project(**shapes, **camera, **options)
    colors = _colors(given, settings, camera["world_to_camera"], center)
    drawn = colors.detach().isfinite().all(1)
    projected = projected._replace(radii=torch.where(drawn, projected.radii, 0))
    absolute = None
    if means2d is not None and means2d.requires_grad:
        half = _half_size(projected, means2d)
        moved = projected.means2d + (means2d - means2d.detach())[:, :2] * half
        projected = projected._replace(means2d=moved)
        absolute = means2d[:, 2:] * half if columns == 4 else None
    return View(projected, stages.lists(projected, offset), colors, background, absolute)


def _half_size(projected: stages.Projected, like: Tensor) -> Tensor:
    """Pixels per NDC unit, made without waiting for the device: [2]"""
    half = torch.empty(2, dtype=like.dtype, device=like.device)
    half[0].fill_(projected.width / 2)
    half[1].fill_(projected.height / 2)
    return half


def _weighed(tensor: Tensor, weights: Tensor) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    tensor, weights = tensor.view_as(tensor), weights.reshape(-1, *[1] * (tensor.dim() - 1))
    tensor.register_hook(lambda grad: grad * weights)
    return tensor


# ---- colors ------------------------------------------------------------------------------------------------


def _colors(given: dict, settings: Any, world_to_camera: Tensor, center: Tensor | None) -> Tensor:
    """[N, 3]"""
    colors = _rows(given, "colors_precomp", 3)
    if colors is not None:
        return colors
    constant, rest, degree = _harmonics(given, settings)
    known = [t for t in (constant, rest) if t is not None]
    coefficients = known[0] if len(known) == 1 else torch.cat(known, dim=1)
    if center is None:
        center = -(world_to_camera[:3, :3] * world_to_camera[:3, 3:]).sum(0)
    return _Harmonics.apply(given["means3D"] - center, coefficients, degree).clamp_min(0)


class _Harmonics(torch.autograd.Function):
    """reference.sh_colors before its clamp, with a derivative by hand: autograd's takes much longer.

    A Gaussian whose color has no gradient gets none, whatever its coefficients are.
    """

    @staticmethod
    def forward(ctx, offsets, coefficients, degree):
        lengths = offsets.norm(dim=1, keepdim=True).clamp_min(1e-12)
        directions = (offsets / lengths).nan_to_num(0).T.contiguous()  # [3, N]: its rows are quick to read
        basis = reference.sh_basis(degree, directions.T)
        ctx.save_for_backward(directions, lengths, basis, coefficients)
        used = coefficients[:, : basis.shape[1]]
        return torch.stack([(basis * channel).sum(1) for channel in used.unbind(2)], dim=1) + 0.5

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        directions, lengths, basis, coefficients = ctx.saved_tensors
        count = basis.shape[1]
        grad_coefficients = basis[:, :, None] * grad[:, None]
        if count < coefficients.shape[1]:
            grad_coefficients = F.pad(grad_coefficients, (0, 0, 0, coefficients.shape[1] - count))
        if not ctx.needs_input_grad[0]:
            return None, grad_coefficients, None
        red, green, blue = (c * g for c, g in zip(coefficients[:, :count].unbind(2), grad[:, None].unbind(2)))
        weights, lower = (red + green + blue).T.contiguous(), basis.T.contiguous()
        toward = torch.zeros_like(directions)
        for k, axis, m, slope in _slopes():
            if k < count:
                toward[axis].addcmul_(weights[k], lower[m], value=slope)
        across = toward - directions * (directions * toward).sum(0)
        reached = (grad != 0).any(1, keepdim=True)
        return torch.where(reached, across.T / lengths, 0), grad_coefficients, None


@cache
def _slopes() -> list[tuple[int, int, int, float]]:
    """The gradient of a solid harmonic consists of harmonics of one degree less: (k, axis, m, s) says that
    harmonic k has s times harmonic m in its slope along that axis. Found from values at some points."""
    points = torch.rand(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        slopes = torch.autograd.functional.jacobian(lambda p: reference.sh_basis(3, p).sum(0), points)
    lower = reference.sh_basis(2, points)
    parts = torch.linalg.lstsq(lower, slopes.permute(1, 0, 2).flatten(1)).solution.unflatten(1, (16, 3))
    return [(k, axis, m, parts[m, k, axis].item()) for m, k, axis in (parts.abs() > 1e-6).nonzero().tolist()]
