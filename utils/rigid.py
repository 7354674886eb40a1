"""Rotations and rigid motions, from and to vectors, with derivatives everywhere that they are used.

A rotation vector w [..., 3] turns by |w| about w. A twist [..., 6] is (shift, rotation vector), both in the
axes of what moves: exp of it is the motion that goes on evenly for one unit of time.
"""

import torch
from torch import Tensor

SMALL = 0.25  # squared angle below which series are exact, and quotients are not


def cross_matrices(w: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3]: the matrix that takes v to w x v."""
    x, y, z = w.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def so3_exp(w: Tensor) -> Tensor:
    """Rotation vectors [..., 3] -> rotations [..., 3, 3]."""
    a, b, _ = _coefficients(w)
    cross, eye = cross_matrices(w), torch.eye(3, dtype=w.dtype, device=w.device)
    return eye + a * cross + b * (cross @ cross)


def so3_log(rotations: Tensor) -> Tensor:
    """Rotations [..., 3, 3] by less than half a turn -> rotation vectors [..., 3]."""
    r = rotations
    sines = 0.5 * torch.stack(
        [r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1
    )
    cosine = 0.5 * (r.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1)
    square = sines.square().sum(-1, keepdim=True)
    near = (square < 0.01) & (cosine > 0)
    sine = torch.where(near, torch.ones_like(square), square).sqrt()
    s = torch.where(near, square, torch.zeros_like(square))
    series = 1 + s * (1 / 6 + s * (3 / 40 + s * (15 / 336 + s * (105 / 3456 + s * 945 / 42240))))
    return torch.where(near, series, torch.atan2(sine, cosine) / sine) * sines


def se3_exp(twists: Tensor) -> Tensor:
    """Twists [..., 6] -> rigid motions [..., 4, 4]."""
    shift, w = twists[..., :3], twists[..., 3:]
    _, b, c = _coefficients(w)
    cross, eye = cross_matrices(w), torch.eye(3, dtype=w.dtype, device=w.device)
    along = eye + b * cross + c * (cross @ cross)
    return rigid(so3_exp(w), (along @ shift[..., None])[..., 0])


def rigid(rotations: Tensor, shifts: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] -> [..., 4, 4]."""
    top = torch.cat([rotations, shifts[..., None]], -1)
    last = torch.zeros_like(top[..., :1, :])
    last[..., 3] = 1
    return torch.cat([top, last], -2)


def _coefficients(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin t / t, (1 - cos t) / t^2 and (t - sin t) / t^3 of the angles t = |w|."""
    square = w.square().sum(-1)[..., None, None]
    near = square < SMALL
    q = torch.where(near, square, torch.zeros_like(square))
    series = (
        1 - q / 6 * (1 - q / 20 * (1 - q / 42 * (1 - q / 72 * (1 - q / 110)))),
        0.5 * (1 - q / 12 * (1 - q / 30 * (1 - q / 56 * (1 - q / 90 * (1 - q / 132))))),
        1 / 6 * (1 - q / 20 * (1 - q / 42 * (1 - q / 72 * (1 - q / 110 * (1 - q / 156))))),
    )
    far = torch.where(near, torch.ones_like(square), square)
    t = far.sqrt()
    quotients = t.sin() / t, (1 - t.cos()) / far, (t - t.sin()) / (far * t)
    a, b, c = (torch.where(near, one, other) for one, other in zip(series, quotients))
    return a, b, c


def similarity(source: Tensor, target: Tensor) -> tuple[float, Tensor, Tensor]:
    """(scale, rotation [3, 3], shift [3]) that bring points [N, 3] nearest to others (Umeyama 1991)."""
    middle, goal = source.mean(0), target.mean(0)
    a, b = source - middle, target - goal
    u, stretch, vt = torch.linalg.svd(b.T @ a)
    sign = torch.ones_like(stretch)
    sign[-1] = torch.linalg.det(u @ vt).sign()
    rotation = u @ torch.diag(sign) @ vt
    scale = float((stretch * sign).sum() / a.square().sum())
    return scale, rotation, goal - scale * rotation @ middle
