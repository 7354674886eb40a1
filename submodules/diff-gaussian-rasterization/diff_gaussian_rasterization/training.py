"""One training iteration as one native call: render, photometric loss, backward, Adam and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from .types import ScreenStats


class TrainStep:
    """Steps of Gaussians given as raw parameters (log scales, opacity logits, quaternions of any length).

    Equal to rasterize(raw=True), photometric_loss(), backward and FusedAdam one after the other, up to the
    order of sums.
    """

    def __init__(self, views: int, device: torch.device):
        self.device = device

    @torch.no_grad()
    def __call__(
        self,
        params: list[Tensor],  # means, sh_dc, sh_rest, opacities, scales, quats; shapes as in rasterize()
        exp_avg: list[Tensor],  # like params
        exp_avg_sq: list[Tensor],
        lrs: list[float],
        betas: tuple[float, float],
        eps: float,
        step: int,  # counted from 1
        *,
        view: int,  # which of the training views this is
        world_to_camera: Tensor,  # [4, 4]
        K: Tensor,  # [3, 3]
        background: Tensor,  # [3]
        target: Tensor,  # [3, H, W] uint8 or float
        mask: Tensor | None,  # [H, W]
        sh_degree: int,
        antialiasing: bool,
        lambda_dssim: float,
        stats: ScreenStats | None,
    ) -> Tensor:
        """Returns [loss, L1 loss, 1] on the device."""
        losses = torch.zeros(3, device=self.device)
        sums = (stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum) if stats else (None, None, None)
        torch.ops.tilesplat.train_step(
            params,
            exp_avg,
            exp_avg_sq,
            lrs,
            *betas,
            eps,
            step,
            world_to_camera,
            K,
            background,
            target,
            mask,
            sh_degree,
            antialiasing,
            lambda_dssim,
            *sums,
            losses,
            [],
        )
        return losses
