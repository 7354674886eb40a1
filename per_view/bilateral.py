"""A bilateral grid for each photo (--appearance bilateral), after Wang et al. 2024.

Affine color transforms [3, 4] that depend on the place in the picture and on how bright the render is there:
a grid of 16 x 16 places and 8 levels of gray, read with linear interpolation. It explains what a camera's
processing does locally; it can also explain shading that belongs to the scene, so it is kept smooth. What the
whole photo has in common is learned apart and added, at a higher rate, and what all photos have in common
belongs to the scene.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor
from torch.nn import functional as F

from arguments import ConfigError, Options
from per_view.affine import units
from per_view.appearance import Appearance
from per_view.per_photo import PerPhoto
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from scene.torch_file import read_torch_file
from utils.files import DataError, atomic_write

SHAPE = 12, 8, 16, 16  # of a grid: 3x4 transform, gray, y, x
GRAY = 0.299, 0.587, 0.114
SLOWER = 0.03  # the rate of grids, against that of the whole photo
SMOOTH = 100.0  # of the loss: how much neighbors in the grid differ


class Bilateral(Appearance):
    name, eases_in = "bilateral", 1 / 30

    def __init__(self, names: Sequence[str], device: torch.device):
        start = torch.eye(3, 4, device=device).view(12, 1, 1, 1).expand(len(names), *SHAPE)
        super().__init__(names, start)
        self.whole = PerPhoto(names, start.new_zeros(len(names), 12, 1, 1, 1))

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Bilateral":
        device = scene.background.device
        if options.run.deterministic and device.type == "cuda":
            raise ConfigError("appearance bilateral must run without --deterministic on a GPU")
        bilateral = cls(scene.exposure_names, device)
        bilateral.options = options
        return bilateral

    def of(self, camera: Camera) -> Tensor:
        if (row := self.row(camera)) is None:
            return (self.values + self._whole()).detach().median(0).values
        return self.values[row] + self._whole()[row]

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (rendered,) = pictures
        return rendered._replace(image=recolored(rendered.image, self.of(camera)))

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor:
        return SMOOTH * roughness(self.of(camera))

    def _whole(self) -> Tensor:
        return self.whole.values * units().to(self.values).view(12, 1, 1, 1)

    def parameters(self) -> list[Tensor]:
        return [self.values, self.whole.values]

    def step(self) -> None:
        self.whole.rate, self.rate = self.rate, SLOWER * self.rate
        self.whole.step()
        super().step()
        with torch.no_grad():
            self.whole.values -= self.whole.values.mean(0)

    def state_dict(self) -> dict:
        return super().state_dict() | {"whole": self.whole.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.whole.load_state_dict(state["whole"])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        state = {"names": list(self.rows), "grids": (self.values + self._whole()).detach().cpu()}
        with atomic_write(folder.ply(iteration).with_name("appearance.pth")) as file:
            torch.save(state, file)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Bilateral":
        try:
            state = read_torch_file(path)
            bilateral = cls(state["names"], device)
            with torch.no_grad():
                bilateral.values.copy_(state["grids"])
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{path}: must have the grids of --appearance bilateral ({reason})") from None
        return bilateral


def recolored(image: Tensor, grid: Tensor) -> Tensor:
    """The picture [3, H, W], each pixel through the transform that the grid [12, 8, 16, 16] has for it."""
    _, height, width = image.shape
    gray = torch.tensordot(torch.tensor(GRAY).to(image), image, 1).clamp(0, 1)
    x = ((torch.arange(width).to(image) + 0.5) / width).expand_as(gray)
    y = ((torch.arange(height).to(image) + 0.5) / height)[:, None].expand_as(gray)
    where = 2 * torch.stack([x, y, gray], 2) - 1
    affine = F.grid_sample(grid[None], where[None, None], align_corners=True).view(3, 4, height, width)
    return (affine[:, :3] * image).sum(1) + affine[:, 3]


def roughness(grid: Tensor) -> Tensor:
    """Mean squared difference of neighbors, summed over the axes."""
    return torch.stack([grid.diff(dim=axis).square().mean() for axis in (1, 2, 3)]).sum()
