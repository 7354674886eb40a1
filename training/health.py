"""Numbers that are not finite: told, and dropped while they are few. Where they are many, the run ends, and
its last checkpoint is from before that."""

import torch

from scene.gaussian_model import GaussianModel
from strategies.adc import AdaptiveDensityControl
from utils.files import DataError

CHECK_EVERY = 100  # iterations; a loss that is not finite is noticed earlier
FEW = 0.01  # of the Gaussians


class Diverged(DataError):
    """Training cannot go on."""


@torch.no_grad()
def drop_unusable(gaussians: GaussianModel, density: AdaptiveDensityControl, origin: str) -> list[str]:
    """A model to start from may have many Gaussians that are not finite. Returns a line if it has some."""
    finite = gaussians.finite()
    if finite.all():
        return []
    if not finite.any():
        raise DataError(f"{origin}: has no Gaussian whose numbers are finite")
    gaussians.reindex(finite.nonzero()[:, 0])
    density.stats = None
    return [f"{origin}: {int((~finite).sum()):,} of {len(finite):,} Gaussians are left out, as not finite"]


@torch.no_grad()
def heal(gaussians: GaussianModel, density: AdaptiveDensityControl, when: str, known: bool = False) -> None:
    """Drop the Gaussians that are not finite. `when`, for the user; `known`: something is wrong already."""
    sums = torch.stack([value.sum() for value in [*gaussians.params.values(), gaussians.exposures]])
    if sums.isfinite().all() and not known:
        return
    finite, count = gaussians.finite(), len(gaussians)
    lost = count - int(finite.sum())
    if lost > FEW * count or not gaussians.exposures.isfinite().all():
        what = "Gaussians" if lost > FEW * count else "Gaussians, and exposures,"
        raise Diverged(f"{when}: {lost:,} of {count:,} {what} are not finite; lower learning rates may help")
    if not lost:
        density.say(f"{when}: all Gaussians are finite; training goes on")
        return
    gaussians.reindex(finite.nonzero()[:, 0])
    density.stats = None
    density.say(f"{when}: dropped {lost:,} Gaussians with numbers that are not finite")
