"""The field of a voxel grid (Sun, Sun and Chen 2022): a grid of densities and one of colors.

Density is interpolated first and becomes alpha then ("post-activation"), so that a surface may be sharp
within a voxel:

    alpha = 1 - (1 + exp(v + b))^(-delta),  delta in voxels, b so that v = 0 has alpha_init at delta = 1.
"""

import math
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arguments import FieldParams
from baselines.rays import Rays, Seen, Space, composite, encode

# Alpha of coarse voxels at the start, by whether there is no box. Without one, few rays meet a voxel: at 1e-6
# its gradient is far below Adam's epsilon, and it would stay empty for thousands of steps.
COARSE = {False: 1e-6, True: 1e-4}


def shift_of(alpha_init: float) -> float:
    """b: the softplus of it is the density at which one voxel hides alpha_init."""
    return math.log(alpha_init) - math.log1p(-alpha_init)  # ln(1 / (1 - alpha) - 1)


class Voxels(nn.Module):
    """Grids over a box from `low` to `high`; grid points lie on the faces of the box, too."""

    def __init__(self, params: FieldParams, space: Space, low: Tensor, high: Tensor, fine: bool, voxels: int):
        super().__init__()
        self.params, self.space, self.low, self.high, self.fine = params, space, low, high, fine
        coarse_alpha = params.alpha_init_coarse or COARSE[space.unbounded]
        self.shift = shift_of(params.alpha_init if fine else coarse_alpha)
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
        return [max(int(edge / side + 1e-6), 2) for edge in edges], side

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
        """Depths [N, S]; which of them (flat, [n]) are in the box; and where these points [n, 3] lie."""
        size = self.density.shape[2:]
        count = int(math.dist(size, (-1, -1, -1)) / self.params.stepsize) + 1
        k = torch.arange(count, dtype=torch.float32, device=self.low.device).expand(len(rays.origins), -1)
        if jitter:
            k = k + torch.rand(len(k), 1, device=k.device)
        far = k * self.params.stepsize * self.voxel_size
        if self.space.unbounded:
            t, inside = self.space.walked(rays, far)
        else:
            enter, leave = self.crossing(rays)
            t = enter + far / rays.lengths
            inside = t <= leave
        index = inside.flatten().nonzero()[:, 0]
        ray = torch.div(index, count, rounding_mode="floor")
        points = rays.origins[ray] + rays.directions[ray] * t.flatten()[index, None]
        points = self.space.inside(points)
        if self.space.unbounded:
            kept = ((points >= self.low) & (points <= self.high)).all(-1)
            index, points = index[kept], points[kept]
        return t, index, points

    def crossing(self, rays: Rays) -> tuple[Tensor, Tensor]:
        """Depths [N, 1] where rays enter the box and leave it; those that miss it leave before they enter."""
        d = torch.where(rays.directions == 0, 1e-6, rays.directions)
        a, b = (self.low - rays.origins) / d, (self.high - rays.origins) / d
        enter = torch.minimum(a, b).amax(-1, keepdim=True).clamp(self.space.near, 1e9)
        return enter, torch.maximum(a, b).amin(-1, keepdim=True)

    def may_be(self, points: Tensor) -> Tensor:
        """Is something near these points [n, 3], as far as the coarse stage knows?"""
        low, scale, last = self._places
        index = ((points - low) * scale).round_()
        nearest = torch.minimum(index.clamp_min(0), last)
        x, y, z = nearest.long().unbind(-1)
        return self.occupied[x, y, z] & (index == nearest).all(-1)

    def see(self, rays: Rays, background: Tensor, jitter: bool = False):
        """What the rays see; and of the samples that matter: their rays, weights and colors."""
        t, index, points = self.samples(rays, jitter)
        threshold = self.params.fast_color_thres if self.fine else 0.0
        delta = self.params.stepsize * self.ratio
        if self.occupied is not None:
            kept = self.may_be(points).nonzero()[:, 0]
            index, points = index[kept], points[kept]
        tau = self.tau(self.interpolate(self.density, points)[:, 0], delta)
        if threshold:
            tau = torch.where(tau > -math.log1p(-threshold), tau, 0.0)
        weights, left = composite(torch.zeros_like(t).flatten().index_copy(0, index, tau).view_as(t))
        weights = weights.flatten().index_select(0, index)  # its backward does not sort, as that of [] does
        kept = (weights.detach() > threshold).nonzero()[:, 0]
        index, points, w = index[kept], points[kept], weights.index_select(0, kept)
        ray = torch.div(index, t.shape[1], rounding_mode="floor")
        colors = self.colors(points, rays.views, ray)
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
        self._find_places()

    def _find_places(self) -> None:
        """Where the first point of `occupied` is, points per unit of length, and the last index, per axis."""
        low, high = self.occupied_box
        last = torch.tensor(self.occupied.shape, dtype=low.dtype, device=low.device) - 1
        self._places = low, last / (high - low), last

    # Files

    def state(self) -> dict:
        tensors = {name: value.detach() for name, value in self.state_dict().items()}
        if self.occupied is not None:
            tensors["occupied"] = self.occupied.byte()  # files hold no truth values
        return {
            "method": "dvgo", "params": asdict(self.params), "space": self.space.state(), "fine": self.fine,
            "low": self.low, "high": self.high, "voxel_size": self.voxel_size,
            "tensors": tensors,
        }  # fmt: skip

    @classmethod
    def of(cls, state: dict) -> "Voxels":
        params, tensors = FieldParams(**state["params"]), state["tensors"]
        self = cls(params, Space(**state["space"]), state["low"], state["high"], state["fine"], 8)
        self.voxel_size = state["voxel_size"]
        self.density, self.k0 = nn.Parameter(tensors["density"]), nn.Parameter(tensors["k0"])
        occupied = tensors.get("occupied")
        self.occupied = None if occupied is None else occupied.bool().to(self.density.device)
        self.load_state_dict(tensors)
        if occupied is not None:
            self._find_places()
        return self


def color_network(params: FieldParams) -> nn.Sequential:
    width, inputs = params.rgbnet_width, params.rgbnet_dim
    inputs += 3 + 6 * params.viewbase_pe if params.use_viewdirs else 0
    last = nn.Linear(width, 3)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


def grid_points(voxels: Voxels) -> Tensor:
    """Where they are, [x, y, z, 3]."""
    size = voxels.density.shape[2:]
    ends = zip(voxels.low.tolist(), voxels.high.tolist(), size)
    axes = [torch.linspace(low, high, count, device=voxels.low.device) for low, high, count in ends]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
