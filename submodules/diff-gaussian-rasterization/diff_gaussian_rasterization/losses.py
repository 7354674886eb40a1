"""Image losses: structural similarity, and the photometric loss of training in one pass over the image."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from ._autograd import once, taken
from .types import expect_tensors


def photometric_loss(
    image: Tensor,  # [3, H, W] float
    target: Tensor,  # [3, H, W] like image, or uint8 meaning 0 to 255
    lambda_dssim: float = 0.2,
    mask: Tensor | None = None,  # [H, W]
) -> tuple[Tensor, Tensor]:
    """(1 - lambda) L1 + lambda (1 - SSIM), and L1 alone, detached. The mask multiplies image and target.

    The image is clamped to [0, 1] first, as a viewer will do: no gradient reaches what is outside.
    Loss and gradient come from the same pass; no gradient reaches target and mask.
    """
    expect_tensors(image=image, target=target, mask=mask)
    loss, l1, _ = _PhotometricLoss.apply(taken(image), taken(target), taken(mask), lambda_dssim)
    return loss, l1


class _PhotometricLoss(torch.autograd.Function):
    @staticmethod
    def forward(image, target, mask, lambda_dssim):
        return torch.ops.tilesplat.photometric_loss(image, target, mask, lambda_dssim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, l1, grad_image = output
        ctx.save_for_backward(grad_image)
        ctx.mark_non_differentiable(l1, grad_image)

    @staticmethod
    @once
    def backward(ctx, grad_loss, *_):
        (grad_image,) = ctx.saved_tensors
        return grad_loss * grad_image, None, None, None


def ssim(a: Tensor, b: Tensor, padding: str = "same", train: bool = True) -> Tensor:
    """Mean structural similarity of two images or batches, [C, H, W] or [B, C, H, W].

    11 x 11 Gaussian window, sigma 1.5, values of range 1. Padding "same" takes zeros around the image,
    "valid" leaves out the windows that would need them. With `train` false nothing is kept for a gradient.
    """
    if padding not in ("same", "valid"):
        raise ValueError(f'padding must be "same" or "valid", got {padding!r}')
    expect_tensors(a=a, b=b)
    if a.dim() == 3 and b.dim() == 3:
        a, b = a[None], b[None]
    keep = torch.is_grad_enabled() and a.requires_grad
    return _SSIM.apply(taken(a), taken(b), padding == "valid", train, keep)[0]


class _SSIM(torch.autograd.Function):
    @staticmethod
    def forward(a, b, valid, train, keep):
        value, state = torch.ops.tilesplat.ssim(a, b, valid, train and keep)
        return value, *state

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *state = output
        ctx.save_for_backward(*inputs[:2], *state)
        ctx.valid, ctx.train = inputs[2:4]
        ctx.mark_non_differentiable(*state)

    @staticmethod
    @once
    def backward(ctx, grad, *_):
        if not ctx.train:
            raise RuntimeError("ssim was called with train=False: nothing was kept for its gradient")
        a, b, *state = ctx.saved_tensors
        grad = grad.contiguous()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = torch.ops.tilesplat.ssim_backward(a, b, ctx.valid, state, grad)
        if ctx.needs_input_grad[1]:  # rare: SSIM is symmetric, so this is the same with the images exchanged
            _, swapped = torch.ops.tilesplat.ssim(b, a, ctx.valid, True)
            grad_b = torch.ops.tilesplat.ssim_backward(b, a, ctx.valid, swapped, grad)
        return grad_a, grad_b, None, None, None
