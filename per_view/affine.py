"""An affine color transform for each photo (--appearance exposure).

In the files it is an exposure as the published code has it. What mixes channels and shifts colors is rarer
than gains, and learned more slowly. What all photos share is the scene's, and taken out after each step.
"""

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view.appearance import Appearance
from per_view.exposure import Exposure, apply_exposure
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder

OTHER = 0.2  # the rate of what mixes channels and of shifts, against that of gains


class Affine(Appearance):
    """values [V, 3, 4]: what is added to the identity, in units()."""

    name = "exposure"

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Affine":
        names = scene.exposure_names
        affine = cls(names, torch.zeros(len(names), 3, 4, device=scene.background.device))
        affine.options = options
        return affine

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (rendered,) = pictures
        transform = transforms(self.of(camera))
        return rendered._replace(image=apply_exposure(rendered.image, transform))

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            self.values -= self.values.mean(0)

    def save(self, folder: ModelFolder, iteration: int) -> None:
        exposure = Exposure(list(self.rows), self.values.device, median=True)
        with torch.no_grad():
            exposure.values.copy_(transforms(self.values))
        exposure.save(folder, iteration)


def transforms(values: Tensor) -> Tensor:
    """What they stand for, [..., 3, 4]."""
    return torch.eye(3, 4).to(values) + units().to(values) * values


def units() -> Tensor:
    """Gains move by as much as the rate says, the others by less."""
    return OTHER + (1 - OTHER) * torch.eye(3, 4)
