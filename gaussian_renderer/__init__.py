"""From Gaussians and a camera to a picture. The only caller of the rasterizer.

The parameters go in as they are stored (raw=True: log scales, opacity logits, quaternions of any length):
activations and their derivatives are fused into the kernels. The two --..._python options take the same step
out of the kernels and into PyTorch, where it can be read and changed.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diff_gaussian_rasterization import Rendered, ScreenStats, rasterize
from torch import Tensor

from arguments import PipelineParams
from scene.gaussian_model import GaussianModel
from utils.geometry import camera_center, covariances
from utils.losses import apply_exposure
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

    camera: anything with world_to_camera [4, 4], K [3, 3], width and height. background [3]. `stats`, if
    given, is added to in backward: what densification decides by. override_color [N, 3] takes the place of
    the model's colors.
    """
    inputs: dict[str, Any] = dict(
        means=gaussians.xyz,
        opacities=gaussians.opacity,
        **_shape(gaussians, pipe, scaling_modifier),
        **_color(gaussians, pipe, camera, override_color),
        world_to_camera=camera.world_to_camera,
        K=camera.K,
        width=camera.width,
        height=camera.height,
        background=background,
        sh_degree=gaussians.active_sh_degree,
        scale_modifier=scaling_modifier,
        antialiasing=pipe.antialiasing,
        raw=True,
    )
    if pipe.debug:
        return _rasterize_or_keep(inputs, stats)
    return rasterize(**inputs, stats=stats)


def _shape(gaussians: GaussianModel, pipe: PipelineParams, scaling_modifier: float) -> dict:
    if pipe.compute_cov3D_python:
        cov3d = covariances(gaussians.scales, gaussians.quats, scaling_modifier)
        return dict(quats=None, scales=None, cov3d=cov3d)
    return dict(quats=gaussians.rotation, scales=gaussians.scaling)


def _color(gaussians: GaussianModel, pipe: PipelineParams, camera, override_color: Tensor | None) -> dict:
    if override_color is not None:
        return dict(colors=override_color)
    if pipe.convert_SHs_python:
        coefficients = torch.cat([gaussians.f_dc, gaussians.f_rest], dim=1)
        center = camera_center(camera.world_to_camera)
        return dict(colors=sh_to_colors(gaussians.active_sh_degree, coefficients, gaussians.xyz, center))
    return dict(sh_dc=gaussians.f_dc, sh_rest=gaussians.f_rest)


def _rasterize_or_keep(inputs: dict, stats: ScreenStats | None) -> Rendered:
    """--debug: wait for the result, and if the rasterizer fails, leave its inputs in a file for a bug
    report."""
    try:
        rendered = rasterize(**inputs, stats=stats)
        if rendered.image.is_cuda:
            torch.cuda.synchronize(rendered.image.device)
    except RuntimeError as error:
        kept = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        torch.save(kept, SNAPSHOT)
        raise RuntimeError(f"{error}\n(the rasterizer's inputs are in {Path(SNAPSHOT).resolve()})") from error
    return rendered


class Pair(NamedTuple):
    """What a trained view is judged by."""

    image: Tensor  # [3, H, W] float, not clamped
    truth: Tensor  # [3, H, W] uint8
    mask: Tensor | None  # [H, W] float, 1 where the photo counts; None: everywhere


@torch.no_grad()
def render_pair(
    camera, gaussians: GaussianModel, pipe: PipelineParams, background: Tensor, train_test_exp: bool = False
) -> Pair:
    """Render a view and put its photo beside it.

    With train_test_exp the image's exposure is applied, and both are cut to the right half: the left half of
    a test view was trained on, for its exposure.
    """
    image, truth, mask = render(camera, gaussians, pipe, background).image, camera.image(), camera.counts()
    if train_test_exp:
        image = apply_exposure(image, gaussians.exposure(camera.name))
        half = image.shape[-1] // 2
        image, truth = image[..., half:], truth[..., half:]
        mask = None if mask is None else mask[:, half:]
    return Pair(image, truth, mask)
