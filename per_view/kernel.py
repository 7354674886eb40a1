"""A blur without a cause: a small network says for each pixel how its neighbors mix (--blur kernel).

The network sees the photo's own numbers, the place in the picture, and what is rendered there and how far
away it is. It gives a k x k kernel of positive weights that sum to one, and a mask: how much of the blurred
picture is taken there, the rest being the sharp one. In the line of Deblur-NeRF (Ma 2022) and BAGS (Peng
2024). The model is saved without it; it lies beside, to show photos as they were taken.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor, nn
from torch.nn import functional as F

from arguments import Options
from per_view.module import PerView
from per_view.per_photo import dimmed
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from scene.torch_file import read_torch_file
from utils.files import DataError, atomic_write
from utils.schedules import for_views, log_linear

SIDE = 13  # pixels of a kernel
CODE, WIDTH, OCTAVES = 32, 64, 3
RATES = 1e-3, 1e-5
OWN = 10.0  # the rate of a photo's own numbers, which move once in all photos, against that of the network
CENTERED = 4.0  # the logit of a kernel's middle at the start, above the others
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
FADES = 0.0  # and how much those lose with each pixel of distance
OFTEN = 1e-3  # of the loss: the mean of the mask
STRAIGHT = 1e-2  # of the loss: the square of how far a kernel moves the picture, in pixels


class Kernel(PerView):
    name, blurs, sees_depth = "kernel", True, True
    options: Options  # of the run, while training

    def __init__(self, names: Sequence[str], device: torch.device):
        self.rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
        self.network = _Network(len(self.rows)).to(device)
        codes, *others = self.network.parameters()
        self.optimizer = torch.optim.Adam([{"params": [codes]}, {"params": others}], RATES[0])
        self.active, self.moves = True, True
        self.mask = self.drift = torch.zeros((), device=device)  # of the last picture

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Kernel":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.run.seed)
            kernel = cls(scene.exposure_names, scene.background.device)
        kernel.options = options
        return kernel

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (sharp,) = pictures
        row = None if camera.is_test else self.rows.get(camera.name)
        if row is None or not self.active:
            self.mask = self.drift = torch.zeros((), device=sharp.image.device)
            return sharp
        weights, mask = self.network(row, sharp)
        blurred = mix(sharp.image, weights)
        self.mask, self.drift = mask.mean(), drift(weights).square().sum(0).mean()
        return sharp._replace(image=mask * blurred + (1 - mask) * sharp.image)

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        """A mask that is no larger than it must be, and kernels that leave things where they are."""
        return OFTEN * self.mask + STRAIGHT * self.drift if self.active else 0.0

    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def schedule(self, iteration: int) -> None:
        first, last = self.options.views.blur_from_iter, self.options.opt.iterations
        self.active = iteration > first
        self.moves = self.active and not dimmed(self.options, iteration)
        rate = log_linear(max(iteration - first, 0), *RATES, last - first)
        for group, factor in zip(self.optimizer.param_groups, (OWN, 1.0)):
            group |= for_views(self.views, factor * rate, ADAM_BETAS, ADAM_EPS)

    def step(self) -> None:
        if self.moves:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        network = dict(self.network.state_dict())
        return {"names": list(self.rows), "network": network, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if state["names"] != list(self.rows):
            raise ValueError("its kernels are of other photos")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        network = {name: value.cpu() for name, value in self.network.state_dict().items()}
        with atomic_write(folder.ply(iteration).with_name("blur.pth")) as file:
            torch.save({"names": list(self.rows), "network": network}, file)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Kernel":
        try:
            state = read_torch_file(path)
            kernel = cls(state["names"], device)
            kernel.network.load_state_dict(state["network"])
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{path}: must have the kernels of --blur kernel ({reason})") from None
        return kernel


class _Network(nn.Module):
    def __init__(self, photos: int):
        super().__init__()
        self.codes = nn.Parameter(0.1 * torch.randn(photos, CODE))
        inputs = CODE + 4 + 2 * 2 * OCTAVES
        self.inner = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.outer = nn.Linear(WIDTH, SIDE * SIDE + 1)
        with torch.no_grad():
            self.outer.weight.mul_(0.1)
            self.outer.bias.zero_()
            self.outer.bias[:-1] -= FADES * _offsets(torch.zeros(1)).norm(dim=0)
            self.outer.bias[SIDE * SIDE // 2] = CENTERED

    def forward(self, row: int, sharp: Rendered) -> tuple[Tensor, Tensor]:
        """Weights [k k, H, W] that sum to one, and the mask [1, H, W]."""
        _, height, width = sharp.image.shape
        seen = torch.cat([sharp.image.clamp(0, 1), _relative(sharp)]).detach()
        features = torch.cat([seen, _places(height, width, seen.device)]).flatten(1).T
        code = self.codes[row].expand(len(features), -1)
        out = self.outer(self.inner(torch.cat([features, code], 1))).T.unflatten(1, (height, width))
        return out[:-1].softmax(0), out[-1:].sigmoid()


def _relative(sharp: Rendered) -> Tensor:
    """Inverse depth against its mean, [1, H, W]."""
    return sharp.inv_depth / sharp.inv_depth.mean().clamp_min(1e-9) - 1


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Sines of where a pixel is, [4 OCTAVES, H, W]."""
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    turns = [torch.pi / 2 * 2**k * part for k in range(OCTAVES) for part in (x, y)]
    return torch.stack([turn.sin() for turn in turns] + [turn.cos() for turn in turns])


def mix(image: Tensor, weights: Tensor) -> Tensor:
    """Each pixel of the picture [3, H, W] from its neighbors, by its weights [k k, H, W]."""
    half = SIDE // 2
    near = F.unfold(F.pad(image[None], (half,) * 4, mode="replicate"), SIDE)
    return (near.view(3, SIDE * SIDE, -1) * weights.flatten(1)).sum(1).view_as(image)


def drift(weights: Tensor) -> Tensor:
    """How far kernels [k k, H, W] move the picture, in pixels [2, H, W]."""
    return torch.tensordot(_offsets(weights), weights, 1)


def _offsets(like: Tensor) -> Tensor:
    """Of a kernel's pixels from its middle, [2, k k]."""
    steps = torch.arange(SIDE).to(like) - SIDE // 2
    return torch.stack([steps.repeat(SIDE), steps.repeat_interleave(SIDE)])
