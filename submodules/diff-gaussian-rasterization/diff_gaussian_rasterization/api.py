"""TileSplat's own interface to the native rasterizer: typed, differentiable, the same on CPU and CUDA.

    out = rasterize(means, quats, scales, opacities, sh_dc=..., world_to_camera=..., K=..., width=..., ...)
    out.image, out.alpha, out.inv_depth, out.radii

The tensors' device chooses the backend: float32 on CUDA, float32 or float64 on the CPU. reference.py computes
the same in plain PyTorch, and says how. N Gaussians, H x W pixels; K-1 spherical harmonics per channel beyond
the constant one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.tilesplat
from ._autograd import once, taken, transformed
from .types import Rendered, ScreenStats, expect_tensors


def rasterize(
    means: Tensor,  # [N, 3]  world
    quats: Tensor | None,  # [N, 4]  w x y z
    scales: Tensor | None,  # [N, 3]  standard deviations
    opacities: Tensor,  # [N, 1] or [N]
    *,
    sh_dc: Tensor | None = None,  # [N, 1, 3]
    sh_rest: Tensor | None = None,  # [N, K-1, 3]
    colors: Tensor | None = None,  # [N, 3]
    cov3d: Tensor | None = None,  # [N, 6]  xx xy xz yy yz zz
    world_to_camera: Tensor,  # [4, 4]; for [C, 4, 4], see rasterize_views
    K: Tensor,  # [3, 3]  pixels
    width: int,
    height: int,
    background: Tensor,  # [3]
    sh_degree: int = 0,
    scale_modifier: float = 1.0,
    antialiasing: bool = False,
    raw: bool = False,
    camera_center: Tensor | None = None,  # [3]
    means2d: Tensor | None = None,  # [N, 3]
    stats: ScreenStats | None = None,
    near: float = 0.2,
) -> Rendered:
    """Render Gaussians from one camera.

    Shapes come from quats and scales, or from cov3d. Colors come from spherical harmonics up to `sh_degree`
    (sh_dc, and sh_rest above degree 0), or are given as `colors`.

    `world_to_camera` is rigid, acts on column vectors, and leads to x right, y down, z forward. `K` has the
    principal point in pixels, with the center of the first pixel at (0.5, 0.5): a centered camera has
    K[0, 2] = width / 2. `camera_center` is where the spherical harmonics look from; None derives it from
    world_to_camera.

    `raw`: scales are logarithms, opacities logits, and quats of any length; their activations happen in the
    kernel. Otherwise everything is used as it is; quaternions are not normalized. `scale_modifier` multiplies
    the scales. `antialiasing` dims small splats by as much as the pixel filter widens them. What is not
    farther than `near` in front of the camera is not drawn; the published distance is 0.2.

    Gradients flow to every Gaussian tensor, background and world_to_camera: for those that require it. No
    gradient reaches K and camera_center. `means2d` is only a carrier: its values are not read, and its
    gradient is that of the projected means in NDC units, third column 0. `stats` collects the same for
    densification. The images may be changed in place before the backward, radii and inputs not.
    """
    expect_tensors(
        means=means, quats=quats, scales=scales, opacities=opacities, sh_dc=sh_dc, sh_rest=sh_rest,
        colors=colors, cov3d=cov3d, world_to_camera=world_to_camera, K=K, background=background,
        camera_center=camera_center, means2d=means2d,
    )  # fmt: skip
    differentiable = (
        means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, background, means2d,
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    if means2d is not None and means2d.shape != means.shape:
        raise ValueError(f"means2d must be {list(means.shape)}, got {list(means2d.shape)}")
    settings = [width, height, sh_degree, scale_modifier, antialiasing, raw, stats, keep, near]
    draw = _Rasterize.apply if keep or transformed() else _Rasterize.forward
    return Rendered(*draw(*map(taken, (*differentiable, K, camera_center)), *settings)[:4])


# How many dimensions each of these has for one view; with one more, it is a tensor of its own for every view.
PER_VIEW = {
    "means": 2, "quats": 2, "scales": 2, "opacities": 2, "sh_dc": 3, "sh_rest": 3, "colors": 2, "cov3d": 2,
    "K": 2, "background": 1, "camera_center": 1, "means2d": 2,
}  # fmt: skip


def rasterize_views(*, world_to_camera: Tensor, **arguments) -> Rendered:
    """Several cameras in one call: world_to_camera [C, 4, 4], the other arguments of `rasterize` by name.

    Any tensor may have a first dimension more, [C, ...]: then each view has its own. Gradients of what the
    views share are summed; with `means.expand(C, -1, -1)` each view has its own. Images are stacked,
    [C, 3, H, W] and so on, and are to the last bit those of C calls.

    Where only cameras differ, a GPU draws views as if they were one picture, as many at a time as are no more
    work than one large picture: it waits for the host, and the host for it, no more often than for one view.
    """
    expect_tensors(world_to_camera=world_to_camera)
    count = len(world_to_camera)
    if world_to_camera.shape != (count, 4, 4) or count == 0:
        raise ValueError(f"world_to_camera must be [C, 4, 4], got {list(world_to_camera.shape)}")
    own = {
        name for name, dims in PER_VIEW.items()
        if isinstance(t := arguments.get(name), Tensor) and t.dim() == dims + 1
    }  # fmt: skip
    for name in own:
        if len(arguments[name]) != count:
            raise ValueError(f"{name} must have {count} views, got {len(arguments[name])}")
    if not own:
        return _rasterize_some(world_to_camera, **arguments)
    views = [
        rasterize(
            **arguments | {name: arguments[name][i] for name in own}, world_to_camera=world_to_camera[i]
        )
        for i in range(count)
    ]
    return Rendered(*(torch.stack(pictures) for pictures in zip(*views)))


TOGETHER = 1 << 22  # rows, or pixels, of the views that are drawn at the same time


def _rasterize_some(world_to_camera: Tensor, **arguments) -> Rendered:
    """All views at once, or in groups that take little memory beside what is kept of them anyway."""
    size = max(len(arguments["means"]), arguments["width"] * arguments["height"])
    most = 1 if torch.are_deterministic_algorithms_enabled() else max(TOGETHER // size, 1)
    if most >= len(world_to_camera):
        return rasterize(**arguments, world_to_camera=world_to_camera)
    groups = [rasterize(**arguments, world_to_camera=some) for some in world_to_camera.split(most)]
    return Rendered(*map(torch.cat, zip(*groups)))


class _Rasterize(torch.autograd.Function):
    """Inputs 0 to 10 are differentiable, in the order of rasterize_backward's gradients."""

    @staticmethod
    def forward(
        means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, background, means2d,
        K, camera_center, width, height, sh_degree, scale_modifier, antialiasing, raw, stats, keep, near,
    ):  # fmt: skip
        image, alpha, inv_depth, radii, state = torch.ops.tilesplat.rasterize(
            means, quats, scales, cov3d, opacities, sh_dc, sh_rest, colors, world_to_camera, K, camera_center,
            background, width, height, sh_degree, scale_modifier, antialiasing, raw, keep, near,
        )  # fmt: skip
        return image, alpha, inv_depth, radii, *state

    @staticmethod
    def setup_context(ctx, inputs, output):
        shape, world_to_camera, background, _, K, camera_center = inputs[:8], *inputs[8:13]
        _, _, _, radii, *state = output
        ctx.save_for_backward(*shape, world_to_camera, K, camera_center, background, radii, *state)
        ctx.settings, ctx.stats = inputs[13:19], inputs[19]
        ctx.mark_non_differentiable(radii, *state)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once
    def backward(ctx, *grads):
        return _gradients(ctx, ctx.saved_tensors, *grads[:3])


def _gradients(ctx, saved, grad_image, grad_alpha, grad_inv_depth) -> tuple:
    """Of all inputs of _Rasterize, by those of its pictures and by what it kept."""
    inputs, radii, state = saved[:12], saved[12], saved[13:]
    wanted, stats = ctx.needs_input_grad, ctx.stats
    if grad_image is None and grad_alpha is None and grad_inv_depth is None:
        return (None,) * len(wanted)
    if grad_image is None:
        grad_image = inputs[0].new_zeros(*inputs[8].shape[:-2], 3, ctx.settings[1], ctx.settings[0])
    grad_image, grad_alpha, grad_inv_depth = (
        None if g is None else g.contiguous() for g in (grad_image, grad_alpha, grad_inv_depth)
    )
    counters = (stats.grad_norm_sum, stats.visits, stats.abs_grad_norm_sum) if stats else (None, None, None)
    grads = torch.ops.tilesplat.rasterize_backward(
        *inputs, *ctx.settings, radii, list(state), grad_image, grad_alpha, grad_inv_depth,
        wanted[:11], *counters,
    )  # fmt: skip
    # An empty tensor's gradient comes back as [0], whatever its shape.
    shapes = [*inputs[:9], inputs[11], inputs[0]]
    grads = [g.reshape(t.shape) if want else None for g, want, t in zip(grads, wanted, shapes)]
    return (*grads, *(None,) * (len(wanted) - len(grads)))


def mark_visible(means: Tensor, world_to_camera: Tensor, near: float = 0.2) -> Tensor:
    """Which means [N, 3] are in front of the near plane, z > near: bool [N]."""
    expect_tensors(means=means, world_to_camera=world_to_camera)
    return torch.ops.tilesplat.mark_visible(
        means.detach().contiguous(), world_to_camera.detach().contiguous(), near
    )
