"""A blur without a cause: a photo is the mean of what is seen from several places near it (--blur kernel).

The points of a kernel are poses of the camera, free to shift and to turn: on a line they are motion blur,
over a lens they are defocus. All photos share a part, which is learned from every step, and each adds its
own. So are the rigid kernels of DP-NeRF (Lee 2023). Kernels of the picture's own pixels, as Deblur-NeRF (Ma
2022) and BAGS (Peng 2024) have, cost one render, but win back little of what defocus takes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view.defocus import sunflower
from per_view.mean import mean
from per_view.per_photo import PerPhoto, rate, seen
from per_view.poses import numbers, places
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json
from utils.rigid import rigid, so3_exp

START = 3.0  # pixels by which what is very far away is blurred at first: kernels that start small stay small
RATES = 0.2, 0.002  # pixels of a visit, at the start and at the end
SHARED = 0.3  # the rate of what all photos share, which moves at each step, against that
WIDE = 5e-4  # of the loss: how much kernels of a pixel are pulled wider, about; others less


class Kernel(PerPhoto):
    """values [V, n, 6]: what a photo adds to the shared poses, (shift, rotation vector) in units."""

    name = "kernel"

    def __init__(self, names: Sequence[str], start: Tensor, units: Tensor, space: str = "srgb"):
        """units [V, 6]: what moves the picture by about a pixel."""
        super().__init__(names, start)
        self.shared = PerPhoto(["all"], torch.zeros_like(start[:1]))
        self.units, self.space = units, space
        self.active = True

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Kernel":
        views, units = options.views, seen(scene).units
        start = torch.zeros(len(units), views.blur_samples, 6).to(units)
        kernel = cls(scene.exposure_names, start, units, views.blur_space)
        kernel.shared.values.data[0] = spread(start[0])
        kernel.options = options
        return kernel

    def poses(self, row: int) -> Tensor:
        """In units, [n, 6]. Their mean is the data set's pose: kernels that are free would move the scene."""
        poses = self.shared.values[0] + self.values[row]
        return poses - poses.mean(0)

    def motions(self, row: int) -> Tensor:
        """Of the camera's axes, [n, 4, 4]."""
        shifts, turns = (self.poses(row) * self.units[row]).split(3, dim=1)
        rotations = so3_exp(turns)
        return rigid(rotations, -(rotations @ shifts[..., None])[..., 0])

    def cameras(self, camera: Camera) -> list[Camera]:
        if (row := self.row(camera)) is None or not self.active:
            return [camera]
        return places(camera, self.motions(row))

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        return mean(pictures, self.space)

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        """Blur that all photos share is explained as well, and fitted a little better, by a scene that is
        blurred itself: so kernels are as wide as photos let them be."""
        if (row := self.row(camera)) is None or not self.active:
            return 0.0
        square = 12 * self.poses(row).square().mean(0).sum()  # of a line's length
        return -WIDE * 0.5 * square.log1p()

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
        """blur.json beside the model: the poses of each photo's kernel."""
        with torch.no_grad():
            kernels = {name: (self.poses(row) * self.units[row]).tolist() for name, row in self.rows.items()}
        about = {"blur": "kernel", "space": self.space, "kernels": kernels}
        write_json(folder.ply(iteration).with_name("blur.json"), about, indent=1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Kernel":
        about = read_json(path)
        kernels, space = about.get("kernels"), about.get("space")
        if not isinstance(kernels, dict) or space not in ("srgb", "linear"):
            raise DataError(f"{path}: must have kernels and a space, which is srgb or linear")
        count = len(next(iter(kernels.values()), []))
        poses = numbers(path, kernels, (count, 6)).to(device)
        return cls(list(kernels), poses, torch.ones_like(poses[:, 0]), space)


def spread(like: Tensor) -> Tensor:
    """Poses [n, 6] at first: over a disk, turned so that things at the usual distance stay where they are."""
    x, y = START * sunflower(like[:, 0])
    zero = torch.zeros_like(x)
    return torch.stack([x, y, zero, -y, x, zero], 1)
