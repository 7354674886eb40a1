"""A blur without a cause: a photo is a mixture of what is seen from several places near it (--blur kernel).

The taps of a kernel are poses of the camera: its own, which is the sharp one, and others that are free to
shift and to turn: on a line they are motion blur, over a lens defocus. All photos share a part, which each
step teaches, and each adds its own. A small network says how the taps mix in each pixel: it sees the
photo's own numbers, the place in the picture, and what is rendered there and how far away it is. It gives
weights that sum to one, and a mask: how much of the blurred picture is taken there, the rest being the sharp
one. In the line of Deblur-NeRF (Ma 2022), whose taps are rays, and DP-NeRF (Lee 2023), whose taps are poses.
The model is saved without it; it lies beside, to show photos as they were taken.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor, nn

from arguments import Options
from per_view.defocus import sunflower
from per_view.mean import mean
from per_view.per_photo import PerPhoto, rate, seen
from per_view.poses import motions_to, places
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from scene.torch_file import read_torch_file
from utils.files import DataError, atomic_write
from utils.schedules import for_views

START = 3.0  # pixels by which what is very far away is blurred at first: kernels that start small stay small
RATES = 0.2, 0.002  # of poses: pixels of a visit, at the start and at the end
SHARED = 0.3  # the rate of what all photos share, which moves at each step, against that
SIZES, MIXED = 0.25, 0.005  # the rates of sizes and of the network, against that
OWN = 10.0  # the rate of a photo's own inputs, which move once in all photos, against that of the network
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
CODE, WIDTH, OCTAVES = 16, 32, 2
MASK = 3.0  # its logit at the start
OFTEN = 1e-4  # of the loss: the mean of the mask
STRAIGHT = 1e-2  # of the loss: the square of how far a kernel moves the picture, in pixels
NARROW, WIDE = 1.5e-3, 7e-4  # of the loss: how hard small and large kernels are pulled
TINY, LARGE, HUGE = 0.01, 1.5, 30.0  # pixels: small enough; what these are, about; more than blur is
PARTS = "shared", "sizes", "network", "optimizer"  # of a checkpoint


class Kernel(PerPhoto):
    """values [V, n - 1, 6]: what a photo adds to the shared poses, (shift, rotation vector) in units."""

    name, sees_depth = "kernel", True

    def __init__(self, names: Sequence[str], start: Tensor, units: Tensor, space: str = "srgb"):
        """units [V, 6]: what moves the picture by about a pixel."""
        super().__init__(names, start)
        self.shared = PerPhoto(["all"], torch.zeros_like(start[:1]))
        self.sizes = PerPhoto(["", *names], start.new_zeros(len(start) + 1, 1))  # logarithms
        self.network = Network(len(self.rows), start.shape[1] + 1).to(start)
        codes, *others = self.network.parameters()
        self.optimizer = torch.optim.Adam([{"params": [codes]}, {"params": others}])
        self.units, self.space, self.active = units, space, True
        self.mask = self.drift = start.new_zeros(())  # of the last picture

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Kernel":
        views, units = options.views, seen(scene).units
        start = torch.zeros(len(units), views.blur_samples - 1, 6).to(units)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.run.seed)
            kernel = cls(scene.exposure_names, start, units, views.blur_space)
        kernel.shared.values.data[0] = spread(start[0])
        kernel.options = options
        return kernel

    def poses(self, row: int) -> Tensor:
        """In units, [n, 6]. Their mean is the data set's pose, which is the first: kernels that are free
        would move the scene."""
        poses = self.shared.values[0] + self.values[row]
        size = (self.sizes.values[0] + self.sizes.values[1 + row]).exp()
        return nn.functional.pad(size * (poses - poses.mean(0)), (0, 0, 1, 0))

    def cameras(self, camera: Camera) -> list[Camera]:
        if (row := self.row(camera)) is None or not self.active:
            return [camera]
        return places(camera, motions_to(self.poses(row) * self.units[row]))

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        if len(pictures) == 1:
            return pictures[0]
        row = self.rows[camera.name]
        weights, mask = self.network(row, pictures[0])
        weights = mask * weights
        self.mask = mask.mean()
        self.drift = torch.tensordot(self.poses(row).T, weights, 1).square().sum(0).mean()
        sharp, others = weights.split([1, len(weights) - 1])
        return mean(pictures, self.space, torch.cat([sharp + 1 - mask, others]))

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        """A mask that is no larger than it must be, and kernels that leave things where they are. A blurred
        scene, or one that is too sharp, explains photos nearly as well as the true one: so photos only decide
        whether kernels are large or small; then these become as large, or as small, as photos let them be."""
        if (row := self.row(camera)) is None or not self.active:
            return 0.0
        square = self.poses(row)[1:].square().mean(0).sum()
        outwards = ((square + LARGE**2) / (square + HUGE**2)).log()
        pull = NARROW * (square + TINY**2).log() - (NARROW + WIDE) * outwards
        return OFTEN * self.mask + STRAIGHT * self.drift + 0.5 * pull

    def parameters(self) -> list[Tensor]:
        return [self.values, self.shared.values, self.sizes.values, *self.network.parameters()]

    def schedule(self, iteration: int) -> None:
        first = self.options.views.blur_from_iter
        self.active = iteration > first
        self.rate = rate(self.options, iteration, first, *RATES)
        self.shared.rate = SHARED * self.rate
        self.sizes.rate = SIZES * self.rate
        for group, factor in zip(self.optimizer.param_groups, (OWN, 1.0)):
            group |= for_views(self.views, factor * MIXED * self.rate, ADAM_BETAS, ADAM_EPS)

    def step(self) -> None:
        super().step()
        self.shared.step()
        self.sizes.step()
        if self.rate > 0:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return super().state_dict() | parts | {"network": dict(parts["network"])}

    def load_state_dict(self, state: dict) -> None:
        if state["names"] != list(self.rows):
            raise ValueError("its kernels are of other photos")
        super().load_state_dict(state)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """blur.pth beside the model: the poses of each photo's kernel but the first, and the network."""
        with torch.no_grad():
            poses = [self.poses(row)[1:] * self.units[row] for row in self.rows.values()]
        network = {name: value.cpu() for name, value in self.network.state_dict().items()}
        about = {"names": list(self.rows), "space": self.space, "poses": torch.stack(poses).cpu()}
        with atomic_write(folder.ply(iteration).with_name("blur.pth")) as file:
            torch.save(about | {"network": network}, file)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Kernel":
        try:
            state = read_torch_file(path)
            poses = state["poses"].to(device)
            kernel = cls(state["names"], poses, torch.ones_like(poses[:, 0]), state["space"])
            kernel.network.load_state_dict(state["network"])
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{path}: must have the kernels of --blur kernel ({reason})") from None
        return kernel


class Network(nn.Module):
    def __init__(self, photos: int, taps: int):
        super().__init__()
        self.codes = nn.Parameter(0.1 * torch.randn(photos, CODE))
        inputs = CODE + 4 + 2 * 2 * OCTAVES
        self.inner = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.outer = nn.Linear(WIDTH, taps + 1)
        with torch.no_grad():
            self.outer.weight.mul_(0.1)
            self.outer.bias.zero_()
            self.outer.bias[-1] = MASK

    def forward(self, row: int, sharp: Rendered) -> tuple[Tensor, Tensor]:
        """Weights [n, H, W] that sum to one, and the mask [1, H, W]."""
        _, height, width = sharp.image.shape
        seen = torch.cat([sharp.image.clamp(0, 1), _relative(sharp)]).detach()
        features = torch.cat([seen, _places(height, width, seen)]).flatten(1).T
        code = self.codes[row].expand(len(features), -1)
        out = self.outer(self.inner(torch.cat([features, code], 1))).T.unflatten(1, (height, width))
        return out[:-1].softmax(0), out[-1:].sigmoid()


def _relative(sharp: Rendered) -> Tensor:
    """Inverse depth against its mean, [1, H, W]."""
    return sharp.inv_depth / sharp.inv_depth.mean().clamp_min(1e-9) - 1


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Sines of where a pixel is, [4 OCTAVES, H, W]."""
    y = torch.linspace(-1, 1, height).to(like)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width).to(like).expand(height, width)
    turns = [torch.pi / 2 * 2**k * part for k in range(OCTAVES) for part in (x, y)]
    return torch.stack([turn.sin() for turn in turns] + [turn.cos() for turn in turns])


def spread(like: Tensor) -> Tensor:
    """Poses [n, 6] at first: over a disk, turned so that things at the usual distance stay where they are."""
    x, y = START * sunflower(like[:, 0])
    zero = torch.zeros_like(x)
    return torch.stack([x, y, zero, -y, x, zero], 1)
