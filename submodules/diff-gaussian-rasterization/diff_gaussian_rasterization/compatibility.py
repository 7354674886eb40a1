"""The original rasterizer's Python interface, of every age, for tensors on any device.

    2023         settings without `antialiasing`; returns (color, radii)
    since 2024   settings with it; returns (color, radii, invdepth)
    accelerated  a separate `dc` beside `shs`

Matrices are the original's: transposed, acting on row vectors. `means2D` receives the screen gradient in NDC
units. The original reads opacities and what describes the camera by their elements, whatever their shape: so
does this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .api import mark_visible, rasterize
from .types import describe, expect_tensor


class GaussianRasterizationSettings(NamedTuple):
    image_height: int
    image_width: int
    tanfovx: float
    tanfovy: float
    bg: Tensor  # [3]
    scale_modifier: float
    viewmatrix: Tensor  # [4, 4]  world to camera, transposed
    projmatrix: Tensor  # [4, 4]  world to clip space, transposed
    sh_degree: int
    campos: Tensor  # [3]
    prefiltered: bool  # not used
    debug: bool = False  # a failing call leaves its arguments in snapshot_fw.dump; the first release has none
    antialiasing: bool | None = None  # None: a caller of 2023, who expects two results


class GaussianRasterizer(nn.Module):
    __call__: Callable[..., tuple[Tensor, ...]]

    def __init__(self, raster_settings: GaussianRasterizationSettings):
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Which positions [N, 3] are in front of the camera: bool [N]."""
        _expect_points("positions", positions)
        return mark_visible(positions, _fit("viewmatrix", self.raster_settings.viewmatrix, positions, 4, 4).T)

    def forward(
        self, means3D: Tensor, means2D: Tensor, opacities: Tensor, *args, **kwargs
    ) -> tuple[Tensor, ...]:
        """Render: forward(means3D, means2D, opacities, [dc,] shs, colors_precomp, scales, rotations,
        cov3D_precomp).

        means3D [N, 3], means2D [N, 3], opacities [N, 1], dc [N, 1, 3] with shs [N, K-1, 3] or shs [N, K, 3]
        alone, or colors_precomp [N, 3]; scales [N, 3] with rotations [N, 4], or cov3D_precomp [N, 6]. Returns
        color [3, H, W], radii [N] int32 and, since 2024, inverse depth [1, H, W].
        """
        settings = self.raster_settings
        given = {
            "means3D": means3D, "means2D": means2D, "opacities": opacities, **_arguments(args, kwargs),
        }  # fmt: skip
        _expect_one_of_each(given)
        try:
            out = rasterize(**_gaussians(given, settings), **_camera(settings, means3D))
        except Exception:
            if settings.debug:
                _leave_snapshot({**given, **settings._asdict()})
            raise
        if settings.antialiasing is None:
            return out.image, out.radii
        return out.image, out.radii, out.inv_depth


NAMES = ("shs", "colors_precomp", "scales", "rotations", "cov3D_precomp")
MAX_DEGREE = 3  # some models have coefficients of higher degrees, which the original does not evaluate
MAX_SIZE = 1 << 16  # pixels


def _arguments(args: tuple, kwargs: dict) -> dict:
    """What follows opacities, by name. The accelerated rasterizer has one argument more: dc, before shs."""
    separate_dc = len(args) > len(NAMES) or (len(args) > 1 and getattr(args[1], "ndim", 0) == 3)
    names = ("dc", *NAMES) if separate_dc else NAMES
    if len(args) > len(names):
        raise TypeError(f"forward takes at most {3 + len(names)} arguments, got {3 + len(args)}")
    given = dict(zip(names, args))
    for name, value in kwargs.items():
        if name not in ("dc", *NAMES):
            raise TypeError(
                f"forward got an unexpected argument {name!r}; it takes {', '.join(('dc', *NAMES))}"
            )
        if name in given:
            raise TypeError(f"forward got {name!r} twice")
        given[name] = value
    return {name: given.get(name) for name in ("dc", *NAMES)}


def _expect_one_of_each(given: dict) -> None:
    """Colors and shapes can be told in two ways each."""
    shs, dc, colors = given["shs"], given["dc"], given["colors_precomp"]
    if (shs is None and dc is None) == (colors is None):
        raise Exception("Please provide exactly one of either SHs or precomputed colors!")
    _expect_one_shape(given)


def _expect_one_shape(given: dict) -> None:
    scales, rotations, cov3d = given["scales"], given["rotations"], given["cov3D_precomp"]
    if (scales is None or rotations is None) == (cov3d is None) or (scales is None) != (rotations is None):
        raise Exception(
            "Please provide exactly one of either scale/rotation pair or precomputed 3D covariance!"
        )


def _leave_snapshot(arguments: dict) -> None:
    try:
        torch.save(arguments, "snapshot_fw.dump")
        print("\nAn error occurred in forward. Its arguments are in snapshot_fw.dump.")
    except Exception as error:  # the caller is to see what went wrong first
        print(f"\nAn error occurred in forward. snapshot_fw.dump cannot be written: {error}")


# ---- arguments in the shapes that rasterize() wants, or an error in the caller's words ---------------------


def _gaussians(given: dict, settings: GaussianRasterizationSettings) -> dict:
    """Gaussians, colors and means2D."""
    shapes, means2d = _shapes(given, settings), given["means2D"]
    _expect_carrier(means2d, len(given["means3D"]), 3)
    dc, rest, degree = _harmonics(given, settings)
    if dc is None and rest is not None:
        dc, rest = _SplitConstant.apply(rest)
    return {
        **shapes, "means2d": means2d, "colors": _rows(given, "colors_precomp", 3), "sh_dc": dc,
        "sh_rest": rest, "sh_degree": degree, "antialiasing": bool(settings.antialiasing),
    }  # fmt: skip


def _shapes(given: dict, settings: Any) -> dict:
    """Gaussians without color."""
    means = given["means3D"]
    _expect_points("means3D", means)
    return {
        "means": means, "opacities": _fit("opacities", given["opacities"], means, len(means), 1),
        "quats": _rows(given, "rotations", 4), "scales": _rows(given, "scales", 3),
        "cov3d": _rows(given, "cov3D_precomp", 6),
        "scale_modifier": _number("scale_modifier", settings.scale_modifier),
    }  # fmt: skip


def _rows(given: dict, name: str, *shape: int) -> Tensor | None:
    """One row per Gaussian, if they were given."""
    means, value = given["means3D"], given[name]
    return None if value is None else _fit(name, value, means, len(means), *shape, rows=True)


def _expect_carrier(means2d: Tensor | None, count: int, columns: int) -> None:
    if means2d is None:
        return
    expect_tensor("means2D", means2d)
    if means2d.shape != (count, columns):
        raise ValueError(f"means2D must be {[count, columns]}, got {list(means2d.shape)}")


def _harmonics(given: dict, settings: Any) -> tuple[Tensor | None, Tensor | None, int]:
    """dc and shs, as far as they were given, and the degree to evaluate. Without dc, shs begins with the
    constant coefficients."""
    means, dc, shs = given["means3D"], given["dc"], given["shs"]
    if given["colors_precomp"] is not None:
        return None, None, 0
    degree = min(_whole("sh_degree", settings.sh_degree, 0), MAX_DEGREE)
    constant = 1 if dc is None else 0  # of the coefficients in shs
    needed, most = (degree + 1) ** 2 - 1 + constant, (MAX_DEGREE + 1) ** 2 - 1 + constant
    if dc is not None:
        dc = _fit("dc", dc, means, len(means), 1, 3, rows=True)
    if shs is None and needed == 0:
        return dc, None, degree
    expect_tensor("shs", shs)
    assert shs is not None
    count = max(needed, shs.shape[1] if shs.dim() == 3 else 0)
    shs = _fit("shs", shs, means, len(means), count, 3, rows=True)
    return dc, shs if count <= most else shs[:, :most], degree


def _camera(settings: Any, means: Tensor) -> dict:
    """World-to-camera and K from the original's two matrices, without waiting for the device.

    The projection matrix P has (r+l)/(r-l) in row 0, column 2: the principal point's offset from the center,
    in half image widths. projmatrix = viewmatrix P^T, so its first column is P00 view_x + P02 view_z, and the
    rotation's columns are orthonormal: P02 is the first column's component along view_z.
    """
    width = _whole("image_width", settings.image_width, 1, MAX_SIZE)
    height = _whole("image_height", settings.image_height, 1, MAX_SIZE)
    view = _fit("viewmatrix", settings.viewmatrix, means, 4, 4)
    projection = _fit("projmatrix", settings.projmatrix, means, 4, 4)
    with torch.no_grad():
        forward = view[:3, 2]
        # Sums, since autocast would compute matrix products in 16 bits: [2].
        offset = (forward[:, None] * projection[:3, :2]).sum(0) / forward.square().sum()
        K = torch.zeros(3, 3, dtype=view.dtype, device=view.device)
        K[0, 0].fill_(width / (2 * _tangent("tanfovx", settings.tanfovx)))
        K[1, 1].fill_(height / (2 * _tangent("tanfovy", settings.tanfovy)))
        K[2, 2].fill_(1)
        K[0, 2] = (1 + offset[0]) * (0.5 * width)
        K[1, 2] = (1 + offset[1]) * (0.5 * height)
    # A pose that is being optimized carries the camera's center along; otherwise campos says where it is.
    center = None if view.requires_grad else _fit("campos", settings.campos, means, 3)
    return {
        "world_to_camera": view.T, "K": K, "width": width, "height": height, "camera_center": center,
        "background": _fit("bg", settings.bg, means, 3),
    }  # fmt: skip


def _expect_points(name: str, points: Tensor) -> None:
    expect_tensor(name, points)
    dtypes = (torch.float32, torch.float64) if points.device.type == "cpu" else (torch.float32,)
    if points.dim() != 2 or points.shape[1] != 3 or points.dtype not in dtypes:
        raise ValueError(f"{name} must be [N, 3] float32 on {points.device}, got {describe(points)}")


def _fit(name: str, value: Tensor, like: Tensor, *shape: int, rows: bool = False) -> Tensor:
    """`value` in this shape, if it has as many elements; with `rows`, its last extent must agree, too."""
    expect_tensor(name, value)
    fits = value.numel() == math.prod(shape) and (not rows or value.shape[-1:] == shape[-1:])
    if not fits or value.dtype != like.dtype or value.device != like.device:
        wanted = describe(like).removeprefix(str(list(like.shape)))
        raise ValueError(f"{name} must be {list(shape)}{wanted}, got {describe(value)}")
    return value if value.shape == shape else value.reshape(shape)


def _number(name: str, value: Any) -> float:
    """A number, or a tensor or array of one element."""
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _whole(name: str, value: object, least: int, most: float = math.inf) -> int:
    number = _number(name, value)
    if not number.is_integer() or not least <= number <= most:
        limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} must be a whole number, {limits}, got {value}")
    return int(number)


def _tangent(name: str, value: object) -> float | Tensor:
    """A number, or a tensor without dimensions, which stays where it is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    tangent = _number(name, value)
    if tangent == 0:
        raise ValueError(f"{name} must not be 0")
    return tangent


class _SplitConstant(torch.autograd.Function):
    """shs [N, K, 3] -> its constant term [N, 1, 3] and the rest [N, K-1, 3]; one concatenation on the way
    back."""

    @staticmethod
    def forward(ctx, shs):
        return shs[:, :1].contiguous(), shs[:, 1:].contiguous()

    @staticmethod
    def backward(ctx, grad_dc, grad_rest):
        return torch.cat([grad_dc, grad_rest], dim=1)
