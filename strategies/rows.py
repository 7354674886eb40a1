"""Building blocks that strategies share: which rows are wanted, and where new ones go."""

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

from scene.gaussian_model import GaussianModel
from utils.geometry import morton_codes, rotation_matrices

STEPS = 2**32  # to which draw() rounds a weight of 1


def check_statistics(stats: ScreenStats | None, count: int) -> None:
    """Raise ValueError if they do not have a row for each of so many Gaussians."""
    for value in vars(stats).values() if stats else ():
        if value is not None and (value.shape != (count,) or value.dtype != torch.float32):
            raise ValueError(f"statistics must be [{count}] floats, got {list(value.shape)}")


def at_most(count: int) -> str:
    return f"from now on there are at most {count:,} Gaussians"


def strongest(pull: Tensor, growth: Tensor, room: int) -> Tensor:
    """Mask of the Gaussians that may grow: those that are pulled hardest, as long as `growth` rows for each
    add up to no more than `room`."""
    order = pull.argsort(descending=True, stable=True)
    mask = torch.zeros_like(pull, dtype=torch.bool)
    mask[order] = growth[order].cumsum(0) <= room
    return mask


def draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows [count], drawn with replacement in proportion to weights [N] in [0, 1].

    On integers: the same on any device for any number of rows, of which torch.multinomial takes 2^24 at most.
    """
    ends = (weights.double() * STEPS).long().cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        return torch.empty(0, dtype=torch.long, device=weights.device)
    places = torch.randint(total, (count,), generator=generator, device=weights.device)
    return torch.searchsorted(ends, places, right=True)


def draw_different(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, or all if there are fewer, drawn without replacement in proportion to weights [N].

    The generator is the CPU's: any device draws the same. Rows of weight 0 come last.
    """
    waits = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator)
    return (weights.double() / waits.to(weights.device)).argsort(descending=True, stable=True)[:count]


def split_along(gaussians: GaussianModel, parents: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Two children of each of these rows [K], on both sides of it along its longest axis, `reach` standard
    deviations away: how far they are from the parent [2, K, 3], and which of its scales is that axis [K, 3].
    """
    scales = gaussians.from_all(gaussians.scales)[parents]
    turn = rotation_matrices(gaussians.from_all(gaussians.raw_quats)[parents])
    first = scales.argmax(dim=1)[:, None]  # of equal ones
    longest = torch.arange(3, device=scales.device) == first
    offset = (turn * (reach * scales * longest)[:, None, :]).sum(2)
    return torch.stack([offset, -offset]), longest


def morton_order(means: Tensor) -> Tensor:
    """The order [N] in which neighbors in space are neighbors in memory: what a view shows is then read in
    long runs."""
    return morton_codes(means).argsort(stable=True)


def scattered(
    gaussians: GaussianModel, parents: Tensor, shrink: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Of the children of these rows: how far they are from their parent, at random places within it, and
    their own log scales, smaller by the factor `shrink`."""
    scales = gaussians.from_all(gaussians.scales)[parents]
    quats = gaussians.from_all(gaussians.raw_quats)[parents]
    offsets = scales * torch.randn(scales.shape, generator=generator, device=scales.device)
    return (rotation_matrices(quats) @ offsets[:, :, None])[:, :, 0], (scales / shrink).log()
