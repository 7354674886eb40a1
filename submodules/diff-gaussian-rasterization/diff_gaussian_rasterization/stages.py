"""The stages of rendering, one by one: what `rasterize` does in one call, open to other attributes than
color.

    projected = project(means, quats, scales, opacities, world_to_camera=..., K=..., width=..., height=...)
    tiles = lists(projected) picture = blend(projected, features, tiles)     # [N, D] -> picture.image [D, H,
    W], picture.alpha [1, H, W]

Every stage is differentiable in its tensors, so gradients of any picture reach the Gaussians and the pose.
The lists of a projection serve any number of pictures. N Gaussians, H x W pixels, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, reference  # noqa: F401  _library registers torch.ops.tilesplat
from ._autograd import once, taken
from .types import expect_tensors

operators = torch.ops.tilesplat

CAMERAS = ("pinhole", "fisheye", "orthographic")
COMPENSATIONS = ("none", "antialiasing", "mip")


class Projected(NamedTuple):
    """Gaussians as one camera sees them. Rows with radius 0 are not in the picture and hold anything."""

    means2d: Tensor  # [N, 2]  pixels; the first pixel's center is at (0.5, 0.5)
    conics: Tensor  # [N, 3]  inverse of the blurred covariance: xx xy yy
    opacities: Tensor  # [N]  activated and compensated
    depths: Tensor  # [N]  camera z; of a fisheye the distance from the camera
    radii: Tensor  # [N] int32  pixels
    width: int
    height: int


class Tiles(NamedTuple):
    """The splats of every 16 x 16 tile, front to back. What `lists` holds is the backend's business."""

    offset: Tensor | None  # [2, H, W]  from a pixel's center to the point it looks at
    lists: tuple[Tensor, ...]

    @property
    def entries(self) -> Tensor:
        """How many entries (tile, splat) there are: int64 [1], where the lists are."""
        on_cpu = self.lists[-1].device.type == "cpu"
        return self.lists[3][-1:] if on_cpu else self.lists[2][:1]


class Blended(NamedTuple):
    image: Tensor  # [D, H, W]  sum of feature alpha T, and the background where one was given
    alpha: Tensor  # [1, H, W]  how much of the background is hidden


class Scores(NamedTuple):
    """What each Gaussian does to a picture. A fragment is a Gaussian at a pixel that blends it.

    a is alpha there, T the light that reaches it. The last four are None unless colors were given.
    """

    weight_sum: Tensor  # [N]  sum of w a T, w the weight picture or 1
    pixels: Tensor  # [N] int32  number of fragments
    largest: Tensor  # [N] int32  number of pixels to which no other contributes more
    bright: Tensor  # [N] int32  number of fragments with T > 0.5
    largest_index: Tensor  # [H, W] int32  which Gaussian contributes most to a pixel; -1: none does
    median_index: Tensor  # [H, W] int32  at which one T falls to 0.5 or less; -1: at none
    hessian: Tensor | None = None  # [N]  sum of (d(sum of C) / dG)^2, G being the falloff: alpha = opacity G
    alpha_moment: Tensor | None = None  # [N]  sum of (dL/da)^2
    opacity_grad: Tensor | None = None  # [N]  sum of dL/dopacity
    opacity_moment: Tensor | None = None  # [N]  sum of (dL/dopacity)^2


def project(
    means: Tensor,  # [N, 3]  world
    quats: Tensor | None,  # [N, 4]  w x y z
    scales: Tensor | None,  # [N, 3]  standard deviations
    opacities: Tensor,  # [N, 1] or [N]
    *,
    cov3d: Tensor | None = None,  # [N, 6]  xx xy xz yy yz zz, instead of quats and scales
    world_to_camera: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]  pixels
    width: int,
    height: int,
    scale_modifier: float = 1.0,
    raw: bool = False,
    near: float = 0.2,
    blur: float = 0.3,
    compensation: str = "none",
    camera: str = "pinhole",
    distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
) -> Projected:
    """From the world to the screen. Arguments not mentioned here are those of `rasterize`.

    `blur` is added to the diagonal of the projected covariance, in square pixels. `compensation` dims a splat
    as the blur widens it: "antialiasing" as rasterize does, by sqrt(max(2.5e-5, det / blurred det)); "mip" by
    Mip-Splatting's rule, sqrt(det / (blurred det + 1e-6) + 1e-6), and to 0 where a determinant is 1e-6 or
    less.

    `camera` is "pinhole"; "orthographic", K then holding pixels per unit of length; or "fisheye",
    equidistant, where an angle a off the axis lands at f a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8),
    `distortion` being k1 to k4 (COLMAP's OPENCV_FISHEYE). A fisheye sees sideways and behind: `near` is then
    a distance.

    Gradients flow to Gaussians and world_to_camera.
    """
    expect_tensors(
        means=means, quats=quats, scales=scales, opacities=opacities, cov3d=cov3d,
        world_to_camera=world_to_camera, K=K,
    )  # fmt: skip
    _expect_one_of("camera", camera, CAMERAS)
    _expect_one_of("compensation", compensation, COMPENSATIONS)
    tensors = (means, quats, scales, cov3d, opacities.flatten(), world_to_camera, K)
    means2d, conics, dimmed, depths, radii = _Project.apply(
        *map(taken, tensors), width, height, scale_modifier, raw, near, blur,
        COMPENSATIONS.index(compensation), CAMERAS.index(camera), list(distortion),
    )  # fmt: skip
    return Projected(means2d, conics, dimmed, depths, radii, width, height)


def lists(projected: Projected, subpixel_offset: Tensor | None = None, capacity: int = 0) -> Tiles:
    """The splats of every tile. No gradient passes here: the order of splats does not change smoothly.

    On a GPU, the call waits for the number of (tile, splat) entries, unless `capacity` says how many to make
    room for. Then entries beyond it, the farthest, are left out: `Tiles.entries` tells how many there are.

    `subpixel_offset` [H, W, 2] moves the point each pixel looks at, x and y in pixels, away from its center.
    """
    expect_tensors(subpixel_offset=subpixel_offset)
    shape = (projected.height, projected.width, 2)
    if subpixel_offset is not None and subpixel_offset.shape != shape:
        raise ValueError(f"subpixel_offset must be {list(shape)}, got {list(subpixel_offset.shape)}")
    offset = None if subpixel_offset is None else subpixel_offset.detach().permute(2, 0, 1).contiguous()
    margin = 0.0
    if offset is not None:  # a GPU does not look how far they go, but leaves nothing out
        margin = offset.abs().max().item() if offset.device.type == "cpu" else 1.0
    screen = (t.detach().contiguous() for t in projected[:5])
    return Tiles(offset, tuple(operators.lists(*screen, *projected[5:], margin, capacity)))


def blend(
    projected: Projected,
    features: Tensor,  # [N, D]
    tiles: Tiles,
    background: Tensor | None = None,  # [D]
    absolute: Tensor | None = None,  # [N, 2]
) -> Blended:
    """The picture of any attribute: colors, labels, normals, depths.

    Gradients flow to features, background, and to means2d, conics and opacities of `projected`. `means2d` may
    be given a carrier first, `projected._replace(means2d=projected.means2d + carrier)`, whose gradient then
    is that of the projected means in pixels. `absolute` is only a carrier: its values are not read, and its
    gradient is the sum over pixels of the absolute gradients of means2d; D is at most 16 with it.

    `tiles` say only where to look. Splats may have changed since `lists`, but where they have come to reach
    more tiles, they are missing there. Without a background, the backward reads the image again: it may not
    be changed before.
    """
    expect_tensors(features=features, background=background, absolute=absolute)
    count = len(projected.means2d)
    if features.dim() != 2 or len(features) != count or not 1 <= features.shape[1] <= 512:
        raise ValueError(f"features must be [{count}, 1 to 512], got {list(features.shape)}")
    tensors = (*projected[:3], features, absolute)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    image, T, *_ = _Blend.apply(*map(taken, tensors), tiles.offset, *projected[5:], keep, *tiles.lists)
    if background is not None:
        if background.shape != features.shape[1:]:
            raise ValueError(f"background must be [{features.shape[1]}], got {list(background.shape)}")
        image = image + T * background[:, None, None]
    return Blended(image, 1 - T)


def scores(
    projected: Projected,
    tiles: Tiles,
    *,
    weights: Tensor | None = None,  # [H, W]
    colors: Tensor | None = None,  # [N, 3]
    background: Tensor | None = None,  # [3]
    gradient: Tensor | None = None,  # [3, H, W]
) -> Scores:
    """What each Gaussian contributes, for pruning, cleaning and budgets. Nothing here is differentiable.

    `weights` is a picture by which contributions are weighted. With the `colors` that were blended and their
    background, `hessian` says how strongly the picture depends on a Gaussian. With `gradient` too, that of a
    loss for the picture, the moments say the same of the loss. A gradient that the loss has for alpha itself
    is not part of them.
    """
    expect_tensors(weights=weights, colors=colors, background=background, gradient=gradient)
    if gradient is not None and colors is None:
        raise ValueError("gradient must come with the colors that were blended")
    with torch.no_grad():
        picture = along = None
        if colors is not None:
            image = blend(projected, colors, tiles, background).image
            picture = image.sum(0)
            along = None if gradient is None else (image * gradient).sum(0)
        screen = [t.contiguous() for t in projected[:3]]
        sums, largest, median = operators.scores(
            *screen, list(tiles.lists), tiles.offset, *projected[5:],
            *map(taken, (weights, colors, picture, gradient, along)),
        )  # fmt: skip
        return _scores(sums.T, screen[2], largest, median, colors is not None, gradient is not None)


def _scores(
    sums: Tensor, opacities: Tensor, largest: Tensor, median: Tensor, with_colors: bool, with_gradient: bool
) -> Scores:
    """Sums [8, N] of the operator, in the order of cpu/scores.h."""
    counts = torch.zeros(len(opacities) + 1, dtype=torch.int32, device=largest.device)
    counts.index_add_(0, largest.flatten() + 1, torch.ones_like(largest).flatten())
    inverse = torch.where(opacities > 0, 1 / opacities, 0)
    out = Scores(sums[0].clone(), sums[1].int(), counts[1:], sums[2].int(), largest, median)
    if with_colors:
        out = out._replace(hessian=opacities.square() * sums[3])
    if with_gradient:
        moments = sums[4].clone(), inverse * sums[5], inverse.square() * sums[6]
        out = out._replace(alpha_moment=moments[0], opacity_grad=moments[1], opacity_moment=moments[2])
    return out


# ---- colors, depths, normals -----------------------------------------------------------------------------


def sh_colors(
    means: Tensor,  # [N, 3]
    sh_dc: Tensor,  # [N, 1, 3]
    sh_rest: Tensor | None,  # [N, K-1, 3]
    camera_center: Tensor,  # [3]
    sh_degree: int = 0,
) -> Tensor:
    """Colors seen from a point, at least 0: features for `blend`. [N, 3]"""
    coefficients = sh_dc if sh_rest is None else torch.cat([sh_dc, sh_rest], dim=1)
    return reference.sh_colors(sh_degree, coefficients, means - camera_center)


def depth(projected: Projected, tiles: Tiles, normalized: bool = False) -> Tensor:
    """Sum of z alpha T; `normalized` divides it by alpha, 0 where there is none. [1, H, W]"""
    image, alpha = blend(projected, projected.depths[:, None], tiles)
    if not normalized:
        return image
    seen = alpha > 0
    return torch.where(seen, image / torch.where(seen, alpha, 1), 0)


def median_depth(projected: Projected, tiles: Tiles, empty: float = 0.0) -> Tensor:
    """Depth of the splat at which T falls to 0.5 or less, `empty` where it never does. [1, H, W]"""
    index = scores(projected, tiles).median_index.long()
    if len(projected.depths) == 0:
        return projected.depths.new_full((1, *index.shape), empty)
    return torch.where(index >= 0, projected.depths[index.clamp_min(0)], empty)[None]


def normals(depth: Tensor, K: Tensor) -> Tensor:
    """Of the surface that a pinhole's depth picture [1, H, W] shows: unit vectors [3, H, W], camera axes.

    They face the camera. Differences are central, one-sided at the border; 0 where the surface is degenerate.
    """
    height, width = depth.shape[1:]
    pixels = reference._pixel_centers(0, 0, width, height, depth).reshape(height, width, 2)
    rays = torch.cat(
        [(pixels - K[:2, 2]) / torch.stack([K[0, 0], K[1, 1]]), torch.ones_like(pixels[..., :1])], -1
    )
    along_y, along_x = torch.gradient(rays * depth[0, ..., None], dim=(0, 1))
    return torch.nn.functional.normalize(torch.linalg.cross(along_y, along_x), dim=-1).permute(2, 0, 1)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _expect_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# ---- derivatives ------------------------------------------------------------------------------------------


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return operators.project(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7], output[4])
        ctx.settings = inputs[7:]
        ctx.mark_non_differentiable(output[4])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once
    def backward(ctx, grad_means2d, grad_conics, grad_opacities, grad_depths, _radii):
        *inputs, radii = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in range(6)]
        grads = operators.project_backward(
            *inputs, *ctx.settings, radii,
            *map(_contiguous, (grad_means2d, grad_conics, grad_opacities, grad_depths)), wanted,
        )  # fmt: skip
        shaped = [g.reshape(t.shape) if want else None for g, t, want in zip(grads, inputs, wanted)]
        return *shaped, *(None,) * (1 + len(ctx.settings))


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(means2d, conics, opacities, features, absolute, offset, width, height, keep, *lists):
        image, left, kept = operators.blend(
            means2d, conics, opacities, features, absolute, list(lists), offset, width, height, keep
        )
        return image, left, *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, absolute, offset, width, height, _ = inputs[:9]
        image, _, *kept = output
        ctx.save_for_backward(*tensors, offset, image, *inputs[9:], *kept)
        ctx.size, ctx.lists, ctx.absolute = (width, height), len(inputs) - 9, absolute is not None
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once
    def backward(ctx, grad_image, grad_left, *_kept):
        *tensors, offset, image = ctx.saved_tensors[:6]
        lists, kept = ctx.saved_tensors[6 : 6 + ctx.lists], ctx.saved_tensors[6 + ctx.lists :]
        absolute = ctx.absolute and ctx.needs_input_grad[4]
        grads = operators.blend_backward(
            *tensors, list(lists), offset, *ctx.size, list(kept), image,
            *map(_contiguous, (grad_image, grad_left)), absolute,
        )  # fmt: skip
        grads = [g if want else None for g, want in zip(grads, ctx.needs_input_grad)]
        return *grads, *(None,) * (4 + ctx.lists)
