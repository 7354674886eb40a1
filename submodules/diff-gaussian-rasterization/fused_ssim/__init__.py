"""Drop-in name for fused-ssim: `from fused_ssim import fused_ssim`, for tensors on any device."""

from diff_gaussian_rasterization.losses import ssim
from torch import Tensor


def fused_ssim(img1: Tensor, img2: Tensor, padding: str = "same", train: bool = True) -> Tensor:
    """Mean SSIM of img1 and img2, [B, C, H, W] in 0..1; differentiable with respect to img1."""
    return ssim(img1, img2, padding, train)
