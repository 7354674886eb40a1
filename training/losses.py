"""What training minimizes: the sum of the terms in a list (Trainer.losses).

A term is a function of the picture, the camera that took the photo, the trainer and the iteration, and
returns a scalar. It may show() parts of it beside the loss. The published loss is the first of them:
(1 - lambda) * L1 + lambda * (1 - SSIM)  (paper, equation 7).
"""

from typing import TYPE_CHECKING

from diff_gaussian_rasterization import Rendered, photometric_loss
from torch import Tensor

from scene.cameras import Camera
from utils.schedules import log_linear

if TYPE_CHECKING:
    from training.trainer import Trainer


def photometric(picture: Rendered, camera: Camera, trainer: "Trainer", iteration: int) -> Tensor:
    """The picture against the photo, where that counts.

    photometric_loss clamps the picture to [0, 1], as whoever looks at it will.
    """
    loss, l1 = photometric_loss(picture.image, camera.image(), trainer.opt.lambda_dssim, camera.mask())
    trainer.show(l1=l1)
    return loss


def depth(picture: Rendered, camera: Camera, trainer: "Trainer", iteration: int) -> Tensor | float:
    """The inverse depth against the view's depth map, if it has one to trust."""
    opt, known = trainer.opt, camera.inv_depth()
    weight = log_linear(iteration, opt.depth_l1_weight_init, opt.depth_l1_weight_final, opt.iterations)
    if known is None or weight == 0:
        return 0.0
    loss = weight * inverse_depth_loss(picture.inv_depth, *known)
    trainer.show(depth=loss)
    return loss


def mean_opacity(picture: Rendered, camera: Camera, trainer: "Trainer", iteration: int) -> Tensor:
    return trainer.opt.opacity_reg * trainer.splats.mean(trainer.gaussians.opacities)


def mean_scale(picture: Rendered, camera: Camera, trainer: "Trainer", iteration: int) -> Tensor:
    return trainer.opt.scale_reg * trainer.splats.mean(trainer.gaussians.scales)


def inverse_depth_loss(rendered: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all pixels of |rendered - target| * mask.

    rendered [1, H, W] is the blended inverse depth, not divided by alpha, as in the published code;
    target [H, W] in the same unit (1 / scene unit); mask [H, W] is 0 where the target is not to be trusted.
    """
    difference = (rendered.squeeze(0) - target).abs()
    return (difference if mask is None else difference * mask).mean()
