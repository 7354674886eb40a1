"""A blur without a cause: each photo says how its pixels mix what is rendered around them (--blur kernel).

A pixel is the mean of the sharp picture at several places near it. Where these are depends on the pixel's
place and on how far away is what it shows, by a linear map: in the picture, all paths of a camera and all
lenses look about so. All photos share a part of the map, which is learned from every step, and each adds its
own. In the line of Deblur-NeRF (Ma 2022), whose kernels are points that move as well. The model is saved
without it; it lies beside, to show photos as they were taken.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor
from torch.nn import functional as F

from arguments import Options
from per_view.defocus import sunflower
from per_view.mean import mean_image
from per_view.per_photo import PerPhoto, rate, seen
from per_view.poses import numbers
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json

POINTS = 9  # of a kernel
TERMS = 4  # of the map: 1, inverse depth, x, y
START = 1.0  # pixels: the radius of all kernels at first
TERM = 0
RATES = 0.2, 0.002  # pixels, of a photo's own part for each visit, at the start and at the end
SHARED = 0.1  # the rate of what all share, which moves at each step, against that
PENALTY = 0.0  # of the loss: for each pixel of a kernel's size


class Kernel(PerPhoto):
    """values [V, 2, POINTS, TERMS]: a photo's own part."""

    name, blurs = "kernel", True

    def __init__(self, names: Sequence[str], start: Tensor, usual: float, space: str = "srgb"):
        """start [V, 2, POINTS, TERMS]; usual: the inverse depth from which others differ."""
        super().__init__(names, start)
        self.shared = PerPhoto(["all"], torch.zeros_like(start[:1]))
        self.usual, self.space = usual, space
        self.active = True
        self.size = start.new_zeros(())  # of the kernels of the last picture

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Kernel":
        names, known = scene.exposure_names, seen(scene)
        start = torch.zeros(len(known.K), 2, POINTS, TERMS).to(known.K.device)
        kernel = cls(names, start, known.inverse_depths.mean().item(), options.views.blur_space)
        kernel.shared.values.data[0, :, :, TERM] = START * sunflower(start[0, 0, :, 0])
        kernel.options = options
        return kernel

    def map(self, row: int) -> Tensor:
        """The places of a kernel's points by terms(), [2, n, TERMS]. Their middle is the pixel: kernels that
        move the picture would move the scene."""
        places = self.shared.values[0] + self.values[row]
        return places - places.mean(1, keepdim=True)

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (sharp,) = pictures
        row = self.row(camera)
        if row is None or not self.active:
            self.size = self.values.new_zeros(())
            return sharp
        places = torch.tensordot(self.map(row), terms(sharp, self.usual), 1)
        self.size = (places.square().sum(0).mean(0) + 0.01).sqrt().mean()
        return sharp._replace(image=mean_image(around(sharp.image, places), self.space))

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        return PENALTY * self.size

    def parameters(self) -> list[Tensor]:
        return [self.values, self.shared.values]

    def schedule(self, iteration: int) -> None:
        first = self.options.views.blur_from_iter
        self.active = iteration > first
        self.rate = rate(self.options, iteration, first, *RATES)
        self.shared.rate = SHARED * self.rate

    def step(self) -> None:
        super().step()
        self.shared.step()

    def state_dict(self) -> dict:
        return super().state_dict() | {"shared": self.shared.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.shared.load_state_dict(state["shared"])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """blur.json beside the model: the map of each photo."""
        with torch.no_grad():
            kernels = {name: self.map(row).tolist() for name, row in self.rows.items()}
        about = {"blur": "kernel", "space": self.space, "inverse_depth": self.usual, "kernels": kernels}
        write_json(folder.ply(iteration).with_name("blur.json"), about, indent=1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Kernel":
        about = read_json(path)
        kernels, space, usual = about.get("kernels"), about.get("space"), about.get("inverse_depth")
        if not isinstance(kernels, dict) or type(usual) is not float or space not in ("srgb", "linear"):
            raise DataError(f"{path}: must have kernels, an inverse_depth and a space, srgb or linear")
        try:
            points = len(next(iter(kernels.values()))[0])
        except (StopIteration, TypeError, LookupError):
            points = 0
        return cls(list(kernels), numbers(path, kernels, (2, points, TERMS)).to(device), usual, space)


def terms(sharp: Rendered, usual: float) -> Tensor:
    """What the map is linear in: one, inverse depth against the usual one, and the place, [TERMS, H, W]."""
    _, height, width = sharp.image.shape
    near = (sharp.inv_depth[0] / usual - 1).detach()
    y = torch.linspace(-1, 1, height).to(near)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width).to(near).expand(height, width)
    return torch.stack([torch.ones_like(near), near, x, y])


def around(image: Tensor, places: Tensor) -> Tensor:
    """The picture [3, H, W] at places [2, n, H, W] from each pixel, [n, 3, H, W]."""
    _, count, height, width = places.shape
    x = 2 * (torch.arange(width).to(places) + places[0]) / (width - 1) - 1
    y = 2 * (torch.arange(height).to(places)[:, None] + places[1]) / (height - 1) - 1
    where = torch.stack([x, y], -1).view(1, count * height, width, 2)
    found = F.grid_sample(image[None], where, padding_mode="border", align_corners=True)
    return found.view(3, count, height, width).transpose(0, 1)
