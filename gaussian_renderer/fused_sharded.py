"""The iteration of several processes on GPUs, a view in each, in a few native calls.

The same kernels as in fused.py, with two exchanges between them: what the cameras see goes to where it is
blended, and its gradients go back. The host waits for the GPU once, for the sizes of the first exchange, and
once while splats are sorted. What the step is not made for, sharded.py does.
"""

import math

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats
from diff_gaussian_rasterization.dealt import DealtStep
from torch import Tensor

from arguments import Options
from distributed import Ranks, exchange, exchanged
from gaussian_renderer.fused import FusedIteration, can_fuse
from gaussian_renderer.fused_offload import OffloadedIteration
from scene.cameras import Camera, narrower
from scene.gaussian_model import GaussianModel

SPARE = 1.1  # room for records that come, relative to the most there have been


class ShardedIteration:
    """Its calls must be made by all processes together."""

    skipped = 0

    def __init__(self, cameras: list[Camera], ranks: Ranks, options: Options, device: torch.device):
        self._cameras = cameras
        self._coarse: dict[tuple[int, int], Camera] = {}  # cameras with photos so many times smaller
        self._ranks, self._step = ranks, DealtStep(ranks.rank, ranks.count, device)
        self._share = 0.0  # of all Gaussians: so many records may come to a process
        self._lambda = options.opt.lambda_dssim
        self._antialiasing = options.pipe.antialiasing
        self._weights = options.opt.opacity_reg, options.opt.scale_reg

    def __call__(
        self,
        views: list[int],
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
        move: bool = True,
    ) -> Tensor | None:
        """Learn from these views, one in each process. Returns loss and L1 loss of one's own, on the device;
        or None if the step is made of more views, whose gradients are collected elsewhere."""
        if not move or gaussians.collected:
            return None
        optimizer = gaussians.optimizer
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        absolute = stats is not None and stats.abs_grad_norm_sum is not None
        try:
            records, *way = self._exchanged(views, camera, gaussians, counted)
            losses, grads = self._compare(records, way[0], camera, background, absolute)
            grads = exchanged(self._ranks, grads, *way)  # from here on nothing can fail in one of them alone
        except BaseException:  # nothing has moved
            optimizer.take_step_back()
            raise
        opacity, scale = (weight / max(gaussians.total, 1) for weight in self._weights)
        self._step.move(grads, stats, (opacity, scale / 3))
        gaussians.settle_with(self._step.settle)
        return losses

    def _exchanged(
        self, views: list[int], camera: Camera, gaussians: GaussianModel, counted: tuple
    ) -> tuple[Tensor, list[int], list[int]]:
        """What one's own camera sees; how many records are from each process, and how many went there."""
        cameras = [self._camera(view, camera.coarseness) for view in views]
        records, counts = self._step.project(
            *counted,
            world_to_camera=[seen.world_to_camera for seen in cameras],
            K=[seen.K for seen in cameras],
            sizes=[(seen.width, seen.height) for seen in cameras],
            sh_degree=gaussians.active_sh_degree,
            antialiasing=self._antialiasing,
            waits=not any(self._weights),
        )
        room = self._room(records, gaussians.total)  # memory may run out here: before all meet
        numbers = self._ranks.meet("records", *counts)
        most = max(map(sum, zip(*numbers)))
        if most > len(room):  # so all of them know
            self._share, room = SPARE * most / gaussians.total, None
            room = self._room(records, gaussians.total)
            self._ranks.meet("room")
        expected = [row[self._ranks.rank] for row in numbers]
        received = room[: sum(expected)]
        exchange(received, records, counts, expected)
        return received, expected, counts

    def _room(self, records: Tensor, total: int) -> Tensor:
        return records.new_empty(math.ceil(self._share * total), records.shape[1])

    def _camera(self, view: int, coarseness: int) -> Camera:
        """Of which the photo is not needed: another process has it."""
        if coarseness == 1:
            return self._cameras[view]
        which = view, coarseness
        if which not in self._coarse:
            self._coarse[which] = narrower(self._cameras[view], coarseness)
        return self._coarse[which]

    def _compare(
        self,
        records: Tensor,
        counts: list[int],
        camera: Camera,
        background: Tensor,
        absolute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        lists = self._step.lists(records, counts, camera.width, camera.height)
        photo = background, camera.image(), camera.mask(), self._lambda
        return self._step.compare(lists, *photo, absolute)

    @torch.no_grad()
    def loss(self, views: list[int], camera: Camera, gaussians: GaussianModel, background: Tensor) -> Tensor:
        """The loss that the native calls find. Nothing moves."""
        optimizer = gaussians.optimizer
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        optimizer.take_step_back()
        records, expected, _ = self._exchanged(views, camera, gaussians, counted)
        opacity, scale = self._weights
        part = self._ranks.count / max(gaussians.total, 1)  # as ShardedSplats.mean()
        held = opacity * gaussians.opacities.sum() + scale * gaussians.scales.sum() / 3
        return self._compare(records, expected, camera, background)[0][0] + part * held


Native = FusedIteration | ShardedIteration


def native_step(gaussians: GaussianModel, cameras: list[Camera], options: Options) -> Native | None:
    """Of one process or of several, if the native library has one that does what these options ask for."""
    ranks, device = gaussians.ranks, gaussians.device
    if not can_fuse(gaussians, options):
        return None
    if gaussians.on_host:
        regularized = options.opt.opacity_reg or options.opt.scale_reg  # so nothing could wait
        return None if regularized else OffloadedIteration(len(cameras), options, device)
    if ranks.alone:
        return FusedIteration(len(cameras), options, device)
    ordered = torch.are_deterministic_algorithms_enabled()
    return (
        ShardedIteration(cameras, ranks, options, device) if device.type == "cuda" and not ordered else None
    )
