"""Density control to a budget, where photos have edges: after Improved-GS, Deng et al. 2025.

The number of Gaussians follows a curve up to --cap_max. Candidates are those with large absolute gradients;
among them chance decides, in proportion to what --grow_by names: their share in edges of the photos or in
the error, their gradient, or how much their pixels disagree. They split along their longest axis. Opacities
are reset now and then, and what does not recover is removed; or they go down a little in each refinement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

from arguments import ConfigError, Options, PipelineParams
from gaussian_renderer import Splats
from gaussian_renderer.sharded import splats_of
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from strategies.rows import check_statistics, draw_different, morton_order, split_along
from strategies.scores import disagreement, edges, errors, relative_shares, visibility
from strategies.strategy import Strategy

VIEWS = 10  # of which edges are looked at in a refinement,
ALL_VIEWS_AFTER = 400  # but all of them so long after a reset
FULL_BEFORE_END = 500  # iterations before the end of densification the budget is reached;
LATE_THRESHOLD = 2 / 3  # from then on smaller gradients do, and the larger ones win
MIN_OPACITY = 0.005
FAINTEST = 1e-4  # that opacities go down to by themselves
FIRST_CLEANING, FIRST_MIN_OPACITY = 300, 0.02
RESET_OPACITY = 0.05
RECOVERY = 300  # iterations after a reset,
RECOVERIES = 2  # of so many resets,
NOT_RECOVERED = 0.2  # this part of the Gaussians goes, the faintest
ROUNDS = 16  # in which final_count is reached, in half of the time after densification,
ROUND_VIEWS = 50  # each by so many views
REACH = 1.35  # standard deviations from a parent to its children: 3 * 0.45
ALONG, ACROSS = 0.55, math.sqrt(1 - 0.45**2)  # scales of children, relative to the parent's
CHILD_OPACITY = 0.6  # relative to the parent's


@dataclass(eq=False)
class Improved(Strategy):
    for_many = True

    begin: int  # gradients count from here on
    end: int  # before this iteration
    every: int
    reset_every: int
    grad_threshold: float  # mean over views of the absolute screen-space gradient, in NDC units
    budget: int  # of Gaussians
    generator: torch.Generator  # the CPU's
    grow_by: str = "edges"  # what is a Gaussian's chance: its share in edges or error, gradient, disagreement
    lambda_dssim: float = 0.2
    opacity_decay: float = 0.0  # in place of resets: what each refinement takes from opacities
    final_count: int = 0  # how many are left some time after densification; 0: all
    rounds_every: int = 1  # iterations between the rounds in which they become so many
    fits: int = 0  # the most that memory allows, once it has run out; 0: not known
    say: Callable[[str], None] = print

    def __post_init__(self):
        self._stats: ScreenStats | None = None  # since the last refinement
        self._cameras: Sequence[Camera] = ()
        self._pipe = PipelineParams()
        self._background = torch.zeros(3)

    def see(self, cameras: Sequence[Camera], pipe: PipelineParams, background: Tensor) -> None:
        self._cameras, self._pipe, self._background = cameras, pipe, background

    def stats(self, gaussians: GaussianModel, iteration: int) -> ScreenStats | None:
        if not self.begin < iteration < self.end:
            return None
        if self._stats is None:
            self._stats = ScreenStats.zeros(len(gaussians), gaussians.device, absolute=True)
        return self._stats

    def after_step(self, gaussians: GaussianModel, iteration: int) -> None:
        if iteration >= self.end:
            self.forget()
            self._thin(gaussians, iteration)
            return
        what, since_reset = f"densification at iteration {iteration}", iteration % self.reset_every
        if iteration == FIRST_CLEANING:
            self.if_it_fits(gaussians, what, partial(self._keep_above, gaussians, FIRST_MIN_OPACITY))
        if self._stats is not None and iteration % self.every == 0:
            self.if_it_fits(gaussians, what, partial(self.refine, gaussians, iteration))
        if self.opacity_decay:
            return
        if since_reset == RECOVERY and 1 <= iteration // self.reset_every <= RECOVERIES:
            self.if_it_fits(gaussians, what, partial(self._drop_faintest, gaussians))
        if since_reset == 0:
            gaussians.reset_opacity(RESET_OPACITY)

    def forget(self) -> None:
        self._stats = None

    def limit(self, count: int) -> None:
        self.fits = count
        self.forget()

    def allowed(self, iteration: int) -> int:
        """How many Gaussians there may be after this iteration: a root up to the budget."""
        full = self.end - FULL_BEFORE_END
        part = (iteration - self.begin) / (full - self.begin) if iteration < full else 1.0
        count = int(self.budget * math.sqrt(part))
        return min(count, self.fits or count)

    @torch.no_grad()
    def refine(self, gaussians: GaussianModel, iteration: int) -> None:
        """Split those that are chosen and remove the faint, in a single move of the rows."""
        opacities = gaussians.from_all(gaussians.opacities)
        stays = opacities[:, 0] >= MIN_OPACITY
        chosen = self._chosen(gaussians, iteration, stays)
        stays[chosen] = False
        kept = stays.nonzero()[:, 0]
        index = torch.cat([kept, chosen, chosen])
        offsets, longest = split_along(gaussians, chosen, REACH)
        order = morton_order(gaussians.from_all(gaussians.means)[index])
        rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        children = rows[len(kept) :]  # where they will be
        fresh = torch.zeros(len(index), dtype=torch.bool, device=order.device).index_fill_(0, children, True)
        factors = torch.where(longest, math.log(ALONG), math.log(ACROSS)).repeat(2, 1)
        logits = (CHILD_OPACITY * opacities[chosen]).logit().repeat(2, 1)
        gaussians.reindex(index[order], fresh=fresh)  # all that may fail for want of memory is behind us
        if self.opacity_decay:
            less = (gaussians.opacities - self.opacity_decay).clamp_min(FAINTEST)
            gaussians.opacity_logits.copy_(less.logit())
        gaussians.add_to("means", children, offsets.flatten(0, 1))
        gaussians.add_to("log_scales", children, factors)
        gaussians.set_rows("opacity_logits", children, logits)
        self.forget()

    def _chosen(self, gaussians: GaussianModel, iteration: int, stays: Tensor) -> Tensor:
        """Rows that split: as many as there is room for."""
        stats, room = self._stats, max(self.allowed(iteration) - int(stays.sum()), 0)
        assert stats is not None and stats.abs_grad_norm_sum is not None
        pull = gaussians.from_all(stats.abs_grad_norm_sum / stats.visits.clamp_min(1))
        late = iteration > self.end - FULL_BEFORE_END
        threshold = self.grad_threshold * (LATE_THRESHOLD if late else 1)
        candidates = (stays & (pull >= threshold)).nonzero()[:, 0]
        if len(candidates) <= room:
            return candidates
        score = pull if late or self.grow_by == "gradient" else self._score(gaussians, iteration)
        return candidates[draw_different(score[candidates], room, self.generator)]

    def _score(self, gaussians: GaussianModel, iteration: int) -> Tensor:
        views, splats = self._views(iteration), self._splats(gaussians)
        if self.grow_by == "edges":
            return relative_shares(splats, views, edges)
        if self.grow_by == "disagreement":
            return disagreement(splats, views, self.lambda_dssim)
        return relative_shares(splats, views, partial(errors, splats=splats))

    def _splats(self, gaussians: GaussianModel) -> Splats:
        return splats_of(gaussians, self._pipe, self._background.to(gaussians.device))

    def _thin(self, gaussians: GaussianModel, iteration: int) -> None:
        """In each round the same part of the Gaussians goes, the least visible."""
        number, rest = divmod(iteration - self.end, self.rounds_every)
        if rest or number >= ROUNDS or not 0 < self.final_count < gaussians.total:
            return
        left = (self.final_count / gaussians.total) ** (1 / (ROUNDS - number))
        count = max(round(left * gaussians.total), self.final_count)
        what = f"removal of Gaussians at iteration {iteration}"
        self.if_it_fits(gaussians, what, partial(self._keep_most_visible, gaussians, count))

    @torch.no_grad()
    def _keep_most_visible(self, gaussians: GaussianModel, count: int) -> None:
        score = visibility(self._splats(gaussians), self._some(ROUND_VIEWS))
        stays = torch.zeros_like(score, dtype=torch.bool)
        stays[score.argsort(descending=True, stable=True)[:count]] = True
        self._keep(gaussians, stays)

    def _views(self, iteration: int) -> list[Camera]:
        resets, since = divmod(iteration, self.reset_every)
        if since == ALL_VIEWS_AFTER and 1 <= resets <= RECOVERIES:
            return list(self._cameras)
        return self._some(VIEWS)

    def _some(self, count: int) -> list[Camera]:
        order = torch.randperm(len(self._cameras), generator=self.generator)
        return [self._cameras[i] for i in order[:count].tolist()]

    @torch.no_grad()
    def _keep_above(self, gaussians: GaussianModel, opacity: float) -> None:
        self._keep(gaussians, gaussians.from_all(gaussians.opacities[:, 0]) >= opacity)

    @torch.no_grad()
    def _drop_faintest(self, gaussians: GaussianModel) -> None:
        """Of those that a reset made faint, what others have replaced by now."""
        order = gaussians.from_all(gaussians.opacity_logits[:, 0]).argsort(stable=True)
        stays = torch.ones_like(order, dtype=torch.bool)
        stays[order[: int(NOT_RECOVERED * len(order))]] = False
        self._keep(gaussians, stays)

    def _keep(self, gaussians: GaussianModel, stays: Tensor) -> None:
        gaussians.reindex(stays.nonzero()[:, 0])
        self.forget()

    def state_dict(self) -> dict:
        stats = None if self._stats is None else list(vars(self._stats).values())
        return {"stats": stats, "generator": self.generator.get_state(), "fits": self.fits}

    def load_state_dict(self, state: dict) -> None:
        self._stats = None if state["stats"] is None else ScreenStats(*state["stats"])
        self.generator.set_state(state["generator"])
        self.fits = int(state["fits"])

    def check(self, gaussians: GaussianModel) -> None:
        check_statistics(self._stats, len(gaussians))


def make(options: Options, extent: float, say: Callable[[str], None]) -> Improved:
    opt = options.opt
    if opt.cap_max == 0:
        raise ConfigError("cap_max must be at least 1 with --strategy improved, whose budget it is, got 0")
    if opt.final_count and opt.densify_until_iter + ROUNDS > opt.iterations:
        raise ConfigError(
            f"final_count is reached after densification: densify_until_iter must be {ROUNDS} less than "
            f"iterations, got {opt.densify_until_iter} of {opt.iterations}"
        )
    return Improved(
        begin=opt.densify_from_iter,
        end=opt.densify_until_iter,
        every=opt.densification_interval,
        reset_every=opt.opacity_reset_interval,
        grad_threshold=opt.densify_grad_threshold,
        budget=opt.cap_max,
        grow_by=opt.grow_by,
        lambda_dssim=opt.lambda_dssim,
        opacity_decay=opt.opacity_decay,
        final_count=opt.final_count,
        rounds_every=max((opt.iterations - opt.densify_until_iter) // (2 * ROUNDS), 1),
        generator=torch.Generator().manual_seed(options.run.seed),
        say=say,
    )
