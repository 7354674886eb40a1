"""The original rasterizer's Python interface, of every age, for tensors on any device.

    2023         settings without `antialiasing`; returns (color, radii)
    since 2024   settings with it; returns (color, radii, invdepth)
    accelerated  a separate `dc` beside `shs`

Matrices are the original's: transposed, acting on row vectors. `means2D` receives the screen gradient in NDC
units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .api import mark_visible, rasterize


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
    debug: bool  # a failing call leaves its arguments in snapshot_fw.dump
    antialiasing: bool | None = None  # None: a caller of 2023, who expects two results


class GaussianRasterizer(nn.Module):
    __call__: Callable[..., tuple[Tensor, ...]]

    def __init__(self, raster_settings: GaussianRasterizationSettings):
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Which positions [N, 3] are in front of the camera: bool [N]."""
        return mark_visible(positions, self.raster_settings.viewmatrix.T)

    def forward(
        self, means3D: Tensor, means2D: Tensor, opacities: Tensor, *args, **kwargs
    ) -> tuple[Tensor, ...]:
        """Render: forward(means3D, means2D, opacities, [dc,] shs, colors_precomp, scales, rotations,
        cov3D_precomp).

        means3D [N, 3], means2D [N, 3], opacities [N, 1], dc [N, 1, 3] with shs [N, K-1, 3] or shs [N, K, 3]
        alone, or colors_precomp [N, 3]; scales [N, 3] with rotations [N, 4], or cov3D_precomp [N, 6]. Returns
        color [3, H, W], radii [N] int32 and, since 2024, inverse depth [1, H, W].
        """
        given = _arguments(args, kwargs)
        shs, colors, dc = given["shs"], given["colors_precomp"], given["dc"]
        scales, rotations, cov3d = given["scales"], given["rotations"], given["cov3D_precomp"]
        if (shs is None and dc is None) == (colors is None):
            raise Exception("Please provide exactly one of either SHs or precomputed colors!")
        if (scales is None or rotations is None) == (cov3d is None) or (scales is None) != (
            rotations is None
        ):
            raise Exception(
                "Please provide exactly one of either scale/rotation pair or precomputed 3D covariance!"
            )
        if shs is not None and dc is None:
            dc, shs = _SplitConstant.apply(shs)

        settings = self.raster_settings
        arguments = {
            "means": means3D, "quats": rotations, "scales": scales, "opacities": opacities,
            "sh_dc": dc, "sh_rest": shs, "colors": colors, "cov3d": cov3d, "means2d": means2D,
            **_camera(settings), "background": settings.bg, "sh_degree": settings.sh_degree if colors is None
            else 0, "scale_modifier": settings.scale_modifier, "antialiasing": bool(settings.antialiasing),
        }  # fmt: skip
        try:
            out = rasterize(**arguments)
        except Exception:
            if settings.debug:
                torch.save(arguments, "snapshot_fw.dump")
                print("\nAn error occurred in forward. Its arguments are in snapshot_fw.dump.")
            raise
        if settings.antialiasing is None:
            return out.image, out.radii
        return out.image, out.radii, out.inv_depth


NAMES = ("shs", "colors_precomp", "scales", "rotations", "cov3D_precomp")


def _arguments(args: tuple, kwargs: dict) -> dict:
    """What follows opacities, by name. The accelerated rasterizer has one argument more: dc, before shs."""
    separate_dc = len(args) > len(NAMES) or (len(args) > 1 and args[1] is not None and args[1].dim() == 3)
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


def _camera(settings: GaussianRasterizationSettings) -> dict:
    """World-to-camera and K from the original's two matrices, without waiting for the device.

    The projection matrix P has (r+l)/(r-l) in row 0, column 2: the principal point's offset from the center,
    in half image widths. projmatrix = viewmatrix P^T, so its first column is P00 view_x + P02 view_z, and the
    rotation's columns are orthonormal: P02 is the first column's component along view_z.
    """
    view, width, height = settings.viewmatrix, settings.image_width, settings.image_height
    with torch.no_grad():
        forward = view[:3, 2]
        offset = (forward @ settings.projmatrix[:3, :2]) / (forward @ forward)  # [2]
        K = torch.zeros(3, 3, dtype=view.dtype, device=view.device)
        K[0, 0].fill_(width / (2 * settings.tanfovx))
        K[1, 1].fill_(height / (2 * settings.tanfovy))
        K[2, 2].fill_(1)
        K[0, 2] = (1 + offset[0]) * (0.5 * width)
        K[1, 2] = (1 + offset[1]) * (0.5 * height)
    # A pose that is being optimized carries the camera's center along; otherwise campos says where it is.
    center = None if view.requires_grad else settings.campos
    return {"world_to_camera": view.T, "K": K, "width": width, "height": height, "camera_center": center}


class _SplitConstant(torch.autograd.Function):
    """shs [N, K, 3] -> its constant term [N, 1, 3] and the rest [N, K-1, 3]; one concatenation on the way
    back."""

    @staticmethod
    def forward(ctx, shs):
        return shs[:, :1].contiguous(), shs[:, 1:].contiguous()

    @staticmethod
    def backward(ctx, grad_dc, grad_rest):
        return torch.cat([grad_dc, grad_rest], dim=1)
