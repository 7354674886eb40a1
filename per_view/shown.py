"""What the photos should look like: a scene representation, seen through the per-view modules."""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol

import torch
from diff_gaussian_rasterization import Rendered
from torch import Tensor

from per_view.module import PerView
from scene.cameras import Camera
from utils.image import to_float, with_colors_of

Render = Callable[[list[Camera]], list[Rendered]]


class Representation(Protocol):
    """Anything that can be looked at. Its count is of whatever it is made of."""

    def picture(self, camera: Camera) -> Rendered: ...

    def __len__(self) -> int: ...


class Pair(NamedTuple):
    """What a trained view is judged by."""

    image: Tensor  # [3, H, W] float, not clamped
    truth: Tensor  # [3, H, W] uint8
    mask: Tensor | None  # [H, W] float, 1 where the photo counts; None: everywhere


class Shown:
    def __init__(self, scene: Representation, modules: Sequence[PerView] = (), right_half: bool = False):
        self.scene, self.modules = scene, list(modules)
        self.right_half = right_half  # views are judged there: the left half of test views was trained on
        self.fits_colors = False  # test views are, before they are judged
        self.sharp = False  # views are shown without what blurred their photos

    def __len__(self) -> int:
        return len(self.scene)

    def picture(self, camera: Camera, render: Render | None = None) -> Rendered:
        """The picture of this camera's photo. `render`: how the scene itself is seen, if not by default."""
        return self._through(self.modules, [camera], render or self._one_by_one)[0]

    def _through(self, modules: list[PerView], cameras: list[Camera], render: Render) -> list[Rendered]:
        """All cameras that the views are made from are seen at once."""
        if not modules:
            return render(cameras)
        first, *inner = modules
        seen = [[first.sharp_camera(c)] if self.sharp else first.cameras(c) for c in cameras]
        pictures = iter(self._through(inner, list(chain(*seen)), render))
        groups = [list(islice(pictures, len(group))) for group in seen]
        return [first.picture(camera, group) for camera, group in zip(cameras, groups)]

    def _one_by_one(self, cameras: list[Camera]) -> list[Rendered]:
        return [self.scene.picture(camera) for camera in cameras]

    def sharp_camera(self, camera: Camera) -> Camera:
        """From where the photo was taken, as far as the modules know better than the data set."""
        for module in self.modules:
            camera = module.sharp_camera(camera)
        return camera

    @torch.no_grad()
    def pair(self, camera: Camera, render: Render | None = None) -> Pair:
        """The picture, and the photo beside it."""
        image, (truth, mask) = self.picture(camera, render).image, self.photo(camera)
        image = image[..., image.shape[-1] // 2 :] if self.right_half else image
        if self.fits_colors and camera.is_test:
            image = with_colors_of(to_float(truth), image, mask)
        return Pair(image, truth, mask)

    def photo(self, camera: Camera) -> tuple[Tensor, Tensor | None]:
        """What a picture is judged by, and where it counts."""
        truth, mask = camera.image(), camera.counts()
        if self.right_half:
            half = truth.shape[-1] // 2
            truth, mask = truth[..., half:], None if mask is None else mask[:, half:]
        return truth, mask
