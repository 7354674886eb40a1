"""Density control as Markov chain Monte Carlo (Kheradmand et al. 2024).

No gradient decides. Gaussians that have become invisible move onto visible ones, new ones are born in the
same way until there are as many as asked for, and noise lets faint ones explore. Copies share the opacity of
what they are copies of such that the picture stays. Opacities and scales are held down by two terms of the
loss (--opacity_reg, --scale_reg); opacities are never reset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arguments import ConfigError, Options, pick_device
from scene.gaussian_model import GaussianModel
from strategies.rows import draw, morton_order
from strategies.strategy import Strategy
from utils.geometry import rotation_matrices

DEAD = 0.005  # at most this opaque
NEARLY_ONE = 1 - torch.finfo(torch.float32).eps
GROWTH = 1.05  # of the number of Gaussians in a refinement
MOST_COPIES = 51  # that a Gaussian is replaced by in one go; beyond, each is as if there were so many
START_OPACITY = 0.5
START_SCALE = 0.1  # of the distance to the neighbors
GATE = 100.0  # how sharply noise ends above the opacity of dead ones
USUAL_EXTENT = 5.0  # of scenes for which noise_lr has its published value
PIECE = 2**20  # rows that get their noise at a time: it takes memory


class Rows(NamedTuple):
    """What the model is to become."""

    origin: Tensor  # [M]     which row of the model each of them was
    opacities: Tensor  # [M]     float64
    scales: Tensor  # [M, 3]  float64
    changed: Tensor  # [M]     bool: a copy, or something was copied from it


@dataclass(eq=False)
class MarkovChain(Strategy):
    for_many = True

    begin: int  # the first refinement is at the next multiple of `every`
    end: int  # before this iteration; noise goes on
    every: int
    cap: int  # the most Gaussians there may be
    noise_lr: float
    generator: torch.Generator  # of targets and noise; on the device of the Gaussians
    fits: int = 0  # the most that memory allows, once it has run out; 0: not known
    say: Callable[[str], None] = print

    @torch.no_grad()
    def start(self, gaussians: GaussianModel) -> None:
        gaussians.opacity_logits.fill_(math.log(START_OPACITY / (1 - START_OPACITY)))
        gaussians.log_scales.add_(math.log(START_SCALE))

    def after_step(self, gaussians: GaussianModel, iteration: int) -> None:
        if self.begin < iteration < self.end and iteration % self.every == 0:
            what = f"densification at iteration {iteration}"
            self.if_it_fits(gaussians, what, partial(self.refine, gaussians))
        self.explore(gaussians)

    @torch.no_grad()
    def refine(self, gaussians: GaussianModel) -> None:
        """Dead Gaussians move onto living ones, then new ones are born, in a single move of the rows."""
        count, device = gaussians.total, gaussians.device
        opacities = gaussians.from_all(gaussians.opacities[:, 0]).double()
        scales = gaussians.from_all(gaussians.scales).double()
        unchanged = torch.zeros(count, dtype=torch.bool, device=device)
        rows = Rows(torch.arange(count, device=device), opacities, scales, unchanged)
        rows = self._born(self._relocated(rows))
        if not rows.changed.any():
            return
        order = morton_order(gaussians.from_all(gaussians.means)[rows.origin])
        origin, opacities, scales, changed = (value[order] for value in rows)
        gaussians.reindex(origin, fresh=changed)  # all that may fail for want of memory is behind us
        opacities, scales, changed = map(gaussians.own, (opacities, scales, changed))
        logits, log_scales = gaussians.opacity_logits, gaussians.log_scales
        logits.copy_(torch.where(changed[:, None], opacities.logit()[:, None].float(), logits))
        log_scales.copy_(torch.where(changed[:, None], scales.log().float(), log_scales))

    def _relocated(self, rows: Rows) -> Rows:
        dead = rows.opacities <= DEAD
        places = dead.nonzero()[:, 0]
        targets = draw(rows.opacities.where(~dead, 0), len(places), self.generator)
        if not len(targets):  # nobody is dead, or everybody
            return rows
        index = torch.arange(len(dead), device=dead.device)
        index[places] = targets
        return copied(rows, index, targets)

    def _born(self, rows: Rows) -> Rows:
        count = len(rows.origin)
        most = min(self.cap, self.fits or self.cap)
        grown = max(int(GROWTH * count), count + 1)  # a handful grows, too
        targets = draw(rows.opacities, max(min(most, grown) - count, 0), self.generator)
        index = torch.arange(count, device=targets.device)
        return copied(rows, torch.cat([index, targets]), targets) if len(targets) else rows

    @torch.no_grad()
    def explore(self, gaussians: GaussianModel) -> None:
        """Move each Gaussian at random within its own extent, the farther the fainter it is.

        The learning rate grows with the size of the scene, and covariances with its square: the factor
        (usual / extent)² lets the noise be the same in a scene of any size.
        """
        rates = {group["name"]: group["lr"] for group in gaussians.optimizer.param_groups}
        if self.noise_lr == 0 or rates["means"] == 0:
            return
        rate = rates["means"] / math.sqrt(gaussians.rates_for)  # of one view, as noise comes for each
        factor = self.noise_lr * rate * (USUAL_EXTENT / gaussians.extent) ** 2
        named = [gaussians.params[key] for key in ("means", "opacity_logits", "log_scales", "raw_quats")]
        piece, ranks = PIECE // gaussians.ranks.count, gaussians.ranks.count
        for start in range(0, -(-gaussians.total // ranks), piece):
            means, logits, log_scales, quats = (value[start : start + piece] for value in named)
            count = min(gaussians.total - start * ranks, piece * ranks)  # noise is drawn for all rows,
            normal = torch.randn(count, 3, generator=self.generator, device=means.device)
            normal = gaussians.own(normal)  # whoever has them
            gate = torch.sigmoid(-GATE * (logits.sigmoid() - DEAD))
            means.add_(factor * gate * through_covariance(normal, log_scales, quats))

    def limit(self, count: int) -> None:
        self.fits = count

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state(), "fits": self.fits}

    def load_state_dict(self, state: dict) -> None:
        self.fits, saved = int(state["fits"]), state["generator"]
        if len(saved) == len(self.generator.get_state()):  # else it is of another kind of device
            self.generator.set_state(saved)


def copied(rows: Rows, index: Tensor, targets: Tensor) -> Rows:
    """The rows index [M], in which each of `targets` has one copy more for each time that it is named."""
    copies = torch.bincount(targets, minlength=len(rows.origin)) + 1
    shared = (copies > 1).nonzero()[:, 0]
    opacities, scales = rows.opacities.clone(), rows.scales.clone()
    opacity, ratio = shared_opacity(opacities[shared], copies[shared])
    opacities[shared], scales[shared] = opacity, scales[shared] * ratio[:, None]
    changed = rows.changed | (copies > 1)
    return Rows(rows.origin[index], opacities[index], scales[index], changed[index])


def shared_opacity(opacity: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity of each of N copies in the place of one Gaussian, and the factor of their scales, float64 [K].

    With o' = 1 - (1 - o)^(1/N) they are as opaque together, and with s' = s o / D the integral of alpha along
    a line through the center stays, where D = sum over k = 1..N of C(N, k) (-1)^(k-1) o'^k / sqrt(k).
    """
    copies = copies.clamp_max(MOST_COPIES)
    opacity = opacity.double().clamp(0, NEARLY_ONE)
    shared = (1 - (1 - opacity) ** (1 / copies)).clamp(DEAD, NEARLY_ONE)
    total = torch.zeros_like(shared)
    for term in _terms(opacity.device).flip(1).unbind(1):
        total = (total + term[copies]) * shared
    return shared, opacity / total


def _terms(device: torch.device) -> Tensor:
    """Factor of o'^k in D at row N, column k - 1. Float64: C(50, 25) is 1.3e14."""
    numbers = range(1, MOST_COPIES + 1)
    rows = [[math.comb(n, k) * (-1) ** (k - 1) / math.sqrt(k) for k in numbers] for n in (0, *numbers)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def through_covariance(vectors: Tensor, log_scales: Tensor, quats: Tensor) -> Tensor:
    """R S² Rᵀ v: vectors [N, 3] times the covariance of each Gaussian."""
    turn = rotation_matrices(quats)
    along = (turn * vectors[:, :, None]).sum(1) * (2 * log_scales).exp()
    return (turn * along[:, None, :]).sum(2)


def make(options: Options, extent: float, say: Callable[[str], None]) -> MarkovChain:
    opt, run = options.opt, options.run
    if opt.cap_max == 0:
        raise ConfigError("cap_max must be at least 1 with --strategy mcmc, which always grows to it, got 0")
    return MarkovChain(
        begin=opt.densify_from_iter,
        end=opt.densify_until_iter,
        every=opt.densification_interval,
        cap=opt.cap_max,
        noise_lr=opt.noise_lr,
        generator=torch.Generator(pick_device(run.device)).manual_seed(run.seed),
        say=say,
    )
