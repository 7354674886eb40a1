"""When memory runs out: the step is taken again, with fewer Gaussians if need be, and the run goes on."""

from collections.abc import Callable
from typing import TypeVar

import torch

from scene.gaussian_model import GaussianModel
from strategies.rows import at_most
from strategies.strategy import Strategy
from utils.files import DataError
from utils.memory import out_of_memory

Result = TypeVar("Result")
ATTEMPTS = 20
KEEP = 0.9  # of the Gaussians, if giving back what PyTorch holds in reserve was not enough


def step_that_fits(
    step: Callable[[], Result],
    iteration: int,
    gaussians: GaussianModel,
    strategy: Strategy,
    say: Callable[[str], None],
) -> Result:
    """The result of step(), which moves nothing if it fails."""
    for attempt in range(ATTEMPTS):
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or gaussians.total < 2:
                raise
        gaussians.forget_gradients()  # here, not above: the error no longer holds the step's tensors
        if gaussians.device.type == "cuda":
            torch.cuda.empty_cache()
        if attempt:
            drop_faintest(gaussians, KEEP)
        strategy.limit(gaussians.total)
        say(f"out of memory: iteration {iteration} is taken again; {at_most(gaussians.total)}")
    raise DataError(
        f"there is not enough memory for {gaussians.total:,} Gaussians and the photos; smaller ones (-r), or "
        "--data_device cpu, may help"
    )


@torch.no_grad()
def drop_faintest(gaussians: GaussianModel, keep: float) -> None:
    count = max(int(keep * gaussians.total), 1)
    opacity = gaussians.from_all(gaussians.opacity_logits.detach()[:, 0]).cpu()
    strongest = opacity.argsort(descending=True, stable=True)[:count]
    gaussians.reindex(strongest.sort().values.to(gaussians.device))
