"""What a camera does to colors, in three steps (--appearance ppisp), after PPISP (Deutsch et al. 2026).

Exposure: all colors times 2^e, e for each photo. Vignetting: darker away from an optical center, for each
camera and channel. White balance: a homography of the chromaticities for each photo, which keeps R + G + B.
Brightness and white balance that all photos share belong to the scene: they are taken out after each step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view.appearance import Appearance
from per_view.per_photo import PerPhoto
from per_view.poses import numbers
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json

# Chromaticities (R, G) / (R + G + B) of blue, red, green and gray, and how two latents each move them.
POINTS = [[0, 0], [1, 0], [0, 1], [1 / 3, 1 / 3]]
MOVES = [
    [[0.0480542, -0.0043631], [-0.0043631, 0.0481283]],
    [[0.0580570, -0.0179872], [-0.0179872, 0.0431061]],
    [[0.0433336, -0.0180537], [-0.0180537, 0.0580500]],
    [[0.0128369, -0.0034654], [-0.0034654, 0.0128158]],
]
FROM_POINTS = [[-1, -1, 1], [1, 0, 0], [0, 1, 0]]  # inverse of the first three, homogeneous, as columns
DARK = 1e-5  # R + G + B below which a color is black
SLOWER = 0.1  # the rate of vignetting, which moves at each step, against that of photos
CENTER, BRIGHTER, COLORED = 0.02, 0.01, 0.1  # of the loss: what vignetting rarely does


class Ppisp(Appearance):
    name = "ppisp"

    def __init__(self, names: Sequence[str], cameras: Sequence[str], start: Tensor):
        """start [V, 9]: e and eight latents; cameras: as in camera_of()."""
        super().__init__(names, start)
        self.lenses = PerPhoto(cameras, start.new_zeros(len(cameras), 3, 5))  # center (x, y), a1, a2, a3
        self._taken_by: dict[str, int | None] = {}  # by the name of a view: row of its camera

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Ppisp":
        names = scene.exposure_names
        cameras = list(dict.fromkeys(camera_of(camera) for camera in scene.train_cameras))
        ppisp = cls(names, cameras, torch.zeros(len(names), 9, device=scene.background.device))
        ppisp.options = options
        for camera in scene.train_cameras:  # as they are, not yet smaller
            ppisp.lens(camera)
        return ppisp

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        (rendered,) = pictures
        photo, lens = self.of(camera), self.lens(camera)
        image = rendered.image * photo[0].exp2()
        image = image if lens is None else image * falloff(lens, *image.shape[1:])
        return rendered._replace(image=balanced(image, homography(photo[1:])))

    def lens(self, camera: Camera) -> Tensor | None:
        if camera.name not in self._taken_by:
            self._taken_by[camera.name] = self.lenses.rows.get(camera_of(camera))
        row = self._taken_by[camera.name]
        return None if row is None else self.lenses.values[row]

    # Training

    def loss_terms(self) -> list[Callable]:
        return [self.restraint]

    def restraint(self, picture: Rendered, camera: Camera, trainer, iteration: int) -> Tensor | float:
        if (lens := self.lens(camera)) is None:
            return 0.0
        center, a = lens[:, :2], lens[:, 2:]
        colored = a.var(0, correction=0).sum()
        return CENTER * center.square().sum() + BRIGHTER * a.relu().sum() + COLORED * colored

    def parameters(self) -> list[Tensor]:
        return [self.values, self.lenses.values]

    def step(self) -> None:
        super().step()
        self.lenses.rate = SLOWER * self.rate
        self.lenses.step()
        with torch.no_grad():
            self.values -= self.values.mean(0)

    def state_dict(self) -> dict:
        return super().state_dict() | {"lenses": self.lenses.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.lenses.load_state_dict(state["lenses"])

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        photos, lenses = (
            {name: part.values[row].tolist() for name, row in part.rows.items()}
            for part in (self, self.lenses)
        )
        about = {"appearance": "ppisp", "photos": photos, "vignetting": lenses}
        write_json(folder.ply(iteration).with_name("appearance.json"), about, indent=1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Ppisp":
        about = read_json(path)
        photos, lenses = about.get("photos"), about.get("vignetting")
        if not isinstance(photos, dict) or not isinstance(lenses, dict) or not photos:
            raise DataError(f"{path}: must have photos and vignetting")
        ppisp = cls(list(photos), list(lenses), numbers(path, photos, (9,)).to(device))
        with torch.no_grad():
            ppisp.lenses.values.copy_(numbers(path, lenses, (3, 5)))
        return ppisp


def camera_of(camera: Camera) -> str:
    """Photos with the same size and focal lengths are of one camera. It waits for the GPU."""
    fx, fy = camera.K[0, 0].item(), camera.K[1, 1].item()
    return f"{camera.width}x{camera.height}, focal lengths {fx:.6g} {fy:.6g}"


def falloff(lens: Tensor, height: int, width: int) -> Tensor:
    """What is left of the light at each pixel, [3, H, W], by the lens [3, 5]."""
    longer = max(width, height)
    x = (torch.arange(width).to(lens) + 0.5 - width / 2) / longer
    y = (torch.arange(height).to(lens) + 0.5 - height / 2) / longer
    cx, cy, a1, a2, a3 = lens.T[:, :, None, None]
    r2 = (x - cx).square() + (y[:, None] - cy).square()
    return (1 + r2 * (a1 + r2 * (a2 + r2 * a3))).clamp(0, 1)


def homography(latents: Tensor) -> Tensor:
    """Of (R, G, R + G + B), [3, 3]: it takes the four points to where the latents [8] move them."""
    points, moves = (torch.tensor(part).to(latents) for part in (POINTS, MOVES))
    points = points + (moves @ latents.view(4, 2, 1))[..., 0]
    points = torch.nn.functional.pad(points, (0, 1), value=1.0)
    corners = points[:3].T
    weights = torch.linalg.solve(corners, points[3])
    return 3 * (corners * weights) @ torch.tensor(FROM_POINTS).to(latents)


def balanced(image: Tensor, H: Tensor) -> Tensor:
    """The picture [3, H, W] with other chromaticities, each pixel as bright as it was."""
    bright = image.sum(0)
    red, green, other = torch.tensordot(H, torch.stack([image[0], image[1], bright]), 1)
    scale = bright / other.clamp_min(DARK)
    return torch.stack([red * scale, green * scale, bright - (red + green) * scale])
