"""Where Gaussians are added and removed while training.

A strategy of your own is a subclass of AdaptiveDensityControl, made in train(). With refine() it says which
rows come and go; if the schedule is another one, with step(), too. Rows may also go in between, when memory
runs out (training/memory.py) or numbers are not finite (training/health.py): what has a row per Gaussian
is in `stats`, which are then thrown away. What else it keeps belongs in state_dict().
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

from arguments import OptimizationParams
from scene.gaussian_model import GaussianModel
from utils.geometry import morton_codes, rotation_matrices
from utils.memory import out_of_memory

CHILDREN = 2  # a split Gaussian becomes this many,
SHRINK = 0.8 * CHILDREN  # each smaller by this factor
MIN_OPACITY = 0.005  # fainter Gaussians are removed,
MAX_SCALE = 0.1  # and, after the first opacity reset, larger ones (as a fraction of the scene extent)


@dataclass(eq=False)
class AdaptiveDensityControl:
    """Clone small and split large Gaussians where the image pulls hardest; drop the faint ones.

    Kerbl et al. 2023, section 5, as published code has it. The statistics live here, one row per Gaussian,
    and are thrown away at each refinement, so they never have to follow the rows around.
    """

    start: int  # the first refinement is at the next multiple of `every`
    stop: int  # before this iteration
    every: int
    reset_every: int  # iterations between opacity resets
    grad_threshold: float  # mean screen-space gradient per view, in NDC (not pixel) units
    split_above: float  # fraction of the scene extent that separates split from clone
    generator: torch.Generator | None = None  # places the children of a split; None: PyTorch's own
    stats: ScreenStats | None = None  # since the last refinement
    cap: int = 0  # the most Gaussians there may be; 0: any number
    fits: int = 0  # the most that memory allows, once it has run out; 0: not known
    say: Callable[[str], None] = print

    @classmethod
    def from_params(cls, opt: OptimizationParams, generator: torch.Generator | None = None):
        return cls(
            start=opt.densify_from_iter,
            stop=opt.densify_until_iter,
            every=opt.densification_interval,
            reset_every=opt.opacity_reset_interval,
            grad_threshold=opt.densify_grad_threshold,
            split_above=opt.percent_dense,
            generator=generator,
            cap=opt.cap_max,
        )

    def stats_for(self, gaussians: GaussianModel, iteration: int) -> ScreenStats | None:
        """What this iteration's backward is to add to; None once refinement is over."""
        if iteration >= self.stop:
            return None
        if self.stats is None:
            self.stats = ScreenStats.zeros(len(gaussians), gaussians.device)
        return self.stats

    def step(self, gaussians: GaussianModel, iteration: int, extent: float, white_background: bool) -> None:
        """Call after optimizer.step(): the rows move, and gradients do not move with them."""
        if iteration >= self.stop:
            self.stats = None
            return
        if iteration > self.start and iteration % self.every == 0:
            if self.stats is not None:
                try:
                    self.refine(gaussians, extent, prune_large=iteration > self.reset_every)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self.stop_growing(len(gaussians), f"densification at iteration {iteration} undone")
            self.stats = None
        if iteration % self.reset_every == 0 or (white_background and iteration == self.start):
            gaussians.reset_opacity()

    def stop_growing(self, count: int, what: str) -> None:
        """Memory has run out: this many Gaussians, and no more."""
        self.fits, self.stats = count, None
        self.say(f"out of memory: {what}; from now on there are at most {count:,} Gaussians")

    def state_dict(self) -> dict:
        stats = None if self.stats is None else [v for v in vars(self.stats).values() if v is not None]
        generator = None if self.generator is None else self.generator.get_state()
        return {"stats": stats, "generator": generator, "fits": self.fits}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        stats = state["stats"]
        self.stats = None if stats is None else ScreenStats(*(value.to(device) for value in stats))
        self.fits = state.get("fits", 0)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    @torch.no_grad()
    def refine(self, gaussians: GaussianModel, extent: float, prune_large: bool) -> None:
        """Clone, split and prune in a single move of the rows: those that stay, then clones, then children.

        Only Gaussians that were there before are split: a clone has no gradient of its own yet. The original
        also means to prune what is too large on screen, but it has just cleared the radii that it looks at,
        so it never does.
        """
        scale = gaussians.scales.amax(dim=1)  # [N]
        assert self.stats is not None
        pull = self.stats.grad_norm_sum / self.stats.visits.clamp_min(1)
        large = scale > self.split_above * extent
        good = gaussians.opacities[:, 0] >= MIN_OPACITY
        stays = good & (scale <= MAX_SCALE * extent) if prune_large else good
        child_stays = good & (scale / SHRINK <= MAX_SCALE * extent) if prune_large else good

        wanted = pull >= self.grad_threshold
        if limit := min(filter(None, (self.cap, self.fits)), default=0):
            growth = torch.where(large, CHILDREN * child_stays.int() - stays.int(), stays.int())
            wanted &= strongest(pull.where(wanted, -1), growth, limit - int(stays.sum()))

        stay = (~(wanted & large)).nonzero()[:, 0]
        clones = (wanted & ~large).nonzero()[:, 0]
        children = (wanted & large).nonzero()[:, 0].repeat(CHILDREN)
        index = torch.cat([stay, clones, children])
        rows = torch.arange(len(index), device=index.device)
        is_new, is_child = rows >= len(stay), rows >= len(stay) + len(clones)

        # Neighbors in space become neighbors in memory: what a view shows is then read in long runs.
        keep = torch.where(is_child, child_stays[index], stays[index]).nonzero()[:, 0]
        keep = keep[morton_codes(gaussians.means[index[keep]]).argsort(stable=True)]
        index, is_new, rows = index[keep], is_new[keep], is_child[keep].nonzero()[:, 0]
        offsets, scaling = self._scattered(gaussians, index[rows])
        gaussians.reindex(index, fresh=is_new)  # all that may fail for want of memory is behind us
        gaussians.xyz.index_add_(0, rows, offsets)
        gaussians.scaling.index_copy_(0, rows, scaling)

    def _scattered(self, gaussians: GaussianModel, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Of the children of these rows: how far they are from their parent, at random places within it, and
        their own log scales."""
        scales, quats = gaussians.scales[parents], gaussians.rotation[parents]
        offsets = scales * torch.randn(scales.shape, generator=self.generator, device=scales.device)
        return (rotation_matrices(quats) @ offsets[:, :, None])[:, :, 0], (scales / SHRINK).log()


def strongest(pull: Tensor, growth: Tensor, room: int) -> Tensor:
    """Mask of the Gaussians that may grow: those that are pulled hardest, as long as `growth` rows for each
    add up to no more than `room`."""
    order = pull.argsort(descending=True, stable=True)
    mask = torch.zeros_like(pull, dtype=torch.bool)
    mask[order] = growth[order].cumsum(0) <= room
    return mask
