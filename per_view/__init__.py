"""What a photo adds to the picture of the scene: trained along with it, and kept or dropped afterwards.

A module of your own is a subclass of PerView in a file here, and a line in attached(). It may move the camera
(poses), show the scene from several places and mix the pictures (blur), or change the colors (exposure).
Modules compose from the photo inwards, in the order of attached(): the first one's picture() has the last
word, and the last one's cameras() are those that the Gaussians are rendered from.
"""

from pathlib import Path

import torch

from arguments import ModelParams, Options
from per_view.exposure import Exposure
from per_view.module import PerView
from per_view.shown import Pair, Shown
from scene.folder import ModelFolder

__all__ = ["Exposure", "Pair", "PerView", "Shown", "attached", "saved"]


def attached(options: Options, views: list[str], device: torch.device) -> list[PerView]:
    """The modules of a run with these options, from the photo inwards. `views`: names of the train photos."""
    modules: list[PerView] = []
    if options.model.train_test_exp:
        modules.append(Exposure(views, device, options.opt))
    return modules


def saved(model: ModelParams, ply: Path, folder: ModelFolder | None, device: torch.device) -> list[PerView]:
    """The modules that rendered views need, as they were saved with the model in this file."""
    return [Exposure.load(ply, folder, device)] if model.train_test_exp else []
