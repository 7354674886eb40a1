"""The iteration of several processes on GPUs, a view in each, in a few native calls.

The same kernels as in fused.py, with two exchanges between them: what the cameras see goes to where it is
blended, and its gradients go back. The host waits for the GPU once, for the sizes of the first exchange, and
once while splats are sorted. What the step is not made for, sharded.py does.
"""

from dataclasses import dataclass

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats
from diff_gaussian_rasterization.dealt import DealtStep
from torch import Tensor

from arguments import Options
from distributed import Ranks, exchanged
from gaussian_renderer.fused import can_fuse
from scene.cameras import Camera, narrower
from scene.gaussian_model import GaussianModel


def can_fuse_sharded(gaussians: GaussianModel, options: Options) -> bool:
    """Do the model and these options leave the iteration as the native calls know it?"""
    opt, fixed = options.opt, torch.are_deterministic_algorithms_enabled()
    plain = not (opt.opacity_reg or opt.scale_reg or fixed) and gaussians.device.type == "cuda"
    return plain and can_fuse(gaussians, options)


@dataclass
class Exchanged:
    """Records that are in the process that blends them."""

    received: Tensor
    counts: list[int]  # of records that went to each process
    expected: list[int]  # that came from each


class ShardedIteration:
    """Its calls must be made by all processes together."""

    skipped = 0

    def __init__(self, cameras: list[Camera], ranks: Ranks, options: Options, device: torch.device):
        self._cameras = {camera.uid: camera for camera in cameras}
        self._seen: dict[tuple[int, int], Camera] = {}  # cameras with photos so many times smaller
        self._ranks, self._step = ranks, DealtStep(ranks.rank, ranks.count, device)
        self._lambda = options.opt.lambda_dssim
        self._antialiasing = options.pipe.antialiasing

    def __call__(
        self,
        view: int,
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
        move: bool = True,
    ) -> Tensor | None:
        """Learn from the cameras of all processes. Returns loss and L1 loss of one's own, on the device; or
        None if the step is made of more views, whose gradients are collected elsewhere."""
        if not move or gaussians.collected:
            return None
        optimizer = gaussians.optimizer
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        try:
            sent = self._exchange(camera, gaussians, counted)
            absolute = stats is not None and stats.abs_grad_norm_sum is not None
            losses, grads = self._compare(sent, camera, background, absolute)
            grads = exchanged(self._ranks, grads, sent.expected, sent.counts)
            self._ranks.meet("step")
        except BaseException:  # nothing has moved
            optimizer.take_step_back()
            raise
        self._step.move(grads, stats)
        gaussians.settle_with(self._step.settle)
        return losses

    def _exchange(self, camera: Camera, gaussians: GaussianModel, counted: tuple) -> Exchanged:
        shown = self._ranks.meet("views", camera.uid, camera.coarseness)
        cameras = [self._camera(*which) for which in shown]
        counts = self._step.project(
            *counted,
            world_to_camera=[seen.world_to_camera for seen in cameras],
            K=[seen.K for seen in cameras],
            sizes=[(seen.width, seen.height) for seen in cameras],
            sh_degree=gaussians.active_sh_degree,
            antialiasing=self._antialiasing,
        )
        expected = [row[self._ranks.rank] for row in self._ranks.meet("records", *counts)]
        received = exchanged(self._ranks, self._step.records(counts), counts, expected)
        return Exchanged(received, counts, expected)

    def _camera(self, uid: int, coarseness: int) -> Camera:
        """Without its photo, which another process may have."""
        which = uid, coarseness
        if which not in self._seen:
            self._seen[which] = narrower(self._cameras[uid], coarseness)
        return self._seen[which]

    def _compare(
        self, sent: Exchanged, camera: Camera, background: Tensor, absolute: bool = False
    ) -> tuple[Tensor, Tensor]:
        photo = background, camera.image(), camera.mask(), self._lambda
        return self._step.compare(sent.received, sent.expected, *photo, absolute)

    @torch.no_grad()
    def loss(self, camera: Camera, gaussians: GaussianModel, background: Tensor) -> Tensor:
        """The loss that the native calls find. Nothing moves."""
        optimizer = gaussians.optimizer
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        optimizer.take_step_back()
        return self._compare(self._exchange(camera, gaussians, counted), camera, background)[0][0]
