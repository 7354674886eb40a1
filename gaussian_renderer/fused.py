"""The whole iteration in one native call: render, compare, backward and Adam.

The same kernels as behind render() and photometric_loss(), in the same order, but no gradient passes through
memory and the host only starts them. Around the call there are steps of several views and the regularizers of
opacities and scales. It knows nothing else. So it is taken only where the options ask for no more (can_fuse),
and now and then its loss is compared with that of render() and the loss terms: after an edit of those they
differ, and the run goes on in separate steps.
"""

from collections.abc import Callable
from functools import partial

import torch
from diff_gaussian_rasterization import FusedAdam, ScreenStats, TrainStep, photometric_loss, rasterize
from torch import Tensor

from arguments import Options
from scene.cameras import LEVELS, Camera
from scene.gaussian_model import GaussianModel

ATTRIBUTES = ["means", "sh_dc", "sh_rest", "opacity_logits", "log_scales", "raw_quats"]  # in the call's order


def can_fuse(gaussians: GaussianModel, options: Options) -> bool:
    """Do the model and these options leave the iteration as the native call knows it?"""
    _, opt, pipe, run, *_ = options
    plain_model = [group["name"] for group in gaussians.optimizer.param_groups] == ATTRIBUTES
    plain_render = not (pipe.convert_SHs_python or pipe.compute_cov3D_python or pipe.filter_3d)
    debugged = pipe.debug or run.debug_from >= 0 or run.detect_anomaly
    return run.fused and plain_model and plain_render and opt.optimizer_type == "default" and not debugged


class FusedIteration:
    """Takes one step per call, or collects the gradients of one view more for a step of several.

    The native call moves parameters; it does not hand out gradients. But moments that were zero tell them:
    with beta1 = 0 the first moment is the gradient, and with (n - 1) / n it is the mean over n views. So what
    is to have its step elsewhere gets other moments and a learning rate of zero.
    """

    def __init__(self, views: int, options: Options, device: torch.device):
        opt = options.opt
        self._step = TrainStep(views * LEVELS, device)
        self._views = views
        self._lambda = opt.lambda_dssim
        self._antialiasing = options.pipe.antialiasing
        self._regularizers = {"opacity_logits": opt.opacity_reg, "log_scales": opt.scale_reg}
        self._regularized = [name for name, weight in self._regularizers.items() if weight > 0]
        self._squares: list[Tensor] = []  # second moments that nobody needs
        self._number = 0  # of the native call

    @property
    def skipped(self) -> int:
        """Steps that were not taken, as their views wanted more room than was made: see TrainStep."""
        return self._step.skipped

    def __call__(
        self,
        views: list[int],
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
        move: bool = True,
    ) -> Tensor | None:
        """Learn from one camera, that of the one view; the step comes with the last view of those that
        share one (`move`). Returns loss and L1 loss, on the device; None if that is done elsewhere."""
        view = views[0] + (camera.coarseness.bit_length() - 1) * self._views  # its splats cover fewer tiles
        call = partial(self._native, view, camera, gaussians, background, stats)
        way = self._step_now if move and not gaussians.collected else partial(self._collect, move)
        try:
            return way(gaussians, call)
        except (RuntimeError, MemoryError):  # out of memory: nothing has moved
            self._step.forget(view)
            raise

    def _native(
        self,
        view: int,
        camera: Camera,
        gaussians: GaussianModel,
        background: Tensor,
        stats: ScreenStats | None,
        *counted,
    ) -> Tensor:
        gaussians.settle_with(self._step.settle)
        return self._step(
            *counted,
            view=view,
            world_to_camera=camera.world_to_camera,
            K=camera.K,
            background=background,
            target=camera.image(),
            mask=camera.mask(),
            sh_degree=gaussians.active_sh_degree,
            antialiasing=self._antialiasing,
            lambda_dssim=self._lambda,
            stats=stats,
        )

    def _step_now(self, gaussians: GaussianModel, call: Callable) -> Tensor:
        optimizer, pulls = gaussians.optimizer, self._pulls(gaussians)
        assert isinstance(optimizer, FusedAdam)
        counted = optimizer.begin_step()
        try:
            if counted[-1] != self._number + 1:  # rows may be waiting for steps of another count
                gaussians.settle()
            losses = self._with_own_step(pulls, counted, call) if pulls else call(*counted)
        except (RuntimeError, MemoryError):
            optimizer.take_step_back()
            raise
        self._number = counted[-1]
        return losses

    @torch.no_grad()
    def _pulls(self, gaussians: GaussianModel) -> dict[str, Tensor]:
        """Gradients of the regularizers, weight times the mean of opacities and of scales."""
        slopes = {"opacity_logits": lambda raw: raw.sigmoid() * (-raw).sigmoid(), "log_scales": torch.exp}
        raw = {name: gaussians._params[name] for name in self._regularized}
        return {
            name: slopes[name](value).mul_(self._regularizers[name] / max(value.numel(), 1))
            for name, value in raw.items()
        }

    def _with_own_step(self, pulls: dict[str, Tensor], counted: tuple, call: Callable) -> Tensor:
        """Of all parameters by the native call, but these by Adam, with the regularizers' gradients."""
        params, avgs, avg_sqs, lrs, (beta1, beta2), eps, step = counted
        grads, squares, rates, apart = list(avgs), list(avg_sqs), list(lrs), map(ATTRIBUTES.index, pulls)
        for i in (apart := list(apart)):
            grads[i], squares[i], rates[i] = torch.zeros_like(params[i]), torch.zeros_like(params[i]), 0.0
        losses = call(params, grads, squares, rates, (beta1, beta2), eps, step)
        for i, pull in zip(apart, pulls.values()):
            grads[i].div_(1 - beta1).add_(pull)
        own = ([values[i] for i in apart] for values in (params, grads, avgs, avg_sqs, lrs))
        torch.ops.tilesplat.adam_step(*own, beta1, beta2, eps, step, None)
        return losses

    def _collect(self, move: bool, gaussians: GaussianModel, call: Callable) -> Tensor | None:
        """The gradients of the parameters become the mean over one view more; then they may move."""
        if not gaussians.collected:
            for value in gaussians.params.values():
                value.grad = torch.zeros_like(value)
        params, group = list(gaussians._params.values()), gaussians.optimizer.param_groups[0]
        if [value.shape for value in self._squares] != [value.shape for value in params]:
            self._squares = [torch.zeros_like(value) for value in params]
        pulls = self._pulls(gaussians) if move else {}
        views, grads = gaussians.collected + 1, [value.grad for value in params]
        betas, rates = ((views - 1) / views, group["betas"][1]), [0.0] * len(params)
        leaves = [value.detach() for value in params]
        losses = call(leaves, grads, self._squares, rates, betas, group["eps"], self._number + 1)
        self._number, gaussians.collected = self._number + 1, views
        if move:
            self._step.settle()
            self._move_collected(gaussians, pulls)
        return losses

    def _move_collected(self, gaussians: GaussianModel, pulls: dict[str, Tensor]) -> None:
        assert isinstance(gaussians.optimizer, FusedAdam)
        gradients = gaussians.gradients()
        for name, pull in pulls.items():
            gradients[name].add_(pull)
        gaussians.optimizer.step()
        gaussians.forget_gradients()

    @torch.no_grad()
    def loss(self, views: list[int], camera: Camera, gaussians: GaussianModel, background: Tensor) -> Tensor:
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
        loss = photometric_loss(rendered.image, camera.image(), self._lambda, camera.mask())[0]
        opacity, scale = self._regularizers.values()
        means = gaussians.opacity_logits.sigmoid().mean(), gaussians.log_scales.exp().mean()
        return loss + opacity * means[0] + scale * means[1]
