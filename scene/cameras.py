"""A camera: where a view was taken, at training size, and what was seen there."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scene.images import Picture
from utils.geometry import camera_center, fov_from_focal


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
