"""NeRF (Mildenhall et al. 2020), as nerf-pytorch has it.

    python train.py --method nerf -s data -w

Two networks, alike, know the scene: position and view direction in, density and color out. The coarse one is
asked at samples spread evenly along a ray; the fine one is asked there and where the coarse one found
something. With --N_importance 0 there is no fine one.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diff_gaussian_rasterization import Rendered
from torch import Tensor, nn

from arguments import FieldParams, ModelParams, PipelineParams
from baselines.rays import (
    Captured,
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

N_RAND = 4096
DECAY = 500.0  # thousands of steps
FARTHEST = 1e10  # length of the last sample


class Network(nn.Module):
    """Positions and view directions -> density logits and color logits."""

    def __init__(self, params: FieldParams):
        super().__init__()
        self.params = params
        width, places, views = params.netwidth, size(params.multires), size(params.multires_views)
        self.again = params.netdepth // 2 + 1  # the layer that sees the position again
        inputs = [places] + [width + places * (i == self.again) for i in range(1, params.netdepth)]
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in inputs)
        self.density = nn.Linear(width, 1)
        if params.use_viewdirs:
            self.feature = nn.Linear(width, width)
            self.view = nn.Linear(width + views, width // 2)
            self.color = nn.Linear(width // 2, 3)
        else:
            self.color = nn.Linear(width, 3)

    def forward(self, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """[N, S, 3] and [N, 3] -> [N, S] and [N, S, 3]. Encodings are float32 whatever the layers are."""
        p = self.params
        place = encode(points, p.multires)
        ask = in_eights if p.bf16 else nn.Linear.__call__
        with torch.autocast(points.device.type, torch.bfloat16, enabled=p.bf16):
            x = place
            for i, layer in enumerate(self.layers):
                x = F.relu(ask(layer, torch.cat([place, x], dim=-1) if i == self.again else x))
            density = ask(self.density, x)
            if p.use_viewdirs:
                view = encode(views, p.multires_views)[:, None].expand(-1, x.shape[1], -1)
                x = F.relu(ask(self.view, torch.cat([ask(self.feature, x), view], dim=-1)))
            color = ask(self.color, x)
        return density[..., 0].float(), color.float()


def in_eights(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), with zeros up to multiples of 8 inputs and outputs: tensor cores are slow with 63 or 319."""
    inputs, outputs = -layer.in_features % 8, -layer.out_features % 8
    weight, bias = F.pad(layer.weight, (0, inputs, 0, outputs)), F.pad(layer.bias, (0, outputs))
    return F.linear(F.pad(x, (0, inputs)), weight, bias)[..., : layer.out_features]


def size(octaves: int) -> int:
    """Numbers that encode() makes of three."""
    return 3 + 6 * max(octaves, 0)


class Field(nn.Module):
    """Both networks, and how a ray is seen through them."""

    def __init__(self, params: FieldParams, space: Space, device: torch.device):
        super().__init__()
        self.params, self.space = params, space
        self.coarse = Network(params).to(device)
        self.fine = Network(params).to(device) if params.N_importance else None
        self.device = device
        self._ask = torch.compile(_ask, dynamic=False) if params.compile else _ask

    def see(self, rays: Rays, background: Tensor, training: bool = False) -> list[Seen]:
        """By the coarse network, and by the fine one if there is one. At test nothing is random."""
        p = self.params
        random = training and p.perturb
        t = self.space.depths(p.N_samples, self.device).expand(len(rays.origins), -1)
        if random:
            t = stratified(t)
        seen, weights = self._through(self.coarse, rays, t, background, training)
        if self.fine is None:
            return [seen]
        middles = (t[:, 1:] + t[:, :-1]) / 2
        more = sample_pdf(middles, weights.detach()[:, 1:-1], p.N_importance, random)
        t = torch.cat([t, more], dim=-1).sort(-1).values
        return [seen, self._through(self.fine, rays, t, background, training)[0]]

    def _through(self, network: Network, rays: Rays, t: Tensor, background: Tensor, training: bool):
        points = self.space.inside(rays.origins[:, None] + rays.directions[:, None] * t[..., None])
        density, color = self._ask(network, points, rays.views)
        if training and self.params.raw_noise_std:
            density = density + self.params.raw_noise_std * torch.randn_like(density)
        weights, left = composite(F.relu(density) * steps(t, rays.lengths))
        summed = (weights[..., None] * torch.sigmoid(color)).sum(1)
        return Seen(summed + left[:, None] * background, left, (weights / t).sum(1)), weights

    # Files

    def state(self) -> dict:
        tensors = {name: value.detach() for name, value in self.state_dict().items()}
        return {
            "method": "nerf", "params": asdict(self.params), "space": self.space.state(), "tensors": tensors,
        }  # fmt: skip

    @classmethod
    def of(cls, state: dict, device: torch.device) -> "Field":
        self = cls(FieldParams(**state["params"]), Space(**state["space"]), device)
        self.load_state_dict(state["tensors"])
        return self


def _ask(network: Network, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    return network(points, views)


def steps(t: Tensor, lengths: Tensor) -> Tensor:
    """How long each sample is, in world units; the last one has no end."""
    return torch.cat([t.diff(dim=-1), torch.full_like(t[:, :1], FARTHEST)], dim=-1) * lengths


def stratified(t: Tensor) -> Tensor:
    """One uniform draw from each bin; bins meet in the middles between the samples [N, S]."""
    middles = (t[:, 1:] + t[:, :-1]) / 2
    low, high = torch.cat([t[:, :1], middles], -1), torch.cat([middles, t[:, -1:]], -1)
    return low + (high - low) * torch.rand_like(t)


def sample_pdf(bins: Tensor, weights: Tensor, count: int, random: bool) -> Tensor:
    """Draws [N, count] from the piecewise constant density over bins [N, B + 1] with weights [N, B]."""
    pdf = weights + 1e-5
    cdf = torch.cumsum(pdf / pdf.sum(-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], dim=-1)
    shape = len(bins), count
    u = torch.rand(shape, device=bins.device, dtype=bins.dtype)
    if not random:
        u = torch.linspace(0, 1, count, device=bins.device, dtype=bins.dtype).expand(shape).contiguous()
    above = torch.searchsorted(cdf, u, right=True)
    below, above = (above - 1).clamp_min(0), above.clamp_max(cdf.shape[-1] - 1)
    cdf_low, cdf_high = cdf.gather(-1, below), cdf.gather(-1, above)
    low, high = bins.gather(-1, below), bins.gather(-1, above)
    height = cdf_high - cdf_low
    height = torch.where(height < 1e-5, 1.0, height)
    return low + (u - cdf_low) / height * (high - low)


class Seeable:
    """A field as something that can be looked at."""

    def __init__(self, field: Field, background: Tensor):
        self.field, self.background = field, background

    def __len__(self) -> int:
        return sum(value.numel() for value in self.field.parameters())

    def picture(self, camera: Camera) -> Rendered:
        return picture(
            camera, lambda rays: self.field.see(rays, self.background)[-1], self.field.params.chunk
        )


class Trainer(Method):
    unit = "weights"

    def __init__(self, scene, options, say):
        super().__init__(scene, options, say)
        refuse(options)
        self.params = options.field
        self.count = self.params.N_rand or N_RAND
        cameras = [camera for camera in scene.train_cameras if not camera.is_test]
        self.photos = Photos(cameras)
        self._use(Field(self.params, space_of(scene, self.params), self.device))
        self.seeable = Seeable(self.field, scene.background)
        self.shown = Shown(self.seeable)

    def _use(self, field: Field) -> None:
        self.field = field
        rate = torch.tensor(self.params.lrate, device=self.device)
        groups = [{"params": list(field.parameters()), "lr": rate}]
        self.optimizer = adam(groups, captured=self.device.type == "cuda")
        self._learned_from = Captured(self._learn)
        if hasattr(self, "seeable"):
            self.seeable.field = field

    def step(self, iteration: int) -> dict[str, Tensor]:
        p = self.params
        decay = 0.1 ** ((iteration - 1) / (1000 * (p.lrate_decay or DECAY)))
        self.optimizer.param_groups[0]["lr"].fill_(p.lrate * decay)
        middle = p.precrop_frac if iteration <= p.precrop_iters else 1.0
        return self._learned_from(self.photos.draw(self.count, middle))

    def _learn(self, pixels: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        rays, truth, counts = self.photos.at(pixels)
        seen = self.field.see(rays, self.scene.background, training=True)
        loss = torch.stack([(counts * (one.color - truth) ** 2).mean() for one in seen]).sum()
        loss.backward()
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "l1": (counts * (seen[-1].color.detach() - truth)).abs().mean(),
        }

    def parts(self) -> dict[str, Part]:
        return {"field": self}

    def state_dict(self) -> dict:
        return {"model": self.field.state(), "optimizer": self.optimizer.state_dict()["state"]}

    def load_state_dict(self, state: dict) -> None:
        self._use(Field.of(state["model"] | {"params": asdict(self.params)}, self.device))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})

    def save(self, folder: ModelFolder, iteration: int) -> Path:
        return write(folder.field(iteration), self.field.state())

    def check(self, when: str, known_bad: bool = False) -> None:
        if not torch.stack([value.detach().sum() for value in self.field.parameters()]).isfinite().all():
            raise Diverged(f"{when}: the networks are not finite; a lower --lrate may help")

    def describe(self) -> str:
        return f"{len(self):,} weights, {self.count:,} rays a step"


def load(
    model: ModelParams, pipe: PipelineParams, folder: ModelFolder, iteration: int, background: Tensor
) -> Shown:
    state, device = read(folder.field(iteration), "nerf", background.device), background.device
    state["params"]["compile"] &= device.type == "cuda"  # elsewhere, a few pictures are not worth it
    field = Field.of(state, device)
    return Shown(Seeable(field.requires_grad_(False), background))
