"""Direct voxel grid optimization (Sun, Sun and Chen 2022), as its first version has it.

    python train.py --method dvgo -s data -w

A grid of densities and a grid of colors. The coarse stage finds where there is something: its colors do not
depend on where one looks from. The fine stage has a tight box around that, never looks where the coarse one
found nothing, gets twice the voxels now and then, and turns its color grid's channels into colors by a small
network. The grids are in voxels.py.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import ConfigError, ModelParams, PipelineParams
from baselines.rays import (
    Photos,
    Seen,
    adam,
    picture,
    read,
    refuse,
    space_of,
    write,
)
from baselines.voxels import Voxels, grid_points
from per_view import Shown
from scene import Camera
from scene.folder import ModelFolder
from training.checkpoint import Part
from training.health import Diverged
from training.method import Method

N_RAND = 8192
DECAY = 20.0  # thousands of steps
NOTHING = -100.0  # density where there is nothing for sure
WEIGHTS = {
    "coarse": (0.01, 0.1),
    "fine": (0.001, 0.01),
}  # of the entropy of what is left, of each sample's color
FEW_VIEWS = 2  # voxels that are seen from no more views stay empty
RAYS_AT_ONCE = 16_384  # where nothing is learned


class Seeable:
    """Voxels as something that can be looked at."""

    def __init__(self, voxels: Voxels, background: Tensor):
        self.voxels, self.background = voxels, background

    def __len__(self) -> int:
        return self.voxels.density.numel()

    def picture(self, camera: Camera) -> Rendered:
        return picture(
            camera, lambda rays: self.voxels.see(rays, self.background)[0], self.voxels.params.chunk
        )


class Trainer(Method):
    unit = "voxels"

    def __init__(self, scene, options, say):
        super().__init__(scene, options, say)
        refuse(options)
        if options.run.deterministic and self.device.type == "cuda":
            raise ConfigError("deterministic is not for --method dvgo on a GPU: PyTorch's grid_sample is not")
        self.params = options.field
        self.count = self.params.N_rand or N_RAND
        self.cameras = [camera for camera in scene.train_cameras if not camera.is_test]
        self.photos = Photos(self.cameras)
        space = space_of(scene, self.params)
        low, high = (space.low, space.high) if not space.unbounded else self.device_box()
        self._use(Voxels(self.params, space, low, high, False, self.params.num_voxels_coarse))
        self.seeable = Seeable(self.voxels, scene.background)
        self.shown = Shown(self.seeable)
        self.rates: Tensor | None = None  # [1, 1, x, y, z] of the coarse stage: how many views see it

    def device_box(self) -> tuple[Tensor, Tensor]:
        """Of the space that unbounded scenes are drawn in to."""
        return torch.full((3,), -2.0, device=self.device), torch.full((3,), 2.0, device=self.device)

    def _use(self, voxels: Voxels, begun: int = 0) -> None:
        """From here on, these are trained; the optimizer starts anew, `begun` steps into the stage."""
        self.voxels, self._begun = voxels, begun
        p = self.params
        groups = [([voxels.density], p.lrate_density), ([voxels.k0], p.lrate_k0)]
        groups += [(list(voxels.rgbnet.parameters()), p.lrate_rgbnet)] if voxels.rgbnet else []
        self.optimizer = adam(
            [{"params": values, "lr": lr, "full": lr, "betas": (0.9, 0.99)} for values, lr in groups]
        )
        if hasattr(self, "seeable"):
            self.seeable.voxels = voxels
        self._pixels: Tensor | None = None  # those whose rays are trained on, of the fine stage
        self._order: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def start(self) -> None:
        views = self.views_that_see()
        self.rates = views / views.max().clamp_min(1)
        self.voxels.density.masked_fill_(views <= FEW_VIEWS, NOTHING)
        if not self.voxels.space.unbounded:
            for camera in self.cameras:
                near = (grid_points(self.voxels) - camera.center).norm(dim=-1) <= self.voxels.space.near
                self.voxels.density[0, 0].masked_fill_(near, NOTHING)

    @torch.no_grad()
    def views_that_see(self) -> Tensor:
        """For each voxel: how many train views have samples in it that count for more than one, together."""
        voxels = self.voxels
        views = torch.zeros_like(voxels.density)
        ones = torch.ones_like(views, requires_grad=True)
        first = 0
        for camera in self.cameras:
            last = first + camera.width * camera.height
            counted = torch.zeros_like(views)
            for pixels in torch.arange(first, last, device=self.device).split(RAYS_AT_ONCE):
                points = voxels.samples(self.photos.at(pixels)[0])[2]
                with torch.enable_grad():
                    hits = voxels.interpolate(ones, points).sum()
                counted += torch.autograd.grad(hits, ones)[0]
            views += counted > 1
            first = last
        return views

    # A step

    def step(self, iteration: int) -> dict[str, Tensor]:
        fine = self.voxels.fine
        done = iteration - 1 - (self.params.coarse_iters if fine else 0)
        self._schedule(done - self._begun)
        rays, truth, counts = self.photos.at(self._fine_pixels(done) if fine else self._any_pixels())
        seen, samples = self.voxels.see(rays, self.scene.background, jitter=True)
        mse = (counts * (seen.color - truth) ** 2).mean()
        loss = mse + self._regularizers(seen, samples, truth, counts)
        loss.backward()
        self._move()
        return {"loss": loss, "l1": (counts * (seen.color.detach() - truth)).abs().mean()}

    def _any_pixels(self) -> Tensor:
        return torch.randint(len(self.photos), (self.count,), device=self.device)

    def _schedule(self, steps: int) -> None:
        decay = 0.1 ** (steps / (1000 * (self.params.lrate_decay or DECAY)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * decay

    def _regularizers(self, seen: Seen, samples: tuple, truth: Tensor, counts: Tensor) -> Tensor:
        """Rays should hit something or nothing; and each sample should have the color of the ray."""
        entropy, each = WEIGHTS["fine" if self.voxels.fine else "coarse"]
        p = seen.left.clamp(1e-6, 1 - 1e-6)
        unsure = -(p * p.log() + (1 - p) * (1 - p).log())
        ray, w, colors = samples
        off = ((colors - truth[ray]) ** 2).sum(-1) * w.detach() * counts[ray, 0]
        return entropy * (counts[:, 0] * unsure).mean() + each * off.sum() / len(truth)

    @torch.no_grad()
    def _move(self) -> None:
        """Adam; in the coarse stage, grids move as far as the share of views that see them."""
        rates = self.rates
        grids = [] if rates is None else [self.voxels.density, self.voxels.k0]
        before = [grid.clone() for grid in grids]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if rates is not None:
            for grid, old in zip(grids, before):
                grid.copy_(old.lerp(grid, rates))

    # The fine stage

    def refine(self, iteration: int) -> None:
        done = iteration - self.params.coarse_iters  # fine steps
        if done == 0 and iteration < self.options.opt.iterations:
            self._begin_fine()
        elif self.voxels.fine and done + 1 in self.params.pg_scale:
            left = sum(step > done + 1 for step in self.params.pg_scale)
            self.voxels.scale_to(self.params.num_voxels // 2**left)
            self._use_again(done)

    def _use_again(self, done: int) -> None:
        pixels, order = self._pixels, self._order
        self._use(self.voxels, done)
        self._pixels, self._order = pixels, order

    @torch.no_grad()
    def _begin_fine(self) -> None:
        coarse, p = self.voxels, self.params
        found = grid_points(coarse)[coarse.alphas() > p.bbox_thres]
        low, high = (found.amin(0), found.amax(0)) if len(found) else (coarse.low, coarse.high)
        if not (high > low).all():
            low, high = coarse.low, coarse.high
        margin = (high - low) * (p.world_bound_scale - 1) / 2
        low, high = low - margin, high + margin
        voxels = Voxels(p, coarse.space, low, high, True, p.num_voxels // 2 ** len(p.pg_scale))
        voxels.look_only_where(coarse)
        self.rates = None
        self._use(voxels)
        self.say(
            f"fine stage: {tuple(voxels.density.shape[2:])} of the box {low.tolist()} to {high.tolist()}"
        )

    @torch.no_grad()
    def _fine_pixels(self, done: int) -> Tensor:
        """The pixels of this fine step: shuffled, each round in an order that its number decides."""
        if self._pixels is None:
            every = torch.arange(len(self.photos), device=self.device)
            self._pixels = torch.cat([part[self._hits(part)] for part in every.split(RAYS_AT_ONCE)])
            if not len(self._pixels):
                self._pixels = every
        per_round = max(len(self._pixels) // self.count, 1)
        number, k = divmod(done, per_round)
        if self._order is None or self._order[0] != number:
            generator = torch.Generator(self.device).manual_seed(self.options.run.seed + number)
            self._order = number, torch.randperm(len(self._pixels), generator=generator, device=self.device)
        return self._pixels[self._order[1][k * self.count : (k + 1) * self.count]]

    def _hits(self, pixels: Tensor) -> Tensor:
        """Do their rays meet anything that the coarse stage knows of?"""
        t, index, points = self.voxels.samples(self.photos.at(pixels)[0])
        hits = torch.zeros(t.shape, dtype=torch.bool, device=t.device).flatten()
        hits[index] = self.voxels.may_be(points)
        return hits.view_as(t).any(-1)

    # Around the method

    def parts(self) -> dict[str, Part]:
        return {"voxels": self}

    def state_dict(self) -> dict:
        return {
            "model": self.voxels.state(), "begun": self._begun, "rates": self.rates,
            "optimizer": self.optimizer.state_dict()["state"],
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self._use(Voxels.of(state["model"] | {"params": asdict(self.params)}), state["begun"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.rates = state["rates"]

    def save(self, folder: ModelFolder, iteration: int) -> Path:
        return write(folder.field(iteration), self.voxels.state())

    def check(self, when: str, known_bad: bool = False) -> None:
        if not torch.stack([value.detach().sum() for value in self.voxels.parameters()]).isfinite().all():
            raise Diverged(f"{when}: the voxels are not finite; lower learning rates may help")

    def describe(self) -> str:
        size = " x ".join(map(str, self.voxels.density.shape[2:]))
        return f"{size} voxels, {self.count:,} rays a step"


def load(
    model: ModelParams, pipe: PipelineParams, folder: ModelFolder, iteration: int, background: Tensor
) -> Shown:
    voxels = Voxels.of(read(folder.field(iteration), "dvgo", background.device)).requires_grad_(False)
    return Shown(Seeable(voxels, background))
