"""Building blocks that strategies share: which rows are wanted, and where new ones go."""

import torch
from torch import Tensor

from scene.gaussian_model import GaussianModel
from utils.geometry import morton_codes, rotation_matrices


def at_most(count: int) -> str:
    return f"from now on there are at most {count:,} Gaussians"


def strongest(pull: Tensor, growth: Tensor, room: int) -> Tensor:
    """Mask of the Gaussians that may grow: those that are pulled hardest, as long as `growth` rows for each
    add up to no more than `room`."""
    order = pull.argsort(descending=True, stable=True)
    mask = torch.zeros_like(pull, dtype=torch.bool)
    mask[order] = growth[order].cumsum(0) <= room
    return mask


def morton_order(means: Tensor) -> Tensor:
    """The order [N] in which neighbors in space are neighbors in memory: what a view shows is then read in
    long runs."""
    return morton_codes(means).argsort(stable=True)


def scattered(
    gaussians: GaussianModel, parents: Tensor, shrink: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Of the children of these rows: how far they are from their parent, at random places within it, and
    their own log scales, smaller by the factor `shrink`."""
    scales, quats = gaussians.scales[parents], gaussians.raw_quats[parents]
    offsets = scales * torch.randn(scales.shape, generator=generator, device=scales.device)
    return (rotation_matrices(quats) @ offsets[:, :, None])[:, :, 0], (scales / shrink).log()
