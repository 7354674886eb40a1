"""Direct voxel grid optimization (Sun, Sun and Chen 2022), as its first version has it.

    python train.py --method dvgo -s data -w

A grid of densities and a grid of colors. The coarse stage finds where there is something: its colors do not
depend on where one looks from. The fine stage has a tight box around that, never looks where the coarse one
found nothing, gets twice the voxels now and then, and turns its color grid's channels into colors by a small
network. Density is interpolated first and becomes alpha then ("post-activation"), so that a surface may be
sharp within a voxel:

    alpha = 1 - (1 + exp(v + b))^(-delta),  delta in voxels, b so that v = 0 has alpha_init at delta = 1.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diff_gaussian_rasterization import Rendered
from torch import Tensor, nn

from arguments import ConfigError, FieldParams, ModelParams, PipelineParams
from baselines.rays import (
    Photos,
    Rays,
    Seen,
    Space,
    adam,
    composite,
    encode,
    picture,
    read,
    refuse,
    space_of,
    write,
)
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


def shift_of(alpha_init: float) -> float:
    """b: the softplus of it is the density at which one voxel hides alpha_init."""
    return math.log(alpha_init) - math.log1p(-alpha_init)  # ln(1 / (1 - alpha) - 1)


class Voxels(nn.Module):
    """Grids over a box from `low` to `high`; grid points lie on the faces of the box, too."""

    def __init__(self, params: FieldParams, space: Space, low: Tensor, high: Tensor, fine: bool, voxels: int):
        super().__init__()
        self.params, self.space, self.low, self.high, self.fine = params, space, low, high, fine
        self.shift = shift_of(params.alpha_init if fine else params.alpha_init_coarse)
        size, self.voxel_size = self.resolution(voxels)
        self.base_size = self.resolution(params.num_voxels if fine else params.num_voxels_coarse)[1]
        channels = params.rgbnet_dim if fine else 3
        self.density = nn.Parameter(torch.zeros(1, 1, *size, device=low.device))
        self.k0 = nn.Parameter(torch.zeros(1, channels, *size, device=low.device))
        self.rgbnet = color_network(params).to(low.device) if fine else None
        self.register_buffer("occupied", None)  # bool [x, y, z], over all of the coarse box
        self.register_buffer("occupied_box", torch.stack([low, high]))

    def resolution(self, voxels: int) -> tuple[list[int], float]:
        """Grid points per axis, and the side of a voxel, of about this many voxels."""
        edges = (self.high - self.low).tolist()
        side = (math.prod(edges) / voxels) ** (1 / 3)
        return [max(int(edge / side), 2) for edge in edges], side

    @property
    def ratio(self) -> float:
        """Side of a voxel, in those of the last resolution."""
        return self.voxel_size / self.base_size

    def interpolate(self, grid: Tensor, points: Tensor) -> Tensor:
        """Trilinear: points [n, 3] -> [n, channels]. Zero outside of the box."""
        place = (2 * (points - self.low) / (self.high - self.low) - 1).flip(-1).view(1, 1, 1, -1, 3)
        return F.grid_sample(grid, place, align_corners=True)[0, :, 0, 0].T

    def tau(self, values: Tensor, delta: float) -> Tensor:
        """-ln(1 - alpha) of interpolated densities, along `delta` voxels."""
        return delta * F.softplus(values + self.shift)

    def alphas(self) -> Tensor:
        """Of every grid point, [x, y, z]."""
        return -torch.expm1(-self.tau(self.density.detach()[0, 0], 1.0))

    def samples(self, rays: Rays, jitter: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Depths [N, S], points [N, S, 3] of the modeled space, and which are in the box [N, S]."""
        size = self.density.shape[2:]
        count = int(math.dist(size, (-1, -1, -1)) / self.params.stepsize) + 1
        k = torch.arange(count, dtype=torch.float32, device=self.low.device).expand(len(rays.origins), -1)
        if jitter:
            k = k + torch.rand(len(k), 1, device=k.device)
        if self.space.unbounded:  # evenly in 1/depth
            s = k / count
            t = 1 / ((1 - s) / self.space.near + s / self.space.far)
        else:
            t = self.entry(rays) + k * (self.params.stepsize * self.voxel_size) / rays.lengths
        points = rays.origins[:, None] + rays.directions[:, None] * t[..., None]
        points = self.space.inside(points)
        return t, points, ((points >= self.low) & (points <= self.high)).all(-1)

    def entry(self, rays: Rays) -> Tensor:
        """Depths [N, 1] at which rays come into the box; those that miss it have all samples outside."""
        d = torch.where(rays.directions == 0, 1e-6, rays.directions)
        a, b = (self.low - rays.origins) / d, (self.high - rays.origins) / d
        return torch.minimum(a, b).amax(-1, keepdim=True).clamp(self.space.near, 1e9)

    def may_be(self, points: Tensor) -> Tensor:
        """Is something near these points [n, 3], as far as the coarse stage knows?"""
        low, high = self.occupied_box
        last = torch.tensor(self.occupied.shape, device=points.device) - 1
        index = ((points - low) / (high - low) * last).round().long()
        inside = ((index >= 0) & (index <= last)).all(-1)
        x, y, z = torch.minimum(index.clamp_min(0), last).unbind(-1)
        return self.occupied[x, y, z] & inside

    def see(self, rays: Rays, background: Tensor, jitter: bool = False):
        """What the rays see; and of the samples that matter: their rays, weights and colors."""
        t, points, kept = self.samples(rays, jitter)
        threshold = self.params.fast_color_thres if self.fine else 0.0
        delta = self.params.stepsize * self.ratio
        if self.occupied is not None:
            kept = kept & self.may_be(points)
        index = kept.flatten().nonzero()[:, 0]  # the host waits here, and where samples are few: below
        tau = self.tau(self.interpolate(self.density, points.flatten(0, 1)[index])[:, 0], delta)
        if threshold:
            tau = torch.where(tau > -math.log1p(-threshold), tau, 0.0)
        weights, left = composite(torch.zeros_like(t).flatten().index_copy(0, index, tau).view_as(t))
        index = (weights.detach().flatten() > threshold).nonzero()[:, 0]
        ray, w = torch.div(index, t.shape[1], rounding_mode="floor"), weights.flatten()[index]
        colors = self.colors(points.flatten(0, 1)[index], rays.views, ray)
        summed = torch.zeros_like(rays.origins).index_add(0, ray, w[:, None] * colors)
        inv_depth = torch.zeros_like(left).index_add(0, ray, w / t.flatten()[index])
        return Seen(summed + left[:, None] * background, left, inv_depth), (ray, w, colors)

    def colors(self, points: Tensor, views: Tensor, ray: Tensor) -> Tensor:
        channels = self.interpolate(self.k0, points)
        if self.rgbnet is None:
            return torch.sigmoid(channels)
        if self.params.use_viewdirs:
            channels = torch.cat([channels, encode(views, self.params.viewbase_pe)[ray]], dim=-1)
        with torch.autocast(points.device.type, torch.bfloat16, enabled=self.params.bf16):
            logits = self.rgbnet(channels)
        return torch.sigmoid(logits.float())

    @torch.no_grad()
    def scale_to(self, voxels: int) -> None:
        """The same field on another grid."""
        size, self.voxel_size = self.resolution(voxels)
        for name in ("density", "k0"):
            old = getattr(self, name)
            new = F.interpolate(old.detach(), size=size, mode="trilinear", align_corners=True)
            setattr(self, name, nn.Parameter(new.contiguous()))

    @torch.no_grad()
    def look_only_where(self, coarse: "Voxels") -> None:
        """Never look where the coarse stage, with a voxel around each, has little alpha."""
        most = F.max_pool3d(coarse.alphas()[None, None], 3, stride=1, padding=1)[0, 0]
        self.occupied = most >= self.params.mask_cache_thres
        self.occupied_box = torch.stack([coarse.low, coarse.high])

    # Files

    def state(self) -> dict:
        return {
            "method": "dvgo", "params": asdict(self.params), "space": self.space.state(), "fine": self.fine,
            "low": self.low, "high": self.high, "voxel_size": self.voxel_size,
            "tensors": {name: value.detach() for name, value in self.state_dict().items()},
        }  # fmt: skip

    @classmethod
    def of(cls, state: dict) -> "Voxels":
        params, tensors = FieldParams(**state["params"]), state["tensors"]
        self = cls(params, Space(**state["space"]), state["low"], state["high"], state["fine"], 8)
        self.voxel_size = state["voxel_size"]
        self.density, self.k0 = nn.Parameter(tensors["density"]), nn.Parameter(tensors["k0"])
        self.occupied = tensors.get("occupied")
        self.load_state_dict(tensors)
        return self


def color_network(params: FieldParams) -> nn.Sequential:
    width, inputs = params.rgbnet_width, params.rgbnet_dim
    inputs += 3 + 6 * params.viewbase_pe if params.use_viewdirs else 0
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )
    nn.init.zeros_(net[-1].bias)
    return net


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
        self.shown = Shown(Seeable(self.voxels, scene.background))
        self.rates: Tensor | None = None  # [1, 1, x, y, z] of the coarse stage: how many views see it

    def device_box(self) -> tuple[Tensor, Tensor]:
        """Of the space that unbounded scenes are drawn in to."""
        return tuple(torch.full((3,), side, device=self.device) for side in (-2.0, 2.0))

    def _use(self, voxels: Voxels, begun: int = 0) -> None:
        """From here on, these are trained; the optimizer starts anew, `begun` steps into the stage."""
        self.voxels, self._begun = voxels, begun
        p = self.params
        groups = [(voxels.density, p.lrate_density), (voxels.k0, p.lrate_k0)]
        groups += [(value, p.lrate_rgbnet) for value in (voxels.rgbnet.parameters() if voxels.rgbnet else ())]
        self.optimizer = adam(
            [{"params": [v], "lr": lr, "full": lr, "betas": (0.9, 0.99)} for v, lr in groups]
        )
        if hasattr(self, "shown"):
            self.shown.scene.voxels = voxels
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
                _, points, inside = voxels.samples(self.photos.at(pixels)[0])
                with torch.enable_grad():
                    hits = voxels.interpolate(ones, points[inside]).sum()
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
        grids = [] if self.voxels.fine or self.rates is None else [self.voxels.density, self.voxels.k0]
        before = [grid.clone() for grid in grids]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for grid, old in zip(grids, before):
            grid.copy_(torch.lerp(old, grid, self.rates))

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
        _, points, inside = self.voxels.samples(self.photos.at(pixels)[0])
        return (inside & self.voxels.may_be(points)).any(-1)

    # Around the method

    def parts(self) -> dict[str, Part]:
        return {"voxels": self}

    def state_dict(self) -> dict:
        return {
            "model": self.voxels.state(), "begun": self._begun, "rates": self.rates,
            "optimizer": self.optimizer.state_dict()["state"],
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self._use(Voxels.of(state["model"]), state["begun"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.params, self.rates = self.voxels.params, state["rates"]

    def save(self, folder: ModelFolder, iteration: int) -> Path:
        return write(folder.field(iteration), self.voxels.state())

    def check(self, when: str, known_bad: bool = False) -> None:
        if not torch.stack([value.detach().sum() for value in self.voxels.parameters()]).isfinite().all():
            raise Diverged(f"{when}: the voxels are not finite; lower learning rates may help")

    def describe(self) -> str:
        size = " x ".join(map(str, self.voxels.density.shape[2:]))
        return f"{size} voxels, {self.count:,} rays a step"


def grid_points(voxels: Voxels) -> Tensor:
    """Where they are, [x, y, z, 3]."""
    size = voxels.density.shape[2:]
    ends = zip(voxels.low.tolist(), voxels.high.tolist(), size)
    axes = [torch.linspace(low, high, count, device=voxels.low.device) for low, high, count in ends]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def load(
    model: ModelParams, pipe: PipelineParams, folder: ModelFolder, iteration: int, background: Tensor
) -> Shown:
    voxels = Voxels.of(read(folder.field(iteration), "dvgo", background.device)).requires_grad_(False)
    return Shown(Seeable(voxels, background))
