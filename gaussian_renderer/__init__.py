"""From Gaussians and a camera to a picture. The only caller of the rasterizer.

The parameters go in as they are stored (raw=True: log scales, opacity logits, quaternions of any length):
activations and their derivatives are fused into the kernels. If the model's activations were edited, what
they say goes in instead. The two --..._python options take the same step out of the kernels and into PyTorch,
where it can be read and changed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diff_gaussian_rasterization import Rendered, ScreenStats, rasterize, rasterize_views
from torch import Tensor

from arguments import PipelineParams
from scene.gaussian_model import GaussianModel
from utils.geometry import camera_center, covariances
from utils.sh import sh_to_colors

SNAPSHOT = "snapshot_fw.dump"


def render(
    camera,
    gaussians: GaussianModel,
    pipe: PipelineParams,
    background: Tensor,
    scaling_modifier: float = 1.0,
    stats: ScreenStats | None = None,
    override_color: Tensor | None = None,
) -> Rendered:
    """One view of the Gaussians, before exposure and not clamped.

    camera: anything with world_to_camera [4, 4] or, of several views at once, [C, 4, 4], K [3, 3], width and
    height. background [3]. `stats`, if
    given, is added to in backward: what densification decides by. override_color [N, 3] takes the place of
    the model's colors.
    """
    part, stats = gaussians.seen_by(camera, scaling_modifier, stats)
    override_color = None if override_color is None else override_color[part.rows]
    inputs: dict[str, Any] = dict(
        means=part.means,
        **shape_of(part, pipe, scaling_modifier),
        **_color(part, pipe, camera, override_color),
        world_to_camera=camera.world_to_camera,
        K=camera.K,
        width=camera.width,
        height=camera.height,
        background=background,
        sh_degree=gaussians.active_sh_degree,
        scale_modifier=scaling_modifier,
        antialiasing=pipe.antialiasing,
    )
    rendered = _rasterize_or_keep(inputs, stats) if pipe.debug else _rasterized(inputs, stats)
    return rendered._replace(radii=gaussians.spread(part, rendered.radii))


def _rasterized(inputs: dict, stats: ScreenStats | None) -> Rendered:
    several = inputs["world_to_camera"].dim() == 3
    return (rasterize_views if several else rasterize)(**inputs, stats=stats)


def shape_of(gaussians: GaussianModel, pipe: PipelineParams, scaling_modifier: float) -> dict:
    raw = gaussians.standard_activations() and gaussians.smallest is None
    scales, opacities = (gaussians.log_scales, gaussians.opacity_logits) if raw else gaussians.shown()
    if pipe.compute_cov3D_python:
        cov3d = covariances(gaussians.shown()[0], gaussians.quats, scaling_modifier)
        return dict(quats=None, scales=None, cov3d=cov3d, opacities=opacities, raw=raw)
    if raw:
        return dict(quats=gaussians.raw_quats, scales=scales, opacities=opacities, raw=True)
    return dict(quats=gaussians.quats, scales=scales, opacities=opacities, raw=False)


def _color(gaussians: GaussianModel, pipe: PipelineParams, camera, override_color: Tensor | None) -> dict:
    if override_color is not None:
        return dict(colors=override_color)
    if pipe.convert_SHs_python:
        coefficients = torch.cat([gaussians.sh_dc, gaussians.sh_rest], dim=1)
        center = camera_center(camera.world_to_camera)
        return dict(colors=sh_to_colors(gaussians.active_sh_degree, coefficients, gaussians.means, center))
    return dict(sh_dc=gaussians.sh_dc, sh_rest=gaussians.sh_rest)


def _rasterize_or_keep(inputs: dict, stats: ScreenStats | None) -> Rendered:
    """--debug: wait for the result, and if the rasterizer fails, leave its inputs in a file for a bug
    report."""
    try:
        rendered = _rasterized(inputs, stats)
        if rendered.image.is_cuda:
            torch.cuda.synchronize(rendered.image.device)
    except RuntimeError as error:
        kept = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        torch.save(kept, SNAPSHOT)
        raise RuntimeError(f"{error}\n(the rasterizer's inputs are in {Path(SNAPSHOT).resolve()})") from error
    return rendered


class Splats:
    """Gaussians as a scene representation: what training, evaluation and render.py ask of a model."""

    at_once = 1  # photos that all processes show together

    def __init__(self, gaussians: GaussianModel, pipe: PipelineParams, background: Tensor):
        self.gaussians, self.pipe, self.background = gaussians, pipe, background

    def __len__(self) -> int:
        return len(self.gaussians)

    def picture(self, camera, background: Tensor | None = None, stats: ScreenStats | None = None) -> Rendered:
        background = self.background if background is None else background
        return render(camera, self.gaussians, self.pipe, background, stats=stats)

    def pictures(
        self, cameras: list, background: Tensor | None = None, stats: ScreenStats | None = None
    ) -> list[Rendered]:
        """From several places with one lens: to the last bit what they are one by one, but in one call."""
        if len(cameras) == 1 or self.pipe.convert_SHs_python:  # these colors are of one place
            return [self.picture(camera, background, stats) for camera in cameras]
        places = torch.stack([camera.world_to_camera for camera in cameras])
        views = self.picture(replace(cameras[0], world_to_camera=places), background, stats)
        return [Rendered(*parts) for parts in zip(*(part.unbind() for part in views))]

    def mean(self, values: Tensor) -> Tensor:
        """Over all Gaussians, of values [N, n] with a row for each of those here: for a term of the loss."""
        return values.mean()
