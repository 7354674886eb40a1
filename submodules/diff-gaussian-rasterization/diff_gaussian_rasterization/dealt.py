"""Training steps of Gaussians that several processes hold, each some of the rows; on GPUs.

Rows are dealt like cards: the i-th here is row i ranks + rank of all. A step has three parts, and between
them what a camera sees of the Gaussians, and later its gradients, go from process to process:

    records, counts = step.project(...)  # here, for the cameras of all processes
    received = ...  # counts[r] of them go to process r
    lists = step.lists(received, ...)
    losses, grads = step.compare(lists, ...)  # the picture of one's own camera, against its photo
    returned = ...  # grads, back to where the records are from
    step.move(returned, stats)  # along the mean gradient of all cameras
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from .training import WaitingRows
from .types import ScreenStats

SPARE = 1.1  # room for records, relative to the most there have been
operators = torch.ops.tilesplat


class DealtStep(WaitingRows):
    """Equal, up to the order of sums, to TrainStep's with the mean gradient of several views."""

    def __init__(self, rank: int, ranks: int, device: torch.device):
        super().__init__(device)
        self._place = rank, ranks
        self._share = 0.0  # records to make room for, of each pair of a camera and a Gaussian
        self._slots: Tensor | None = None  # of records, between project() and move()

    @torch.no_grad()
    def project(
        self,
        params: list[Tensor],  # means, sh_dc, sh_rest, opacities, scales, quats: the rows here, raw
        exp_avg: list[Tensor],  # like params
        exp_avg_sq: list[Tensor],
        lrs: list[float],
        betas: tuple[float, float],
        eps: float,
        step: int,  # counted from 1
        *,
        world_to_camera: list[Tensor],  # [4, 4], of the processes' cameras
        K: list[Tensor],  # [3, 3]
        sizes: list[tuple[int, int]],  # width and height
        sh_degree: int,
        antialiasing: bool,
        waits: bool = True,  # may rows that no camera shows wait? They would have a gradient of zero
    ) -> tuple[Tensor, list[int]]:
        """Records [M, 16], one camera after the other, and how many there are for each. Waits for the GPU."""
        widths, heights = map(list, zip(*sizes))
        model = (params, exp_avg, exp_avg_sq, lrs, *betas, eps, step)
        self._call = (*model, world_to_camera, K, widths, heights, sh_degree, antialiasing)
        if not waits:
            self.settle()
        self._waiting = self._account(len(params[0]), step) if waits else (None, None)
        pairs = len(K) * len(params[0])
        while True:
            room = min(int(self._share * pairs), pairs)
            self._slots = records = None  # they make room
            records, self._slots, totals = operators.dealt_project(
                *self._call, *self._place, room, *self._waiting
            )
            counts = [count for _, count, *_ in totals.tolist()]
            if sum(counts) <= room:
                return records[: sum(counts)], counts
            self._share = SPARE * sum(counts) / pairs

    @torch.no_grad()
    def lists(self, records: Tensor, counts: list[int], width: int, height: int) -> tuple:
        """Splats, and those of every tile. counts[r] of the records are from process r; they are used up.
        Waits for the GPU."""
        return operators.dealt_lists(records, counts, width, height)

    @torch.no_grad()
    def compare(
        self,
        lists: tuple,
        background: Tensor,  # [3]
        target: Tensor,  # [3, H, W] uint8 or float
        mask: Tensor | None,  # [H, W]
        lambda_dssim: float,
        absolute: bool,  # for ScreenStats.abs_grad_norm_sum
    ) -> tuple[Tensor, Tensor]:
        """Loss and L1 loss [2], and the gradients of the records [M, 12]."""
        losses = background.new_empty(2)
        photo = background, target, mask, lambda_dssim
        return losses, operators.dealt_blend(*lists, *photo, absolute, losses)

    @torch.no_grad()
    def move(self, grads: Tensor, stats: ScreenStats | None, pulls: tuple[float, float] = (0.0, 0.0)) -> None:
        """Along the gradients of what project() has found, and those of the pulls times the sums of opacities
        and scales. It takes no memory."""
        sums = (stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum) if stats else (None, None, None)
        operators.dealt_step(*self._call, self._slots, grads, *pulls, *sums, *self._waiting)
        params, exp_avg, exp_avg_sq, _, _, beta2, eps, step, *_ = self._call
        self._note(params, exp_avg, exp_avg_sq, beta2, eps, step, self._waiting[0] is not None)
        self._slots = None
