"""Defocus: a photo is the mean of what is seen from all points of its lens (--blur defocus).

Each photo has an aperture and a distance in focus. From a point of the lens, the camera looks at what is in
focus before it, so that this stays where it is in the picture. Something that the photo shows is in focus: a
focus far off would blur all things alike, which a scene that is too sharp undoes. Two numbers stand for both:
all photos share a part, which is learned from every step, and each adds its own. Sharp photos, too, are a
little better explained by a lens of about a pixel and a scene that is too sharp. So lenses that stay that
small are closed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from arguments import Options
from per_view.mean import mean
from per_view.per_photo import PerPhoto, rate, seen
from per_view.poses import motions_to, numbers, places
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from utils.files import DataError, read_json, write_json
from utils.schedules import reaches

GOLDEN = 2.399963  # radians
RATES = 0.05, 0.0005  # of both numbers, at the start and at the end
SHRINK = 0.1  # of a step: by so much lenses close as long as photos do not mind
START = 1.0  # pixels by which what is very far away is blurred at first
LEAST, LOOKED_AT = 1.5, 0.4  # lenses of fewer pixels are closed, after this part of the steps with blur
LOOK_EVERY = 100  # iterations after which it is looked which ones are


class Defocus(PerPhoto):
    name = "defocus"

    def __init__(self, names: Sequence[str], units: Tensor, samples: int = 10, space: str = "srgb"):
        """units [V, 3]: the aperture's radius at first, and between what inverse distances the focus is."""
        super().__init__(names, torch.zeros_like(units[:, :2]))
        self.shared = PerPhoto(["all"], torch.zeros_like(units[:1, :2]))
        self.units, self.samples, self.space = units, samples, space
        self.open = [True] * len(self.rows)
        self.active = True

    @classmethod
    def attached(cls, options: Options, scene: Scene) -> "Defocus":
        views, known = options.views, seen(scene)
        apertures = START / (known.K[:, 0, 0] * known.inverse_depths)
        units = torch.cat([apertures[:, None], known.ranges], 1)
        defocus = cls(scene.exposure_names, units, views.blur_samples, views.blur_space)
        defocus.options = options
        return defocus

    def lens(self, row: int) -> Tensor:
        """Aperture radius and inverse distance in focus, [2]."""
        aperture, focus = self.shared.values[0] + self.values[row]
        unit, far, near = self.units[row]
        return torch.stack([unit * aperture.exp(), far + (near - far) * focus.sigmoid()])

    def cameras(self, camera: Camera) -> list[Camera]:
        if (row := self.row(camera)) is None or not self.active or not self.open[row]:
            return [camera]
        return places(camera, over_the_lens(self.lens(row), self.samples))

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        return mean(pictures, self.space)

    def parameters(self) -> list[Tensor]:
        return [self.values, self.shared.values]

    def schedule(self, iteration: int) -> None:
        first, last = self.options.views.blur_from_iter, self.options.opt.iterations
        self.active = iteration > first
        self.rate = rate(self.options, iteration, first, *RATES)
        self.shared.rate = self.rate
        if iteration > first + LOOKED_AT * (last - first) and reaches(LOOK_EVERY, iteration, self.views):
            pixels = START * (self.shared.values[0, 0] + self.values[:, 0]).exp()
            self.open = [was and size >= LEAST for was, size in zip(self.open, pixels.tolist())]

    def step(self) -> None:
        super().step()
        self.shared.step()
        with torch.no_grad():  # as paths do
            self.shared.values[:, 0] -= SHRINK * self.rate

    def state_dict(self) -> dict:
        return super().state_dict() | {"shared": self.shared.state_dict(), "open": list(self.open)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.shared.load_state_dict(state["shared"])
        names = state["names"]
        known = dict(zip(names, state.get("open", [True] * len(names)), strict=True))
        self.open = [known.get(name, True) for name in self.rows]

    # Files

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """blur.json beside the model: aperture radius and inverse distance in focus of each photo."""
        with torch.no_grad():
            found = {name: self.lens(row).tolist() for name, row in self.rows.items()}
        opened = zip(found.items(), self.open, strict=True)
        lenses = {name: [aperture * is_open, focus] for (name, (aperture, focus)), is_open in opened}
        about = {"blur": "defocus", "samples": self.samples, "space": self.space, "lenses": lenses}
        write_json(folder.ply(iteration).with_name("blur.json"), about, indent=1)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Defocus":
        about = read_json(path)
        lenses, samples, space = about.get("lenses"), about.get("samples"), about.get("space")
        if not isinstance(lenses, dict) or type(samples) is not int or space not in ("srgb", "linear"):
            raise DataError(f"{path}: must have lenses, samples and a space, which is srgb or linear")
        lens = numbers(path, lenses, (2,)).to(device)
        return cls(list(lenses), lens[:, [0, 1, 1]], max(samples, 2), space)


def over_the_lens(lens: Tensor, count: int) -> Tensor:
    """Motions [n, 4, 4] of the camera to points that are evenly spread over a lens of this (aperture radius,
    inverse distance in focus)."""
    x, y = lens[0] * sunflower(lens.new_zeros(count))
    zero = torch.zeros_like(x)
    turns = lens[1] * torch.stack([-y, x, zero], 1)
    return motions_to(torch.cat([torch.stack([x, y, zero], 1), turns], 1))


def sunflower(like: Tensor) -> Tensor:
    """Points [2, n] that are evenly spread over the unit disk, as a sunflower's seeds are."""
    k = torch.arange(len(like)).to(like)
    radius, angle = ((k + 0.5) / len(like)).sqrt(), GOLDEN * k
    return radius * torch.stack([angle.cos(), angle.sin()])
