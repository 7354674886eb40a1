"""Real spherical harmonics up to degree 3, in Python: color of a Gaussian as a function of view direction.

The kernels do the same (csrc/common/sh.h). This copy serves --convert_SHs_python, the conversion of point
colors, and readers who want the basis in one screen. Band l has 2l+1 functions; the order inside a band is m
= -l..l.
"""

import torch
from torch import Tensor

C0 = 0.28209479177387814  # sqrt(1 / 4 pi)
C1 = 0.4886025119029199  # sqrt(3 / 4 pi)
C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
C3 = (
    -0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154,
    -0.4570457994644658, 1.445305721320277, -0.5900435899266435,
)  # fmt: skip

MAX_DEGREE = 3


def basis(degree: int, directions: Tensor) -> Tensor:
    """Values [N, (degree+1)^2] of the basis at unit directions [N, 3]."""
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree must be 0 to {MAX_DEGREE}, got {degree}")
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, C0)]
    if degree >= 1:
        values += [-C1 * y, C1 * z, -C1 * x]
    xx, yy, zz = x * x, y * y, z * z
    if degree >= 2:
        values += [C2[0] * x * y, C2[1] * y * z, C2[2] * (2 * zz - xx - yy), C2[3] * x * z, C2[4] * (xx - yy)]
    if degree >= 3:
        values += [
            C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            C3[4] * x * (4 * zz - xx - yy),
            C3[5] * z * (xx - yy),
            C3[6] * x * (xx - 3 * yy),
        ]
    return torch.stack(values, dim=-1)


def sh_to_colors(degree: int, coefficients: Tensor, means: Tensor, camera_center: Tensor) -> Tensor:
    """Colors [N, 3] of Gaussians at `means` [N, 3] seen from `camera_center` [3].

    coefficients [N, K, 3] with K >= (degree+1)^2. Shifted by one half, so that zero coefficients are mid
    gray, and clamped below at 0; there is no upper clamp.
    """
    directions = torch.nn.functional.normalize(means - camera_center, dim=-1)
    values = basis(degree, directions)
    colors = (values.unsqueeze(-1) * coefficients[:, : values.shape[-1]]).sum(dim=1)
    return (colors + 0.5).clamp_min(0.0)


def rgb_to_sh(rgb):
    """Coefficient of the constant basis function that shows as this color in [0, 1]."""
    return (rgb - 0.5) / C0


def sh_to_rgb(dc):
    """The inverse of rgb_to_sh."""
    return dc * C0 + 0.5
