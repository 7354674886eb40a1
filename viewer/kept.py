"""What of its pictures a model keeps in a file of another format."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch

from gaussian_renderer import Splats
from per_view import Shown
from scene import edit, formats
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from training import method
from utils.image import psnr, to_float
from viewer.cameras import Views

MOST_VIEWS = 8
SAME = 99.0  # dB of pictures that are equal


class Kept(NamedTuple):
    """Means over test views, in dB."""

    own: float  # against the model's own pictures
    photos: tuple[float, float] | None  # against the photos: of the model, and of the file

    def __str__(self) -> str:
        text = f"its test views match the model's with {self.own:.1f} dB"
        return text + (f": {self.photos[1]:.2f} dB instead of {self.photos[0]:.2f}" if self.photos else "")


class Judge:
    """Renders the test views of a model; of one without, train views."""

    def __init__(self, folder: ModelFolder, iteration: int, views: Views, device: torch.device):
        background = torch.full((3,), float(views.model.white_background), device=device)
        self.views, self.background = views, background
        self.shown = method.load(views.model, views.pipe, iteration, background)[0]
        cameras = views.test or views.train
        step = max(1, -(-len(cameras) // MOST_VIEWS))
        self.cameras = cameras[::step]

    @torch.no_grad()
    def kept(self, path: Path, turn: torch.Tensor | None) -> Kept:
        """turn: the quaternion by which the model was turned before it was written."""
        theirs = self._with(formats.read(path, self.background.device), turn)
        own, photos = [], []
        for camera in self.cameras:
            before, after = (shown.picture(camera).image.clamp(0, 1) for shown in (self.shown, theirs))
            own.append(psnr(after, before).clamp_max(SAME))
            if self.views.photos and not self.shown.right_half:
                truth, mask = to_float(camera.image()), camera.counts()
                photos.append(torch.stack([psnr(image, truth, mask) for image in (before, after)]))
        mean = torch.stack(photos).mean(0).tolist() if photos else None
        return Kept(float(torch.stack(own).mean()), (mean[0], mean[1]) if mean else None)

    def _with(self, gaussians: GaussianModel, turn: torch.Tensor | None) -> Shown:
        if turn is not None:
            gaussians = edit.turn(gaussians, edit.turn_back(turn))
        shown = copy.copy(self.shown)
        shown.scene = Splats(edit.into(gaussians, self.views.frame), self.views.pipe, self.background)
        return shown
