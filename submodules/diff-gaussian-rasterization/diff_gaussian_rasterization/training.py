"""One training iteration as one native call: render, photometric loss, backward, Adam and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from .types import ScreenStats

WINDOW = 128  # steps that the GPU can keep account of; a row may miss one less
ROOM_TO_GROW = 1.25  # between two visits of a view
GRAIN = 1 << 16  # sizes of buffers are multiples, so that the allocator finds a fitting one

Kinds = tuple[list[Tensor], list[Tensor], list[Tensor]]  # params, exp_avg, exp_avg_sq


class WaitingRows:
    """On a GPU, rows that a step does not show wait: Adam with a gradient of zero is easily caught up on, and
    moving a row costs more than all else that is done for it. settle() lets all of them catch up; call it
    before anyone but the next step looks at parameters or moments.
    """

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self._moved_at: Tensor | None = None  # [N] the step that each row is up to date with
        self._missed: Tensor | None = None  # [WINDOW, 8] what has been missed since each of the last steps
        self._settled_at = self._last = 0  # steps
        self._unsettled: tuple | None = None  # what settle() needs, if any row may be waiting

    def settle(self) -> None:
        """Bring all rows to where dense Adam has them."""
        if self._unsettled:
            torch.ops.tilesplat.settle(*self._unsettled, self._last, self._moved_at, self._missed)
            self._settled_at, self._unsettled = self._last, None

    def _account(self, count: int, step: int) -> tuple[Tensor | None, Tensor | None]:
        """Of the waiting rows, for the step that comes."""
        if self.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            self.settle()
            return None, None
        if self._moved_at is None or count != len(self._moved_at) or step != self._last + 1:
            if self._unsettled:
                raise RuntimeError("settle() must be called before Gaussians or steps are added elsewhere")
            self._moved_at = torch.full((count,), step - 1, dtype=torch.int32, device=self.device)
            self._missed = torch.tensor([0.0] * 6 + [1.0] * 2, device=self.device).repeat(WINDOW, 1)
            self._settled_at = step - 1
        elif step - self._settled_at == WINDOW - 1:
            self.settle()
        return self._moved_at, self._missed

    def _note(
        self, params: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], beta2: float, eps: float,
        step: int, waits: bool,
    ) -> None:  # fmt: skip
        """A step was taken; rows may be waiting since."""
        self._last = step
        if waits:
            self._unsettled = (params, exp_avg, exp_avg_sq, beta2, eps)


class TrainStep(WaitingRows):
    """Steps of Gaussians given as raw parameters (log scales, opacity logits, quaternions of any length).

    Equal to rasterize(raw=True), photometric_loss(), backward and FusedAdam one after the other, up to the
    order of sums.

    A GPU step has to make room for the pairs of tile and splat before it has counted them. Each view's
    number is remembered, so that nobody waits for the GPU but at the first visit of a view. Should a view
    want much more than before, the step moves nothing, and says so in what __call__ returns.

    After torch.use_deterministic_algorithms(True) equal steps give equal bits: on a GPU, nothing waits, pairs
    are counted first, and sums are made in a fixed order, which takes more time and memory.
    """

    def __init__(self, views: int, device: torch.device):
        super().__init__(device)
        # Written by the GPU and read here without waiting: what a view wanted at its last visit.
        self._entries = torch.zeros(views, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._peaks, self._rooms = [0] * views, [0] * views  # of pairs
        self._counts = [0] * views  # of Gaussians at a view's last visit
        self.skipped = 0  # steps that moved nothing, as far as is known: the view's next visit tells

    def _room(self, view: int, count: int) -> tuple[int, Tensor | None]:
        """For how many pairs to make room, 0 to count them first; and where to write how many there are."""
        if self.device.type != "cuda":
            return 0, None
        entries = self._entries[view : view + 1]
        return 0 if torch.are_deterministic_algorithms_enabled() else self._guess(view, count), entries

    def _guess(self, view: int, count: int) -> int:
        """How many pairs this view may want, of so many Gaussians; 0 if it is new.

        With more Gaussians than at its last visit it wants about as many times more. Splats reach
        less far when their opacities have been reset, and grow back between two visits: peaks are forgotten
        slowly.
        """
        last, growth = int(self._entries[view]), max(count / max(self._counts[view], 1), 1.0)
        self.skipped += last > self._rooms[view] > 0
        # If the last visit was just now, `last` may be of the one before: growth since then is in the peak.
        peak = int(max(growth * last, 0.9 * self._peaks[view])) if last else 0
        self._counts[view], self._peaks[view] = count, peak
        self._rooms[view] = -(-int(ROOM_TO_GROW * peak) // GRAIN) * GRAIN
        return self._rooms[view]

    def forget(self, view: int) -> None:
        """Count the pairs of this view first when it comes again: there was no memory for the room it had."""
        self._entries[view] = 0

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
        """Returns [loss, L1 loss, 1, 0] on the device; [0, 0, 0, 1] if the step was skipped."""
        losses = torch.zeros(4, device=self.device)
        sums = (stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum) if stats else (None, None, None)
        account = self._account(len(params[0]), step)
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
            *self._room(view, len(params[0])),
            *account,
        )
        self._note(params, exp_avg, exp_avg_sq, betas[1], eps, step, account[0] is not None)
        return losses


class PartStep(WaitingRows):
    """Steps of Gaussians whose colors are not on the device: near() finds those that a camera may show, and
    the call moves them, in tensors of their own, as TrainStep does. What becomes of these is the caller's
    affair, and so are the colors of the others. Pairs of tile and splat are counted first.
    """

    @torch.no_grad()
    def near(
        self,
        geometry: Kinds,  # of all: means, opacities, scales, quats
        beta2: float,
        eps: float,
        step: int,  # that comes
        world_to_camera: Tensor,
        K: Tensor,
        width: int,
        height: int,
    ) -> Tensor | None:
        """Which rows, rising [V]. They have caught up with the steps before this one. None where nothing
        waits."""
        self._waiting, self._missed = self._account(len(geometry[0][0]), step)
        if self._waiting is None:
            return None
        self._rows = *geometry, beta2, eps
        self._note(*self._rows, step - 1, True)
        behind = *self._rows, step - 1, self._waiting, self._missed
        return torch.ops.tilesplat.near_rows(*behind, world_to_camera, K, width, height).nonzero()[:, 0]

    @torch.no_grad()
    def __call__(
        self,
        rows: Tensor,
        parts: Kinds,  # of these rows: means, sh_dc, sh_rest and so on, as in TrainStep
        lrs: list[float],
        betas: tuple[float, float],
        eps: float,
        step: int,
        world_to_camera: Tensor,
        K: Tensor,
        background: Tensor,
        target: Tensor,
        mask: Tensor | None,
        *,
        sh_degree: int,
        antialiasing: bool,
        lambda_dssim: float,
        stats: ScreenStats | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns [loss, L1 loss, 1, 0], and which rows have moved [V]."""
        losses = torch.zeros(4, device=self.device)
        sums = (stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum) if stats else (None, None, None)
        moved_at = None if self._waiting is None else torch.full_like(rows, step - 1, dtype=torch.int32)
        adam = *parts, lrs, *betas, eps, step
        photo = world_to_camera, K, background, target, mask
        how = sh_degree, antialiasing, lambda_dssim, *sums, losses, 0, None
        torch.ops.tilesplat.train_step(*adam, *photo, *how, moved_at, self._missed)
        if self._waiting is None or moved_at is None:
            return losses, torch.ones_like(rows, dtype=torch.bool)
        self._waiting.index_copy_(0, rows, moved_at)
        self._note(*self._rows, step, True)
        return losses, moved_at == step
