"""The whole iteration in one native call: render, compare, backward and Adam.

The same kernels as behind render() and photometric_loss(), in the same order, but no gradient passes through
memory and the host only starts them. Whatever changes the loss or the image (exposures, depth maps, the
_python options, sparse Adam) goes through autograd instead; both ways give the same parameters.

Mind when you change the method: the call knows neither render() nor compare(), only what they do today. What
you write there, and gradients to cameras, need --no-fused. The log says which way a run goes.
"""

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, TrainStep
from torch import Tensor

from arguments import ModelParams, OptimizationParams, PipelineParams, RunParams
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel

ATTRIBUTES = ["xyz", "f_dc", "f_rest", "opacity", "scaling", "rotation"]  # of the native call, in its order


def can_fuse(
    gaussians: GaussianModel,
    model: ModelParams,
    opt: OptimizationParams,
    pipe: PipelineParams,
    run: RunParams,
) -> bool:
    """Do the model and these options leave the iteration as the native call knows it?"""
    plain_model = [group["name"] for group in gaussians.optimizer.param_groups] == ATTRIBUTES
    plain_loss = not model.train_test_exp and not model.depths
    plain_render = not (pipe.convert_SHs_python or pipe.compute_cov3D_python)
    debugged = pipe.debug or run.debug_from >= 0 or run.detect_anomaly
    plain = plain_model and plain_loss and plain_render and opt.optimizer_type == "default"
    return run.fused and plain and not debugged


class FusedIteration:
    """Takes one step per call."""

    def __init__(self, views: int, opt: OptimizationParams, pipe: PipelineParams, device: torch.device):
        self._step = TrainStep(views, device)
        self._lambda = opt.lambda_dssim
        self._antialiasing = pipe.antialiasing

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
