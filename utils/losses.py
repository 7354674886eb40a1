"""What training minimizes, beside the photometric loss that lives with the kernels.

loss = (1 - lambda) * L1 + lambda * (1 - SSIM)  (paper, equation 7), computed in one call by
diff_gaussian_rasterization.photometric_loss; here are the terms that come on top of it.
"""

from torch import Tensor


def inverse_depth_loss(rendered: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all pixels of |rendered - target| * mask.

    rendered [1, H, W] is the blended inverse depth, not divided by alpha, as in the published code;
    target [H, W] in the same unit (1 / scene unit); mask [H, W] is 0 where the target is not to be trusted.
    """
    difference = (rendered.squeeze(0) - target).abs()
    return (difference if mask is None else difference * mask).mean()


def apply_exposure(image: Tensor, exposure: Tensor) -> Tensor:
    """Color [3] of each pixel through the affine map exposure [3, 4]: color · A[:, :3] + A[:, 3]."""
    matrix, shift = exposure[:, :3], exposure[:, 3]
    return (matrix.T @ image.flatten(1)).view_as(image) + shift[:, None, None]
