"""A camera: where a view was taken, at training size, and what was seen there."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from scene.images import Picture
from utils.geometry import camera_center, fov_from_focal

LEVELS = 3  # of coarseness: whole photos, halves and quarters


@dataclass(eq=False)
class Camera:
    """One view. The viewer makes some without pictures."""

    name: str
    width: int  # in training
    height: int
    world_to_camera: Tensor  # [4, 4] on the compute device; x right, y down, z forward
    K: Tensor  # [3, 3] on the compute device, in pixels of width x height
    uid: int = 0  # position in cameras.json
    original_width: int = 0  # of the camera model
    original_height: int = 0
    is_test: bool = False  # one of the held-out views
    half: slice | None = None  # the columns that count, with --train_test_exp
    photo: Picture | None = None
    depth: Picture | None = None
    counted: Picture | None = None  # where the photo counts, uint8 [H, W], 1 or 0; None: everywhere
    coarseness: int = 1  # how many times smaller than it was read

    @property
    def device(self) -> torch.device:
        return self.world_to_camera.device

    @property
    def center(self) -> Tensor:
        """Where the camera is, [3]."""
        return camera_center(self.world_to_camera)

    @property
    def fovx(self) -> float:
        """Horizontal field of view in radians."""
        return fov_from_focal(float(self.K[0, 0]), self.width)

    @property
    def fovy(self) -> float:
        return fov_from_focal(float(self.K[1, 1]), self.height)

    def image(self) -> Tensor:
        """The photo, uint8 [3, H, W] on the compute device, composited over the background."""
        if self.photo is None:
            raise ValueError(f"the camera {self.name} has no photo")
        return self.photo.get()

    def prefetch(self) -> None:
        """Begin to copy the pictures to the device, beside whatever it computes now."""
        for picture in (self.photo, self.depth, self.counted):
            if picture is not None:
                picture.prefetch()

    def counts(self) -> Tensor | None:
        """1 where the photo counts and 0 elsewhere, float [H, W]; None: it counts everywhere."""
        return None if self.counted is None else self.counted.get().float()

    def mask(self) -> Tensor | None:
        """The same for training, which may also be kept to one half of the photo."""
        counts, half = self.counts(), self._half_mask
        return counts * half if counts is not None and half is not None else counts if half is None else half

    @cached_property
    def _half_mask(self) -> Tensor | None:
        if self.half is None:
            return None
        mask = torch.zeros(self.height, self.width, device=self.device)
        mask[:, self.half] = 1
        return mask

    def inv_depth(self) -> tuple[Tensor, Tensor] | None:
        """Inverse depth and where it counts, both float [H, W]; None if there is none that can be trusted."""
        if self.depth is None:
            return None
        depth, counts = self.depth.get(), self.counts()
        return depth, torch.ones_like(depth) if counts is None else counts


def smaller(camera: Camera, times: int) -> Camera:
    """The same view with pictures so many times narrower, which stay where they are computed with."""
    small = narrower(camera, times)
    pictures = {
        name: None if picture is None else _resized(picture, (small.height, small.width))
        for name, picture in (("photo", camera.photo), ("depth", camera.depth), ("counted", camera.counted))
    }
    return replace(small, **pictures)


def narrower(camera: Camera, times: int) -> Camera:
    """The same without pictures."""
    width, height = max(camera.width // times, 1), max(camera.height // times, 1)
    factors = camera.K.new_tensor([[width / camera.width], [height / camera.height], [1.0]])
    half = camera.half
    if half is not None:
        start, stop, _ = half.indices(camera.width)
        half = slice(start * width // camera.width, stop * width // camera.width)
    none = dict(photo=None, depth=None, counted=None)
    return replace(
        camera, width=width, height=height, K=camera.K * factors, half=half, coarseness=times, **none
    )


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """Of means over the pixels that become one. Where one of these does not count, the mean does not."""
    whole = picture.get()
    planes = whole.float()[(None,) * (4 - whole.dim())]
    value = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    value = value.view(*whole.shape[:-2], *size)
    if whole.dtype == torch.uint8:
        value = (value + 0.5).to(torch.uint8) if whole.dim() == 3 else (value > 0.999).to(torch.uint8)
    small = Picture(lambda: value, value.shape, picture.device, dtype=value.dtype)
    small.keep(value, on_device=True)
    return small
