"""The finest detail that photos can tell, as a smallest size of Gaussians (Mip-Splatting, Yu et al. 2024).

A Gaussian that is seen best from distance d with focal length f cannot be known finer than d / f, the size of
a pixel there. Blurred by that much, it looks the same when a view comes closer than any photo.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scene.cameras import Camera

VARIANCE = 0.2  # of the blur, in pixels²
NEAR = 0.2  # nearer centers do not count,
MARGIN = 0.15  # nor do those that are farther outside the picture, as a part of its size


@torch.no_grad()
def smallest_scales(means: Tensor, cameras: "Sequence[Camera]") -> Tensor:
    """[N]: standard deviation of the blur of each Gaussian. What no camera sees is as if farthest away."""
    nearest = torch.full_like(means[:, 0], torch.inf)
    for camera in cameras:
        nearest = torch.minimum(nearest, _distances(means, camera))
    seen = nearest.isfinite()
    farthest = nearest.where(seen, 0).amax() if len(means) else nearest.sum()
    focal = torch.stack([camera.K[0, 0] for camera in cameras]).amax()
    return VARIANCE**0.5 * nearest.where(seen, farthest) / focal


def _distances(means: Tensor, camera: "Camera") -> Tensor:
    """[N] along the axis of the camera; infinite where it sees nothing."""
    matrix = camera.world_to_camera
    x, y, z = (means @ matrix[:3, :3].T + matrix[:3, 3]).unbind(1)
    across = camera.K[0, 0] * x / z + camera.K[0, 2]
    down = camera.K[1, 1] * y / z + camera.K[1, 2]
    width, height = camera.width, camera.height
    inside = (across >= -MARGIN * width) & (across <= (1 + MARGIN) * width)
    inside &= (down >= -MARGIN * height) & (down <= (1 + MARGIN) * height)
    return z.where((z > NEAR) & inside, torch.inf)


def blurred(scales: Tensor, opacities: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [N, 3] and opacities [N, 1] of Gaussians that are blurred by `smallest` [N]: as much of them,
    spread out."""
    wider = (scales**2 + smallest[:, None] ** 2).sqrt()
    return wider, opacities * (scales / wider).prod(dim=1, keepdim=True)
