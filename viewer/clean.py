"""What the views show of each splat; and floaters, which hang in front of cameras or far from everything."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from diff_gaussian_rasterization import knn_mean_dist2
from torch import Tensor

from arguments import PipelineParams
from scene import edit
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from strategies.scores import scores
from viewer.cameras import Views
from viewer.pictures import resized

FEW_VIEWS = 3
HUGE = 0.999  # of the splats have no longer axis
SEEN = 1.0  # pixel's worth, from which on a view counts as one that shows a splat


class Level(NamedTuple):
    part: float  # a splat that has no more than this in any view, in pixels, is not needed
    alone: float  # as many times the usual distance to its neighbors
    faint: float  # opacity


LEVELS = {
    "conservative": Level(1 / 255, 10.0, 0.05),
    "balanced": Level(0.1, 5.0, 0.1),
    "aggressive": Level(0.5, 3.0, 0.2),
}


def parts(gaussians: GaussianModel, cameras: list[Camera], pipe: PipelineParams) -> Iterator[Tensor]:
    """Of each view: how many pixels' worth of it each splat is, [N]."""
    for camera in cameras:
        yield scores(gaussians, camera, pipe).weight_sum


@torch.no_grad()
def shown(gaussians: GaussianModel, views: Views, most: int = 0) -> Tensor:
    """[N]: how much of the train views each splat of the data set's frame is. `most`: pixels of a side that
    are enough to tell, if given."""
    total = torch.zeros(len(gaussians), device=gaussians.device)
    longest = [max(camera.width, camera.height) for camera in views.train]
    cameras = [resized(c, min(1.0, most / side)) if most else c for c, side in zip(views.train, longest)]
    for part in parts(edit.into(gaussians, views.frame), cameras, views.pipe):
        total += part
    return total


def floaters(
    gaussians: GaussianModel, cameras: list[Camera], pipe: PipelineParams, level: str
) -> dict[str, Tensor]:
    """Masks [N] of splats to drop, by reason. Cameras: all that the model was trained from."""
    if not len(gaussians):
        return {}
    limits, most = LEVELS[level], torch.zeros(len(gaussians), device=gaussians.device)
    shown_by = torch.zeros_like(most)
    for part in parts(gaussians, cameras, pipe):
        most = torch.maximum(most, part)
        shown_by += part > SEEN
    with torch.no_grad():
        distance = knn_mean_dist2(gaussians.means).sqrt()
        longest = gaussians.scales.amax(1)
        huge = longest > longest.kthvalue(1 + int(HUGE * (len(longest) - 1))).values
        return {
            "show in no train view": most <= limits.part,
            "are alone and in few views": (distance > limits.alone * distance.median())
            & (shown_by < FEW_VIEWS),
            "are huge and faint": huge & (gaussians.opacities[:, 0] < limits.faint),
        }
