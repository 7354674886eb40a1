"""Views of BYOL: what may change while the thing stays the same. Each picture draws for itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = {  # least area of a crop; probability of blur and of solarizing in the one view, in the other
    "paper": (0.08, (1.0, 0.0), (0.1, 0.2)),
    "mild": (0.4, (0.0, 0.0), (0.0, 0.0)),  # for pictures of 32x32 and minutes, not 224x224 and days
}


def crop(x: Tensor, g, least: float) -> Tensor:
    """A part of the picture, aspect 3/4 to 4/3, in full size again; every other one mirrored."""
    n = len(x)
    area = torch.empty(n, 10).uniform_(least, 1, generator=g)
    aspect = torch.empty(n, 10).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])  # [2, n, 10]: ten tries
    fits = (sides <= 1).all(0)
    sides = torch.where(fits.any(1), sides[:, torch.arange(n), fits.int().argmax(1)], 1)
    shift = (1 - sides) * torch.empty(2, n).uniform_(-1, 1, generator=g)
    sides[0, torch.rand(n, generator=g) < 0.5] *= -1
    theta = torch.cat([torch.diag_embed(sides.T), shift.T[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, "bicubic", "border", align_corners=False).clamp(0, 1)


def gray(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)


def hue(x: Tensor, turn) -> Tensor:
    """The hue of HSV moved; a channel falls with the distance of the hue from its own color."""
    top, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    sixth = torch.where(top == r, g - b, torch.where(top == g, b - r, r - g)) / chroma.clamp_min(1e-8)
    sixth = sixth + torch.where(top == r, 0, torch.where(top == g, 2, 4)) + 6 * turn
    k = (sixth + torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


JITTER = (  # (what a number of each picture does to it, the largest number)
    (lambda x, by: x * (1 + by), 0.4),  # brightness
    (lambda x, by: torch.lerp(gray(x).mean((1, 2, 3), keepdim=True), x, 1 + by), 0.4),  # contrast
    (lambda x, by: torch.lerp(gray(x), x, 1 + by), 0.2),  # saturation
    (hue, 0.1),
)


def jitter(x: Tensor, g) -> Tensor:
    """All four in random order, for four pictures of five."""
    order = torch.rand(len(x), 4, generator=g).argsort(1)
    by = torch.empty(len(x), 4).uniform_(-1, 1, generator=g) * (torch.rand(len(x), 1, generator=g) < 0.8)
    for rank in range(4):
        for k, (change, most) in enumerate(JITTER):
            some = (order[:, rank] == k).nonzero()[:, 0]
            x[some] = change(x[some], most * by[some, k].view(-1, 1, 1, 1)).clamp(0, 1)
    return x


def blur(x: Tensor, g) -> Tensor:
    """A Gaussian over three pixels: a tenth of the side, as in the paper."""
    side = (-0.5 / torch.empty(len(x)).uniform_(0.1, 2, generator=g) ** 2).exp()
    taps = torch.stack([side, torch.ones_like(side), side], 1) / (1 + 2 * side[:, None])
    kernels = (taps[:, :, None] * taps[:, None]).repeat_interleave(3, 0)[:, None]
    padded = F.pad(x, (1, 1, 1, 1), "reflect").flatten(0, 1)[None]
    return F.conv2d(padded, kernels, groups=3 * len(x)).view_as(x)


def view(x: Tensor, g, least: float, blurred: float, solarized: float) -> Tensor:
    """uint8 pictures to what the network sees."""
    x = jitter(crop(x / 255, g, least), g)
    for share, change in (
        (0.2, gray),
        (blurred, lambda x: blur(x, g)),
        (solarized, lambda x: x.minimum(1 - x)),
    ):
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < share, change(x), x)
    return scaled(x)


def scaled(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.25
