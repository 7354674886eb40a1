"""Rotations and rigid motions, from and to vectors, with derivatives everywhere that they are used.

A rotation vector w [..., 3] turns by |w| about w. A twist [..., 6] is (shift, rotation vector), both in the
axes of what moves: exp of it is the motion that goes on evenly for one unit of time.
"""

import math
from functools import cache

import torch
from torch import Tensor

SMALL = 0.25  # squared angle below which series are exact, and quotients are not
# Terms of power series: of those in _coefficients, and of arcsin x / x, by powers of the square
SINES = tuple(tuple((-1) ** k / math.factorial(2 * k + of) for of in (2, 3)) for k in range(6))
ARCSINE = ((1.0,), (1 / 6,), (3 / 40,), (15 / 336,), (105 / 3456,), (945 / 42240,))
EYE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
CROSS = ((0, 0, 0, 0, 0, -1, 0, 1, 0), (0, 0, 1, 0, 0, 0, -1, 0, 0), (0, -1, 0, 1, 0, 0, 0, 0, 0))


def cross_matrices(w: Tensor) -> Tensor:
    """[..., 3] -> [..., 3, 3]: the matrix that takes v to w x v."""
    return (w @ _fixed(CROSS, w.dtype, w.device)).unflatten(-1, (3, 3))


def so3_exp(w: Tensor) -> Tensor:
    """Rotation vectors [..., 3] -> rotations [..., 3, 3], by quaternions: few calls."""
    half = 0.5 * w
    angle = torch.linalg.vector_norm(half, dim=-1, keepdim=True)
    cross = cross_matrices(torch.sinc(angle / math.pi) * half)
    return _fixed(EYE, w.dtype, w.device) + 2 * (angle.cos()[..., None] * cross + cross @ cross)


def so3_log(rotations: Tensor) -> Tensor:
    """Rotations [..., 3, 3] by less than half a turn -> rotation vectors [..., 3]."""
    _, xy, xz, yx, _, yz, zx, zy, _ = rotations.flatten(-2).unbind(-1)
    sines = 0.5 * torch.stack([zy - yz, xz - zx, yx - xy], -1)
    cosine = 0.5 * (rotations.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1)
    square = sines.square().sum(-1, keepdim=True)
    near = (square < 0.01) & (cosine > 0)
    sine = torch.where(near, torch.ones_like(square), square).sqrt()
    s = torch.where(near, square, torch.zeros_like(square))
    series = _series(s, ARCSINE)
    return torch.where(near, series, torch.atan2(sine, cosine) / sine) * sines


def se3_exp(twists: Tensor) -> Tensor:
    """Twists [..., 6] -> rigid motions [..., 4, 4]."""
    shift, w = twists[..., :3], twists[..., 3:]
    b, c = _coefficients(w)
    cross, eye = cross_matrices(w), torch.eye(3, dtype=w.dtype, device=w.device)
    along = eye + b * cross + c * (cross @ cross)
    return rigid(so3_exp(w), (along @ shift[..., None])[..., 0])


def rigid(rotations: Tensor, shifts: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] -> [..., 4, 4]."""
    top = torch.cat([rotations, shifts[..., None]], -1)
    last = torch.zeros_like(top[..., :1, :])
    last[..., 3] = 1
    return torch.cat([top, last], -2)


def _coefficients(w: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - cos t) / t^2 and (t - sin t) / t^3 of the angles t = |w|."""
    square = w.square().sum(-1)[..., None, None]
    near = square < SMALL
    series = _series(torch.where(near, square, torch.zeros_like(square)), SINES)  # [..., 1, 2]
    far = torch.where(near, torch.ones_like(square), square)
    inverse = far.rsqrt()
    t = far * inverse
    over_square = inverse * inverse
    quotients = (1 - t.cos()) * over_square, (t - t.sin()) * inverse * over_square
    b, c = torch.where(near, series, torch.cat(quotients, -1)).split(1, -1)
    return b, c


def _series(x: Tensor, factors: tuple) -> Tensor:
    """n power series of x [..., 1] in a few calls: [..., n]."""
    exponents = tuple(range(len(factors)))
    return x ** _fixed(exponents, x.dtype, x.device) @ _fixed(factors, x.dtype, x.device)


@cache
def _fixed(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant, made once: a GPU would be waited for every time."""
    return torch.tensor(values, dtype=dtype, device=device)


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
