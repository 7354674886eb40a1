"""Adaptive density control, the published strategy (Kerbl et al. 2023, section 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diff_gaussian_rasterization import ScreenStats

from arguments import Options
from scene.gaussian_model import GaussianModel
from strategies.rows import check_statistics, morton_order, scattered, strongest
from strategies.strategy import Strategy

CHILDREN = 2  # a split Gaussian becomes this many,
SHRINK = 0.8 * CHILDREN  # each smaller by this factor
MIN_OPACITY = 0.005  # fainter Gaussians are removed,
MAX_SCALE = 0.1  # and, after the first opacity reset, larger ones (as a fraction of the scene extent)


@dataclass(eq=False)
class AdaptiveDensityControl(Strategy):
    """Clone small and split large Gaussians where the image pulls hardest; drop the faint ones.

    Kerbl et al. 2023, section 5, as published code has it. The statistics live here, one row per Gaussian,
    and are thrown away at each refinement, so they never have to follow the rows around.
    """

    for_many = True

    begin: int  # the first refinement is at the next multiple of `every`
    end: int  # before this iteration
    every: int
    reset_every: int  # iterations between opacity resets
    grad_threshold: float  # mean screen-space gradient per view, in NDC (not pixel) units
    split_above: float  # fraction of the scene extent that separates split from clone
    extent: float  # radius of the scene
    white_background: bool = False  # opacities are reset once more, when densification begins
    generator: torch.Generator | None = None  # places the children of a split; None: PyTorch's own
    absolute: bool = False  # gradients are summed over pixels by their absolute values (Ye et al. 2024)
    cap: int = 0  # the most Gaussians there may be; 0: any number
    fits: int = 0  # the most that memory allows, once it has run out; 0: not known
    say: Callable[[str], None] = print

    def __post_init__(self):
        self._stats: ScreenStats | None = None  # since the last refinement

    def stats(self, gaussians: GaussianModel, iteration: int) -> ScreenStats | None:
        if iteration >= self.end:
            return None
        if self._stats is None:
            self._stats = ScreenStats.zeros(len(gaussians), gaussians.device, self.absolute)
        return self._stats

    def after_step(self, gaussians: GaussianModel, iteration: int) -> None:
        if iteration >= self.end:
            self.forget()
            return
        if iteration > self.begin and iteration % self.every == 0:
            if self._stats is not None:
                refine = partial(self.refine, gaussians, prune_large=iteration > self.reset_every)
                self.if_it_fits(gaussians, f"densification at iteration {iteration}", refine)
            self.forget()
        if iteration % self.reset_every == 0 or (self.white_background and iteration == self.begin):
            gaussians.reset_opacity()

    def forget(self) -> None:
        self._stats = None

    def limit(self, count: int) -> None:
        self.fits = count
        self.forget()

    def state_dict(self) -> dict:
        stats = None if self._stats is None else [v for v in vars(self._stats).values() if v is not None]
        generator = None if self.generator is None else self.generator.get_state()
        return {"stats": stats, "generator": generator, "fits": self.fits}

    def load_state_dict(self, state: dict) -> None:
        stats, self.fits = state["stats"], int(state.get("fits", 0))
        if not all(isinstance(value, torch.Tensor) for value in stats or ()) or self.fits < 0:
            raise ValueError("its statistics must be tensors, and fits a count")
        known = len(stats or ()) == (3 if self.absolute else 2)  # --absgrad may have been off then
        self._stats = ScreenStats(*stats or ()) if known else None
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def check(self, gaussians: GaussianModel) -> None:
        check_statistics(self._stats, len(gaussians))

    @torch.no_grad()
    def refine(self, gaussians: GaussianModel, prune_large: bool) -> None:
        """Clone, split and prune in a single move of the rows: those that stay, then clones, then children.

        Only Gaussians that were there before are split: a clone has no gradient of its own yet. The original
        also means to prune what is too large on screen, but it has just cleared the radii that it looks at,
        so it never does.
        """
        extent, stats = self.extent, self._stats
        assert stats is not None
        scale = gaussians.from_all(gaussians.scales.amax(dim=1))  # [N]
        pull = stats.abs_grad_norm_sum if self.absolute else stats.grad_norm_sum
        assert pull is not None
        pull = gaussians.from_all(pull / stats.visits.clamp_min(1))
        large = scale > self.split_above * extent
        good = gaussians.from_all(gaussians.opacities[:, 0]) >= MIN_OPACITY
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

        keep = torch.where(is_child, child_stays[index], stays[index]).nonzero()[:, 0]
        keep = keep[morton_order(gaussians.from_all(gaussians.means)[index[keep]])]
        index, is_new, rows = index[keep], is_new[keep], is_child[keep].nonzero()[:, 0]
        offsets, log_scales = scattered(gaussians, index[rows], SHRINK, self.generator)
        gaussians.reindex(index, fresh=is_new)  # all that may fail for want of memory is behind us
        gaussians.add_to("means", rows, offsets)
        gaussians.set_rows("log_scales", rows, log_scales)


def make(options: Options, extent: float, say: Callable[[str], None]) -> AdaptiveDensityControl:
    opt = options.opt
    return AdaptiveDensityControl(
        begin=opt.densify_from_iter,
        end=opt.densify_until_iter,
        every=opt.densification_interval,
        reset_every=opt.opacity_reset_interval,
        grad_threshold=opt.densify_grad_threshold,
        split_above=opt.percent_dense,
        extent=extent,
        white_background=options.model.white_background,
        absolute=opt.absgrad,
        cap=opt.cap_max,
        say=say,
    )
