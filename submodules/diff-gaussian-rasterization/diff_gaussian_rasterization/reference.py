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
) -> Splats:
    """EWA splatting: a Gaussian through a pinhole is, to first order, a Gaussian on the image."""
    R, t = world_to_camera[:3, :3], world_to_camera[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    points = means @ R.T + t
    in_front = points[:, 2] > near
    # What is not drawn must not poison the gradients of what is: it is computed as if it stood at (0, 0, 1).
    x, y, z = torch.where(in_front[:, None], points, points.new_tensor([0.0, 0.0, 1.0])).unbind(-1)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)

    zero = torch.zeros_like(z)
    tx = _limit(x, z, FOV_MARGIN * width / (2 * fx))
    ty = _limit(y, z, FOV_MARGIN * height / (2 * fy))
    J = torch.stack([fx / z, zero, -fx * tx / (z * z), zero, fy / z, -fy * ty / (z * z)], dim=-1).reshape(
        -1, 2, 3
    )
    JR = J @ R
    cov = JR @ cov3d @ JR.transpose(1, 2)
    xx, xy, yy = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
    thin = xx * yy - xy * xy
    xx, yy = xx + BLUR, yy + BLUR
    det = xx * yy - xy * xy
    usable = det.isfinite() & (det != 0)
    safe_det = torch.where(usable, det, torch.ones_like(det))
    if antialiasing:  # what blurring adds in width it takes away in opacity
        opacities = opacities * (thin / safe_det).clamp_min(ANTIALIAS_FLOOR).sqrt()
    conics = torch.stack([yy, -xy, xx], dim=-1) / safe_det[:, None]

    radii = _radii(xx.detach(), yy.detach(), det.detach())
    tiles = _tile_rectangles(means2d.detach(), radii, width, height)
    finite = (
        torch.cat([means2d, conics, opacities[:, None], radii[:, None]], dim=1).detach().isfinite().all(1)
    )
    drawn = in_front & usable & finite & (tiles[:, 2] > tiles[:, 0]) & (tiles[:, 3] > tiles[:, 1])
    radii = torch.where(drawn, radii, 0).clamp_max(2.0**30).to(torch.int32)
    return Splats(means2d, conics, opacities, z, radii, tiles)


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
    order = splats.depths.detach().argsort(stable=True)
    order = order[splats.radii[order] > 0]
    x0, y0, x1, y1 = splats.tiles[order].unbind(-1)
    # Checkpointed, only one tile's [pixels, splats] tables are in memory at a time; not worth it for few.
    pairs = int(((x1 - x0) * (y1 - y0)).sum()) * TILE_SIZE**2
    blend_tile = _blend_tile if pairs < 2**22 else partial(checkpoint, _blend_tile, use_reentrant=False)
    rows = []
    for top in range(0, height, TILE_SIZE):
        row, ty = [], top // TILE_SIZE
        in_row = (y0 <= ty) & (ty < y1)
        for left in range(0, width, TILE_SIZE):
            tx = left // TILE_SIZE
            ids = order[in_row & (x0 <= tx) & (tx < x1)]
            pixels = _pixel_centers(
                left, top, min(left + TILE_SIZE, width), min(top + TILE_SIZE, height), background
            )
            tile: Any = blend_tile(pixels, splats, ids, background, absolute)
            row.append(tile.T.reshape(5, -1, min(TILE_SIZE, width - left)))
        rows.append(torch.cat(row, dim=2))
    out = torch.cat(rows, dim=1)
    return out[:3], out[3:4], out[4:5]


def _pixel_centers(x0: int, y0: int, x1: int, y1: int, like: Tensor) -> Tensor:
    """Row by row: [P, 2]"""
    y, x = torch.meshgrid(torch.arange(y0, y1), torch.arange(x0, x1), indexing="ij")
    return (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5).to(like)


def _blend_tile(
    pixels: Tensor, splats: Splats, ids: Tensor, background: Tensor, absolute: AbsoluteGradients | None
):
    """Pixels [P, 2] over the splats `ids`, front to back -> [P, 5]: color, alpha, inverse depth."""
    offsets = pixels[:, None, :] - splats.means2d[ids]  # [P, M, 2]
    if absolute is not None and offsets.requires_grad:
        offsets.register_hook(lambda grad: absolute.add(ids, grad))
    dx, dy = offsets.unbind(-1)
    xx, xy, yy = splats.conics[ids].unbind(-1)
    sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    alpha = splats.opacities[ids] * torch.exp(-sigma)
    alpha = alpha + (alpha.clamp_max(ALPHA_MAX) - alpha).detach()  # HABIT: the cap lets the gradient through
    alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0)
    with torch.no_grad():  # the splat that would leave too little light is not blended, nor any behind it
        blended = torch.cumprod(1 - alpha, dim=1) >= STOP_AT
    alpha = torch.where(blended, alpha, 0)

    passing = torch.cumprod(1 - alpha, dim=1)  # [P, M]  light that passes this splat and all before it
    before = torch.cat([torch.ones_like(pixels[:, :1]), passing], dim=1)
    weights = alpha * before[:, :-1]
    T = before[:, -1:]
    assert splats.colors is not None
    color = weights @ splats.colors[ids] + T * background
    inv_depth = weights @ (1 / splats.depths[ids])[:, None]
    return torch.cat([color, 1 - T, inv_depth], dim=1)


# ---- statistics for densification ----------------------------------------------------------------


def _count_visits(stats: ScreenStats, grad: Tensor, radii: Tensor) -> None:
    """Add one view. grad [N, 2] of the projected means in NDC units."""
    seen = radii > 0
    stats.grad_norm_sum += (grad.norm(dim=1) * seen).to(stats.grad_norm_sum)
    stats.visits += seen.to(stats.visits)


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
