"""Numbers that are not finite: told, and dropped while they are few. Where they are many, the run ends, and
its last checkpoint is from before that."""

from collections.abc import Callable

import torch

from per_view import PerView
from scene.gaussian_model import GaussianModel
from strategies.strategy import Strategy
from utils.files import DataError

CHECK_EVERY = 100  # iterations; a loss that is not finite is noticed earlier
FEW = 0.01  # of the Gaussians


class Diverged(DataError):
    """Training cannot go on."""


@torch.no_grad()
def drop_unusable(gaussians: GaussianModel, strategy: Strategy) -> list[str]:
    """A model to start from may have many Gaussians that are not finite. Returns a line if it has some."""
    finite = gaussians.from_all(gaussians.finite())
    if finite.all():
        return []
    if not finite.any():
        raise ValueError("it has no Gaussian whose numbers are finite")
    gaussians.reindex(finite.nonzero()[:, 0])
    strategy.forget()
    return [f"{int((~finite).sum()):,} of {len(finite):,} Gaussians are left out, as they are not finite"]


@torch.no_grad()
def drop_nonfinite(
    gaussians: GaussianModel,
    modules: list[PerView],
    strategy: Strategy,
    when: str,
    say: Callable[[str], None],
    known: bool = False,
) -> None:
    """Drop the Gaussians that are not finite. `when`, for the user; `known`: something is wrong already."""
    learned = [value for module in modules for value in module.parameters()]
    sums = torch.stack([*gaussians.sums(), *(v.sum() for v in learned)])
    if not gaussians.ranks.any(known or not bool(sums.isfinite().all())):
        return
    finite, count = gaussians.from_all(gaussians.finite()), gaussians.total
    lost, bad = count - int(finite.sum()), [m.name for m in modules if not _all_finite(m)]
    if lost > FEW * count or bad:
        what = "".join(f", and {name}," for name in bad)
        raise Diverged(
            f"{when}: {lost:,} of {count:,} Gaussians{what} are not finite; lower learning rates may help"
        )
    if not lost:
        say(f"{when}: all Gaussians are finite; training goes on")
        return
    gaussians.reindex(finite.nonzero()[:, 0])
    strategy.forget()
    say(f"{when}: dropped {lost:,} Gaussians with numbers that are not finite")


def _all_finite(module: PerView) -> bool:
    return all(bool(value.isfinite().all()) for value in module.parameters())
