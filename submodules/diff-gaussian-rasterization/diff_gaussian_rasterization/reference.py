"""The rasterizer in plain PyTorch: the specification, and the truth that both backends are tested against.

Nothing here is fast. It works in any floating dtype on any device (float64 for truth), its gradients come
from autograd, and it reads in the order of the method: activate, project, color, sort, blend (Kerbl et al.
2023, sections 4 to 6).

Where the published implementation's gradient is not the derivative of its image, training results depend on
the gradient it has, so it is kept and marked HABIT below.

Conventions: camera x right, y down, z forward; the pixel in column i, row j has its center at (i + 0.5, j +
0.5); quaternions are (w, x, y, z); world_to_camera acts on column vectors. Names as in api.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .types import Rendered, ScreenStats

TILE_SIZE = 16  # pixels
NEAR_DEPTH = 0.2  # splats this close to the camera plane, or behind it, are skipped
BLUR = 0.3  # px^2 added to the projected covariance
FOV_MARGIN = 1.3  # the projection is linearized at most this far outside the image
ANTIALIAS_FLOOR = 2.5e-5  # lower bound of det(cov) / det(cov + blur)
MIP_FLOOR = 1e-6  # Mip-Splatting's for determinants, and what it adds to them and to their ratio
MAX_ANGLE = 3.1  # radians off the axis: a fisheye sees nothing right behind it
ALPHA_MIN = 1 / 255  # fainter contributions are skipped
ALPHA_MAX = 0.99
STOP_AT = 1e-4  # a pixel is done when less light than this would still pass

SH_C0 = 0.28209479177387814
SH_C1 = 0.4886025119029199
SH_C2 = (
    1.0925484305920792,
    -1.0925484305920792,
    0.31539156525252005,
    -1.0925484305920792,
    0.5462742152960396,
)
SH_C3 = (-0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154, -0.4570457994644658,
         1.445305721320277, -0.5900435899266435)  # fmt: skip


def rasterize(
    means: Tensor,  # [N, 3]
    quats: Tensor | None,  # [N, 4]
    scales: Tensor | None,  # [N, 3]
    opacities: Tensor,  # [N, 1] or [N]
    *,
    sh_dc: Tensor | None = None,  # [N, 1, 3]
    sh_rest: Tensor | None = None,  # [N, K-1, 3]
    colors: Tensor | None = None,  # [N, 3]
    cov3d: Tensor | None = None,  # [N, 6]
    world_to_camera: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]
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
    near: float = NEAR_DEPTH,
) -> Rendered:
    """As api.rasterize, which says what each argument is."""
    if raw:
        quats = None if quats is None else quats / quats.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scales = None if scales is None else scales.exp()
        opacities = opacities.sigmoid()
    if cov3d is None:
        assert quats is not None and scales is not None
        cov3d = covariance(quats, scales * scale_modifier)
    else:
        cov3d = unpack_symmetric(cov3d)

    splats = project(means, cov3d, opacities.flatten(), world_to_camera, K, width, height, antialiasing, near)
    if colors is None:
        if camera_center is None:
            camera_center = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
        assert sh_dc is not None
        coefficients = sh_dc if sh_rest is None else torch.cat([sh_dc, sh_rest], dim=1)
        colors = sh_colors(sh_degree, coefficients, means - camera_center)
    splats = splats._replace(colors=colors, radii=torch.where(colors.isfinite().all(1), splats.radii, 0))

    shift = torch.zeros_like(
        splats.means2d
    )  # zero in value; its gradient is that of the projected mean, in NDC
    if means2d is not None or stats is not None:
        carrier = torch.zeros_like(means, requires_grad=True) if means2d is None else means2d
        half_size = means.new_tensor([0.5 * width, 0.5 * height])
        shift = (carrier - carrier.detach())[:, :2] * half_size
        if stats is not None and carrier.requires_grad:
            shift.register_hook(lambda grad: _count_visits(stats, grad * half_size, splats.radii))
    splats = splats._replace(means2d=splats.means2d + shift)

    absolute = (
        None if stats is None or stats.abs_grad_norm_sum is None else AbsoluteGradients(stats, width, height)
    )
    image, alpha, inv_depth = blend(splats, width, height, background, absolute)
    return Rendered(image, alpha, inv_depth, splats.radii)


# ---- one Gaussian in space -----------------------------------------------------------------------


def rotation_matrix(quats: Tensor) -> Tensor:
    """Quaternions [N, 4], used as they are -> [N, 3, 3]; a rotation where the quaternion has length 1."""
    w, x, y, z = quats.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)


def covariance(quats: Tensor, scales: Tensor) -> Tensor:
    """Sigma = M M^T with M = R diag(s). [N, 4], [N, 3] -> [N, 3, 3]"""
    M = rotation_matrix(quats) * scales[:, None, :]
    return M @ M.transpose(1, 2)


def unpack_symmetric(cov: Tensor) -> Tensor:
    """[N, 6] as xx xy xz yy yz zz -> [N, 3, 3]"""
    return cov[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)


def sh_basis(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics in the signs and order of stored models. Unit vectors [N, 3] -> [N, K]"""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, SH_C0)]
    if degree > 0:
        basis += [-SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    xx, yy, zz = x * x, y * y, z * z
    if degree > 1:
        terms = [x * y, y * z, 2 * zz - xx - yy, x * z, xx - yy]
        basis += [c * t for c, t in zip(SH_C2, terms)]
    if degree > 2:
        terms = [y * (3 * xx - yy), x * y * z, y * (4 * zz - xx - yy), z * (2 * zz - 3 * xx - 3 * yy),
                 x * (4 * zz - xx - yy), z * (xx - yy), x * (xx - 3 * yy)]  # fmt: skip
        basis += [c * t for c, t in zip(SH_C3, terms)]
    return torch.stack(basis, dim=-1)


def sh_colors(degree: int, coefficients: Tensor, offsets: Tensor) -> Tensor:
    """Colors seen from a camera, at least 0. [N, K, 3], mean minus camera [N, 3] -> [N, 3]"""
    basis = sh_basis(degree, F.normalize(offsets, dim=-1))
    colors = (basis[:, :, None] * coefficients[:, : basis.shape[1]]).sum(1) + 0.5
    return colors.clamp_min(0)


# ---- a Gaussian on the screen --------------------------------------------------------------------


class Splats(NamedTuple):
    """Gaussians as one camera sees them. Rows with radius 0 are not drawn and hold anything."""

    means2d: Tensor  # [N, 2]  pixels
    conics: Tensor  # [N, 3]  inverse covariance: xx, xy, yy
    opacities: Tensor  # [N]
    depths: Tensor  # [N]  camera z
    radii: Tensor  # [N] int32
    tiles: Tensor  # [N, 4] int64  x0, y0, x1, y1 of its rectangle of tiles, half open
    colors: Tensor | None = None  # [N, 3]


def project(
    means: Tensor,  # [N, 3]
    cov3d: Tensor,  # [N, 3, 3]
    opacities: Tensor,  # [N]
    world_to_camera: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]
    width: int,
    height: int,
    antialiasing: bool,
    near: float = NEAR_DEPTH,
    blur: float = BLUR,
    camera: Camera | None = None,
    mip: bool = False,
) -> Splats:
    """EWA splatting: a Gaussian through a lens is, to first order, a Gaussian on the image.

    A pinhole if `camera` is None. `mip` is Mip-Splatting's rule of dimming, in place of `antialiasing`.
    """
    R, t = world_to_camera[:3, :3], world_to_camera[:3, 3]
    points = means @ R.T + t
    in_front = points[:, 2] > near
    if isinstance(camera, Fisheye):
        in_front = (points.norm(dim=1) > near) & (_angle(points) < MAX_ANGLE)
    # What is not drawn must not poison the gradients of what is: it is computed as if it stood at (0, 0, 1).
    points = torch.where(in_front[:, None], points, points.new_tensor([0.0, 0.0, 1.0]))
    means2d, J, depths = (camera or pinhole)(points, K, width, height)
    JR = J @ R
    cov = JR @ cov3d @ JR.transpose(1, 2)
    xx, xy, yy = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
    thin = xx * yy - xy * xy
    xx, yy = xx + blur, yy + blur
    det = xx * yy - xy * xy
    usable = det.isfinite() & (det != 0)
    safe_det = torch.where(usable, det, torch.ones_like(det))
    if antialiasing:  # what blurring adds in width it takes away in opacity
        opacities = opacities * (thin / safe_det).clamp_min(ANTIALIAS_FLOOR).sqrt()
    if mip:
        opacities = opacities * _mip_factor(thin, det)
    conics = torch.stack([yy, -xy, xx], dim=-1) / safe_det[:, None]

    radii = _radii(xx.detach(), yy.detach(), det.detach())
    tiles = _tile_rectangles(means2d.detach(), radii, width, height)
    finite = (
        torch.cat([means2d, conics, opacities[:, None], radii[:, None]], dim=1).detach().isfinite().all(1)
    )
    drawn = in_front & usable & finite & (tiles[:, 2] > tiles[:, 0]) & (tiles[:, 3] > tiles[:, 1])
    radii = torch.where(drawn, radii, 0).clamp_max(2.0**30).to(torch.int32)
    return Splats(means2d, conics, opacities, depths, radii, tiles)


def _mip_factor(thin: Tensor, wide: Tensor) -> Tensor:
    """Of the determinants without and with the blur; 0 where one has no area to speak of."""
    flat = (thin <= MIP_FLOOR) | (wide <= MIP_FLOOR)
    ratio = torch.where(flat, 0, thin / torch.where(flat, 1, wide + MIP_FLOOR))
    return torch.where(flat, 0, (ratio + MIP_FLOOR).sqrt())


# ---- lenses: points [N, 3] before a camera -> pixels [N, 2], their derivative [N, 2, 3], depths [N] --------

Camera = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


def pinhole(points: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    x, y, z = points.unbind(-1)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    tx = _limit(x, z, FOV_MARGIN * width / (2 * fx))
    ty = _limit(y, z, FOV_MARGIN * height / (2 * fy))
    zero = torch.zeros_like(z)
    rows = [fx / z, zero, -fx * tx / (z * z), zero, fy / z, -fy * ty / (z * z)]
    return means2d, torch.stack(rows, dim=-1).reshape(-1, 2, 3), z


def orthographic(points: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """K holds pixels per unit of length where a pinhole has its focal lengths."""
    x, y, z = points.unbind(-1)
    means2d = torch.stack([K[0, 0] * x + K[0, 2], K[1, 1] * y + K[1, 2]], dim=-1)
    J = torch.cat([K[:2, :2].diagonal().diag(), K.new_zeros(2, 1)], dim=1)
    return means2d, J.expand(len(points), 2, 3), z


class Fisheye:
    """An equidistant lens: pixels from the center grow with the angle a off the axis, as
    f a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8): COLMAP's OPENCV_FISHEYE. Depths are distances.
    """

    def __init__(self, distortion: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)):
        self.distortion = distortion

    def __call__(self, points: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = points.unbind(-1)
        off_axis2 = x * x + y * y
        off_axis, distance2 = off_axis2.clamp_min(1e-24).sqrt(), off_axis2 + z * z
        a = torch.atan2(off_axis, z)
        length, growth = torch.ones_like(a), torch.ones_like(a)
        for i, k in enumerate(self.distortion, start=1):
            length, growth = length + k * a ** (2 * i), growth + k * (2 * i + 1) * a ** (2 * i)
        h = a * length / off_axis  # the image is at h (x, y); h_xy x and h_xy y are its derivatives
        h_xy = (growth * z / distance2 - h) / off_axis2.clamp_min(1e-24)
        h_z = -growth / distance2
        f, center = torch.stack([K[0, 0], K[1, 1]]), K[:2, 2]
        means2d = f * h[:, None] * points[:, :2] + center
        rows = [h + h_xy * x * x, h_xy * x * y, h_z * x, h_xy * x * y, h + h_xy * y * y, h_z * y]
        return means2d, f[:, None] * torch.stack(rows, dim=-1).reshape(-1, 2, 3), distance2.sqrt()


def _angle(points: Tensor) -> Tensor:
    """Off the axis, in radians: [N]"""
    return torch.atan2(points[:, :2].norm(dim=1), points[:, 2]).detach()


def _limit(x: Tensor, z: Tensor, limit: Tensor) -> Tensor:
    """x with x/z held within ±limit, where the projection is linearized.

    HABIT: where it is held, x is a constant for the gradient, its dependence on depth included.
    """
    ratio, limit = (x / z).detach(), limit.detach()
    held = ratio.clamp(-limit, limit)
    return torch.where(held == ratio, x, held * z.detach())


def _radii(xx: Tensor, yy: Tensor, det: Tensor) -> Tensor:
    """Three standard deviations along the longer axis, rounded up: [N]"""
    mid = 0.5 * (xx + yy)
    largest = mid + (mid * mid - det).clamp_min(0.1).sqrt()
    return (3 * largest.sqrt()).ceil()


def _tile_rectangles(means2d: Tensor, radii: Tensor, width: int, height: int) -> Tensor:
    """The tiles that the square of `radii` around each mean touches: [N, 4] as x0, y0, x1, y1, half open.

    The published pixel coordinate is 0 at the first pixel's center, where ours is 0.5.
    """
    count = means2d.new_tensor([-(-width // TILE_SIZE), -(-height // TILE_SIZE)])
    corner = means2d - 0.5
    low = ((corner - radii[:, None]) / TILE_SIZE).trunc()
    high = ((corner + radii[:, None] + TILE_SIZE - 1) / TILE_SIZE).trunc()
    rectangles = torch.cat([low, high], dim=1).nan_to_num(0, posinf=1e9, neginf=-1e9)
    return rectangles.clamp_min(0).minimum(count.repeat(2)).long()


# ---- the image -----------------------------------------------------------------------------------


def blend(
    splats: Splats, width: int, height: int, background: Tensor, absolute: AbsoluteGradients | None = None
):
    """Front to back over each tile's splats -> image [3, H, W], alpha [1, H, W], inverse depth [1, H, W]."""
    assert splats.colors is not None
    features = torch.cat([splats.colors, 1 / splats.depths[:, None]], dim=1)
    out, T = blend_features(splats, features, width, height, absolute)
    return out[:3] + T * background[:, None, None], 1 - T, out[3:]


def blend_features(
    splats: Splats,
    features: Tensor,  # [N, D]
    width: int,
    height: int,
    absolute: AbsoluteGradients | None = None,
    offset: Tensor | None = None,  # [H, W, 2]
    carrier: Tensor | None = None,  # [N, 2]
) -> tuple[Tensor, Tensor]:
    """Sums of features, [D, H, W], and the light that passes all splats, [1, H, W]."""
    # Checkpointed, only one tile's [pixels, splats] tables are in memory at a time; not worth it for few.
    x0, y0, x1, y1 = splats.tiles[splats.radii > 0].unbind(-1)
    pairs = int(((x1 - x0) * (y1 - y0)).sum()) * TILE_SIZE**2
    blend_tile = _blend_tile if pairs < 2**22 else partial(checkpoint, _blend_tile, use_reentrant=False)
    rows: list[list[Tensor]] = []
    for tile in tile_lists(splats, width, height, offset):
        out: Any = blend_tile(tile.pixels, splats, tile.ids, features, absolute, carrier)
        if tile.left == 0:
            rows.append([])
        rows[-1].append(out.T.reshape(out.shape[1], -1, tile.width))
    image = torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)
    return image[:-1], image[-1:]


class Tile(NamedTuple):
    left: int  # its first pixel
    top: int
    width: int  # at most TILE_SIZE
    pixels: Tensor  # [P, 2]  where it looks, row by row
    ids: Tensor  # [M]  its splats, front to back

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns."""
        bottom = self.top + len(self.pixels) // self.width
        return slice(self.top, bottom), slice(self.left, self.left + self.width)


def tile_lists(splats: Splats, width: int, height: int, offset: Tensor | None = None) -> Iterator[Tile]:
    """Row by row. `offset` moves what each pixel looks at."""
    order = splats.depths.detach().argsort(stable=True)
    order = order[splats.radii[order] > 0]
    x0, y0, x1, y1 = splats.tiles[order].unbind(-1)
    for top in range(0, height, TILE_SIZE):
        ty, bottom = top // TILE_SIZE, min(top + TILE_SIZE, height)
        in_row = (y0 <= ty) & (ty < y1)
        for left in range(0, width, TILE_SIZE):
            tx, right = left // TILE_SIZE, min(left + TILE_SIZE, width)
            pixels = _pixel_centers(left, top, right, bottom, splats.means2d)
            if offset is not None:
                pixels = pixels + offset[top:bottom, left:right].reshape(-1, 2)
            yield Tile(left, top, right - left, pixels, order[in_row & (x0 <= tx) & (tx < x1)])


def _pixel_centers(x0: int, y0: int, x1: int, y1: int, like: Tensor) -> Tensor:
    """Row by row: [P, 2]"""
    y, x = torch.meshgrid(torch.arange(y0, y1), torch.arange(x0, x1), indexing="ij")
    return (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5).to(like)


def _blend_tile(
    pixels: Tensor,  # [P, 2]
    splats: Splats,
    ids: Tensor,  # [M]  front to back
    features: Tensor,  # [N, D]
    absolute: AbsoluteGradients | None,
    carrier: Tensor | None,  # [N, 2]
) -> Tensor:
    """Features, and in the last column the light that passes all: [P, D + 1]"""
    alpha = tile_alphas(pixels, splats, ids, absolute, carrier)
    before = light_before(alpha)
    return torch.cat([(alpha * before[:, :-1]) @ features[ids], before[:, -1:]], dim=1)


def tile_alphas(
    pixels: Tensor,
    splats: Splats,
    ids: Tensor,
    absolute: AbsoluteGradients | None = None,
    carrier: Tensor | None = None,
) -> Tensor:
    """How much light each splat takes from what reaches it: [P, M], 0 where it is not blended."""
    offsets = pixels[:, None, :] - splats.means2d[ids]  # [P, M, 2]
    if carrier is not None:
        offsets = CollectAbsolute.apply(offsets, carrier[ids])
    if absolute is not None and offsets.requires_grad:
        offsets.register_hook(lambda grad: absolute.add(ids, grad))
    sigma = falloff_exponents(offsets, splats.conics[ids])
    alpha = splats.opacities[ids] * torch.exp(-sigma)
    alpha = alpha + (alpha.clamp_max(ALPHA_MAX) - alpha).detach()  # HABIT: the cap lets the gradient through
    alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0)
    with torch.no_grad():  # the splat that would leave too little light is not blended, nor any behind it
        blended = torch.cumprod(1 - alpha, dim=1) >= STOP_AT
    return torch.where(blended, alpha, 0)


def falloff_exponents(offsets: Tensor, conics: Tensor) -> Tensor:
    """Minus the logarithm of how much fainter a splat is there than at its mean: [P, M]"""
    dx, dy = offsets.unbind(-1)
    xx, xy, yy = conics.unbind(-1)
    return 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy


def light_before(alpha: Tensor) -> Tensor:
    """What reaches each splat, and in the last column what passes all: [P, M] -> [P, M + 1]"""
    passing = torch.cumprod(1 - alpha, dim=1)
    return torch.cat([alpha.new_ones(len(alpha), 1), passing], dim=1)


# ---- what each Gaussian does to the image ------------------------------------------------------------------


def scores(
    splats: Splats,
    width: int,
    height: int,
    offset: Tensor | None,
    weights: Tensor | None,  # [H, W]
    colors: Tensor | None,  # [N, 3]
    background: Tensor | None,  # [3]
    gradient: Tensor | None,  # [3, H, W]
) -> list[Tensor | None]:
    """The fields of stages.Scores, in their order. Derivatives come from autograd, pixel by pixel."""
    splats = Splats(*(t.detach() for t in splats[:6]))
    count, like = len(splats.depths), splats.depths
    weight_sum, *moments = (like.new_zeros(count) for _ in range(5))
    pixels, bright = (torch.zeros(count, dtype=torch.int64, device=like.device) for _ in range(2))
    largest_index, median_index = (
        torch.full((height, width), -1, dtype=torch.int32, device=like.device) for _ in range(2)
    )
    for tile in tile_lists(splats, width, height, offset):
        if len(tile.ids) == 0:
            continue
        box = tile.box
        alpha = tile_alphas(tile.pixels, splats, tile.ids)
        before, taken = light_before(alpha), alpha > 0
        share = alpha * before[:, :-1]
        w = torch.ones_like(share[:, 0]) if weights is None else weights[box].flatten()
        weight_sum[tile.ids] += w @ share
        pixels[tile.ids] += taken.sum(0)
        bright[tile.ids] += (taken & (before[:, :-1] > 0.5)).sum(0)
        crosses = (before[:, :-1] > 0.5) & (before[:, 1:] <= 0.5)
        for index, which in ((largest_index, share), (median_index, crosses.to(share))):
            best, at = which.max(dim=1)  # the first of equals
            index[box] = torch.where(best > 0, tile.ids[at], -1).reshape(-1, tile.width).int()
        if colors is not None:
            for total, part in zip(moments, _moments(alpha, splats, tile, colors, background, gradient)):
                total[tile.ids] += part
    seen = largest_index[largest_index >= 0].long()
    counts = [pixels, torch.bincount(seen, minlength=count), bright]
    wanted = [colors is not None, *[gradient is not None] * 3]
    return [weight_sum, *(c.int() for c in counts), largest_index, median_index,
            *(m if want else None for m, want in zip(moments, wanted))]  # fmt: skip


def _moments(alpha, splats, tile, colors, background, gradient):
    """Of one tile: sums over its pixels, [M] each, in the order of stages.Scores."""
    alpha = alpha.detach().requires_grad_()
    with torch.enable_grad():
        before = light_before(alpha)
        color = (alpha * before[:, :-1]) @ colors[tile.ids].detach()
        if background is not None:
            color = color + before[:, -1:] * background.detach()
    taken = alpha > 0
    slopes = torch.autograd.grad(color.sum(), alpha, retain_graph=True)[0] * taken
    yield (slopes * splats.opacities[tile.ids]).square().sum(0)
    if gradient is None:
        return
    slopes = torch.autograd.grad(color, alpha, gradient[(slice(None), *tile.box)].reshape(3, -1).T)[0] * taken
    offsets = tile.pixels[:, None, :] - splats.means2d[tile.ids]
    falloff = torch.exp(-falloff_exponents(offsets, splats.conics[tile.ids]))
    yield slopes.square().sum(0)
    yield (slopes * falloff).sum(0)
    yield (slopes * falloff).square().sum(0)


# ---- statistics for densification ----------------------------------------------------------------


def _count_visits(stats: ScreenStats, grad: Tensor, radii: Tensor) -> None:
    """Add one view. grad [N, 2] of the projected means in NDC units."""
    seen = radii > 0
    stats.grad_norm_sum += (grad.norm(dim=1) * seen).to(stats.grad_norm_sum)
    stats.visits += seen.to(stats.visits)


class CollectAbsolute(torch.autograd.Function):
    """offsets [P, M, 2], as they are; |gradient|, summed over pixels, becomes that of the carrier [M, 2]."""

    @staticmethod
    def forward(ctx, offsets, carrier):
        return offsets.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.abs().sum(0)


class AbsoluteGradients:
    """Sums |gradient of the projected mean| over pixels, and adds its norm to the statistics."""

    def __init__(self, stats: ScreenStats, width: int, height: int):
        self.stats, self.scale = stats, (0.5 * width, 0.5 * height)
        self.sum: Tensor | None = None  # [N, 2]

    def add(self, ids: Tensor, grad: Tensor) -> None:
        """grad [P, M, 2], in pixels"""
        stats = self.stats.abs_grad_norm_sum
        assert stats is not None
        if self.sum is None:
            self.sum = grad.new_zeros(len(stats), 2)
            self.base = stats.clone()
        self.sum[ids] += grad.abs().sum(0) * grad.new_tensor(self.scale)
        stats.copy_(self.base + self.sum.norm(dim=1).to(stats))


# ---- losses, neighbors, optimizer ----------------------------------------------------------------


def ssim(a: Tensor, b: Tensor, padding: str = "same") -> Tensor:
    """Mean structural similarity of [B, C, H, W]; 11 x 11 Gaussian window, sigma 1.5, zeros outside."""
    channels = a.shape[1]
    x = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    g = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(g / g.sum(), g / g.sum()).expand(channels, 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window, padding=5 if padding == "same" else 0, groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def photometric_loss(image: Tensor, target: Tensor, lambda_dssim: float = 0.2, mask: Tensor | None = None):
    """(1 - lambda) L1 + lambda (1 - SSIM), and L1 alone. [3, H, W], uint8 meaning 0 to 255; mask [H, W].

    The image is clamped to [0, 1], as whoever looks at it will do."""
    image = image.clamp(0, 1)
    if target.dtype == torch.uint8:
        target = target.to(image.dtype) / 255
    if mask is not None:
        image, target = image * mask, target * mask
    l1 = (image - target).abs().mean()
    return (1 - lambda_dssim) * l1 + lambda_dssim * (1 - ssim(image[None], target[None])), l1


def knn_mean_dist2(points: Tensor) -> Tensor:
    """Mean squared distance of each point [N, 3] to its three nearest others -> [N]; all pairs, in chunks.

    With fewer than three others, those there are; alone, 0.
    """
    others = min(3, len(points) - 1)
    if others < 1:
        return points.new_zeros(len(points))
    rows = []
    for start in range(0, len(points), 256):
        dist2 = (points[start : start + 256, None] - points[None]).square().sum(-1)
        index = torch.arange(len(dist2), device=points.device)
        dist2[index, index + start] = float("inf")  # not oneself, but one's duplicates
        rows.append(dist2.topk(others, dim=1, largest=False).values.mean(1))
    return torch.cat(rows)
