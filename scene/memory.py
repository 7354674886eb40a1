"""When memory runs out: the step is taken again, with fewer Gaussians if need be, and the run goes on."""

import os
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from scene.files import DataError

if TYPE_CHECKING:
    from scene.density import AdaptiveDensityControl
    from scene.gaussian_model import GaussianModel

Result = TypeVar("Result")
ATTEMPTS = 20
KEEP = 0.9  # of the Gaussians, if giving back what PyTorch holds in reserve was not enough


def grow_in_place() -> None:
    """Gaussians become more and more, and what they leave is too small for their successors: let PyTorch put
    pieces of GPU memory beside each other. To be called before it has any; who has settings keeps them."""
    able = sys.platform == "linux" and "microsoft" not in platform.release().lower()  # Windows cannot
    if able and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has its own error for GPUs; on the host it and C++ have others."""
    text = str(error)
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)
    return on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def in_short(error: BaseException) -> str:
    """PyTorch says much about its memory; what to do is not among it."""
    what = str(error).partition(". ")[0] or "out of memory"
    return f"{what}; smaller photos (-r), or --data_device cpu, may help"


def step_that_fits(
    step: Callable[[], Result], iteration: int, gaussians: "GaussianModel", density: "AdaptiveDensityControl"
) -> Result:
    """The result of step(), which moves nothing if it fails."""
    for attempt in range(ATTEMPTS):
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(gaussians) < 2:
                raise
        gaussians.forget_gradients()  # here, not above: the error no longer holds the step's tensors
        if gaussians.device.type == "cuda":
            torch.cuda.empty_cache()
        if attempt:
            drop_faintest(gaussians, KEEP)
        density.stop_growing(len(gaussians), f"iteration {iteration} is taken again")
    raise DataError(
        f"there is not enough memory for {len(gaussians):,} Gaussians and the photos; smaller ones (-r), or "
        "--data_device cpu, may help"
    )


@torch.no_grad()
def drop_faintest(gaussians: "GaussianModel", keep: float) -> None:
    count = max(int(keep * len(gaussians)), 1)
    opacity = gaussians.opacity.detach()[:, 0].cpu()  # the device has no room to sort
    strongest = opacity.argsort(descending=True, stable=True)[:count]
    gaussians.reindex(strongest.sort().values.to(gaussians.device))
