"""The iteration of Gaussians whose colors are on the host, in a few native calls.

The step of fused.py, of those Gaussians that the camera may show, in tensors of their own. The others wait:
geometry for some hundred steps at most, as without --offload, and colors as scene/color_table.py says.
"""

from collections.abc import Callable

import torch
from diff_gaussian_rasterization import PartStep, ScreenStats
from diff_gaussian_rasterization.training import Kinds
from torch import Tensor

from arguments import Options
from gaussian_renderer.fused import ATTRIBUTES, FusedIteration
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.offload import Offloaded, add_statistics

GEOMETRY = [i for i, name in enumerate(ATTRIBUTES) if name not in Offloaded.on_host]


class OffloadedIteration(FusedIteration):
    """Of steps that are made of more views, gradients are collected elsewhere."""

    def __init__(self, views: int, options: Options, device: torch.device):
        super().__init__(views, options, device)
        self._part = PartStep(device)

    def _collect(self, move: bool, gaussians: GaussianModel, call: Callable) -> None:
        return None

    def _native(
        self,
        view: int,
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
        *counted,
    ) -> Tensor:
        assert isinstance(gaussians, Offloaded)
        params, avgs, squares, lrs, betas, eps, step = counted
        whole = params, avgs, squares
        place = camera.world_to_camera, camera.K
        geometry = _geometry(params), _geometry(avgs), _geometry(squares)
        size = camera.width, camera.height
        gaussians.settle_with(self._part.settle)
        rows = self._part.near(geometry, betas[1], eps, step, *place, *size)
        still = None
        if rows is None:  # then the others move here
            rows = gaussians.rows_near(camera)
            still = torch.zeros(max(value.numel() for value in geometry[0]), device=rows.device)
        fetched, parts = gaussians.taken(rows, whole)
        absolute = stats is not None and stats.abs_grad_norm_sum is not None
        own = None if stats is None else ScreenStats.zeros(len(rows), rows.device, absolute)
        losses, moved = self._part(
            rows,
            parts,
            lrs,
            betas,
            eps,
            step,
            *place,
            background,
            camera.image(),
            camera.mask(),
            sh_degree=gaussians.active_sh_degree,
            antialiasing=self._antialiasing,
            lambda_dssim=self._lambda,
            stats=own,
        )
        if still is not None:
            _move_by_moments(geometry, still, _geometry(lrs), betas, eps, step)
        gaussians.put_back(fetched, moved, parts, whole)
        if stats is not None and own is not None:
            add_statistics(rows, own, stats)
        return losses

    @torch.no_grad()
    def loss(self, views: list[int], camera: Camera, gaussians: GaussianModel, background: Tensor) -> Tensor:
        return super().loss(views, camera, gaussians.seen_by(camera)[0], background)


def _geometry(of: list) -> list:
    return [of[i] for i in GEOMETRY]


@torch.no_grad()
def _move_by_moments(
    geometry: Kinds, still: Tensor, lrs: list[float], betas: tuple, eps: float, step: int
) -> None:
    """A step of Adam with gradients of zero, of which there are enough in `still`."""
    params, avgs, squares = geometry
    grads = [still[: value.numel()].view_as(value) for value in params]
    torch.ops.tilesplat.adam_step(params, grads, avgs, squares, lrs, *betas, eps, step, None)
