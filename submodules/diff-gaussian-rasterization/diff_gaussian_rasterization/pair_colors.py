"""Colors of Gaussians as several cameras see them, for the pairs of a camera and a Gaussian that it sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from .types import expect_tensors


def pair_colors(
    means: Tensor,  # [N, 3]
    sh_dc: Tensor,  # [N, 1, 3]
    sh_rest: Tensor | None,  # [N, K-1, 3]
    centers: Tensor,  # [C, 3]  where the cameras are
    pairs: Tensor,  # [M] int64  camera * N + Gaussian, all different
    sh_degree: int = 0,
) -> Tensor:
    """Colors [M, 3] by spherical harmonics up to `sh_degree`, at least 0. Gradients flow to all but `pairs`.

    Sums over cameras are made in their order: equal calls give equal bits, on a GPU as well.
    """
    expect_tensors(means=means, sh_dc=sh_dc, sh_rest=sh_rest, centers=centers, pairs=pairs)
    tensors = (means, sh_dc, sh_rest, centers, pairs)
    return _PairColors.apply(*(None if t is None else t.contiguous() for t in tensors), sh_degree)


class _PairColors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, sh_dc, sh_rest, centers, pairs, sh_degree):
        colors = torch.ops.tilesplat.pair_colors(means, sh_dc, sh_rest, centers, pairs, sh_degree)
        ctx.save_for_backward(means, sh_dc, sh_rest, centers, pairs, colors)
        ctx.sh_degree = sh_degree
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, centers, pairs, colors = ctx.saved_tensors
        count, grad = len(inputs[0]), grad.contiguous()
        numbers = torch.arange(len(pairs), dtype=torch.int32, device=pairs.device)
        slots = torch.full((len(centers) * count,), -1, dtype=torch.int32, device=pairs.device)
        slots = slots.index_copy_(0, pairs, numbers).view(len(centers), count)

        def back(centers, slots):
            return torch.ops.tilesplat.pair_colors_backward(
                *inputs, centers, pairs, ctx.sh_degree, slots, colors, grad
            )

        if not ctx.needs_input_grad[3]:
            grads, by_center = back(centers, slots), None
        else:  # one camera after the other: what its center moves is the opposite of what the means do
            each = [back(centers[i : i + 1], slots[i : i + 1]) for i in range(len(centers))]
            grads = [sum(parts[1:], parts[0]) for parts in zip(*each)]
            by_center = -torch.stack([means.sum(0) for means, *_ in each])
        means, sh_dc, sh_rest = grads
        return means, sh_dc, sh_rest if inputs[2] is not None else None, by_center, None, None
