"""The whole iteration in one native call: render, compare, backward and Adam.

The same kernels as behind render() and photometric_loss(), in the same order, but no gradient passes through
memory and the host only starts them. The call knows the published step and nothing else. So it is taken only
where the options ask for no more (can_fuse), and now and then its loss is compared with that of render() and
the loss terms: after an edit of those they differ, and the run goes on in separate steps.
"""

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, TrainStep, photometric_loss, rasterize
from torch import Tensor

from arguments import Options
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel

ATTRIBUTES = ["means", "sh_dc", "sh_rest", "opacity_logits", "log_scales", "raw_quats"]  # in the call's order


def can_fuse(gaussians: GaussianModel, options: Options) -> bool:
    """Do the model and these options leave the iteration as the native call knows it?"""
    _, opt, pipe, run, _ = options
    plain_model = [group["name"] for group in gaussians.optimizer.param_groups] == ATTRIBUTES
    plain_render = not (pipe.convert_SHs_python or pipe.compute_cov3D_python)
    debugged = pipe.debug or run.debug_from >= 0 or run.detect_anomaly
    return run.fused and plain_model and plain_render and opt.optimizer_type == "default" and not debugged


class FusedIteration:
    """Takes one step per call."""

    def __init__(self, views: int, options: Options, device: torch.device):
        self._step = TrainStep(views, device)
        self._lambda = options.opt.lambda_dssim
        self._antialiasing = options.pipe.antialiasing

    @property
    def skipped(self) -> int:
        """Steps that were not taken, as their views wanted more room than was made: see TrainStep."""
        return self._step.skipped

    def __call__(
        self,
        view: int,
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
    ) -> Tensor:
        """Learn from one camera, the view-th of training. Returns loss and L1 loss, on the device."""
        target, mask = camera.image(), camera.mask()
        optimizer = gaussians.optimizer
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        try:
            losses = self._step(
                *counted,
                view=view,
                world_to_camera=camera.world_to_camera,
                K=camera.K,
                background=background,
                target=target,
                mask=mask,
                sh_degree=gaussians.active_sh_degree,
                antialiasing=self._antialiasing,
                lambda_dssim=self._lambda,
                stats=stats,
            )
        except (RuntimeError, MemoryError):  # out of memory: nothing has moved
            optimizer.take_step_back()
            self._step.forget(view)
            raise
        gaussians.settle_with(self._step.settle)
        return losses

    @torch.no_grad()
    def loss(self, camera: Camera, gaussians: GaussianModel, background: Tensor) -> Tensor:
        """The loss that the native call finds, from the operators that it is made of. Nothing moves."""
        rendered = rasterize(
            *(gaussians.params[name] for name in ("means", "raw_quats", "log_scales", "opacity_logits")),
            sh_dc=gaussians.params["sh_dc"],
            sh_rest=gaussians.params["sh_rest"],
            world_to_camera=camera.world_to_camera,
            K=camera.K,
            width=camera.width,
            height=camera.height,
            background=background,
            sh_degree=gaussians.active_sh_degree,
            antialiasing=self._antialiasing,
            raw=True,
        )
        return photometric_loss(rendered.image, camera.image(), self._lambda, camera.mask())[0]
